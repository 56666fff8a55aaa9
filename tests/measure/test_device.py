"""DevicePlan counts as NumPy and `tensor_stats` do, and never makes the host wait"""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_bnstats.measure import device
from fastai_bnstats.measure.device import DevicePlan
from fastai_bnstats.measure.edges import auto_range, bin_starts, uniform_edges
from fastai_bnstats.measure.host import tensor_stats
from fastai_bnstats.measure.rows import RowBuffer, combine, pack, unpack

SETTINGS = settings(max_examples=80, deadline=None)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SPECIAL = torch.tensor([0., -0., 1e-45, -1e-45, 1e-39, 3e38, -3e38, math.nan, math.inf, -math.inf])
DENORMAL_EDGES = np.concatenate([-np.geomspace(1e-30, 4, 20)[::-1], [0], np.geomspace(1e-40, 1e38, 20)])
EDGES = [uniform_edges(-2, 2, 40), # as the library makes them
         np.linspace(1, 1+1e-9, 41), # too fine for float32
         DENORMAL_EDGES, # not uniform
         np.linspace(-.3, .7, 41)] # edges that float32 cannot represent


def channels_last(x): return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


LAYOUTS = [lambda x: x, lambda x: x.flip(-1).transpose(0, -1), lambda x: x[..., ::2], lambda x: x[..., :1].expand(x.shape), channels_last]


def draw_tensors(data, n):
    "`n` tensors of any shape, precision and layout"
    arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=4, max_side=8), elements=st.floats(width=32))
    drawn = [[data.draw(s) for s in (arrays, st.sampled_from(LAYOUTS), st.sampled_from(DTYPES))] for _ in range(n)]
    return [layout(torch.tensor(x).to(dtype)) for x, layout, dtype in drawn]


def check(xs, edges, rows):
    "Every count equals NumPy's over the same edges and that of `tensor_stats`; moments equal those of float64"
    s = unpack(rows)
    t = tensor_stats(xs, edges)
    for a, b in zip(s[:5], t[:5]): assert a.dtype == torch.int64 and a.equal(b)
    for i, (x, g) in enumerate(zip(xs, edges)):
        v = x.detach().double().reshape(-1).numpy()
        fin, e = v[np.isfinite(v)], g
        assert (s.hist[i].numpy() == np.histogram(fin, e)[0]).all()
        assert (s.under[i], s.over[i], s.nonfinite[i], s.numel[i]) == ((fin < e[0]).sum(), (fin > e[-1]).sum(), len(v)-len(fin), len(v))
        if len(fin):
            assert s.mean[i] == pytest.approx(fin.mean(), rel=1e-6, abs=1e-12*np.abs(fin).max())
            assert s.var[i] == pytest.approx(fin.var(), rel=1e-6, abs=1e-14*np.square(fin).max())
        else: assert s.mean[i].isnan() and s.var[i].isnan()


def plan_check(xs, edges): check(xs, edges, DevicePlan(xs, edges)(xs))


def around(g):
    "The edges of `g` as float32, and both float32 neighbours of each"
    e = torch.tensor(g).float()
    return torch.cat([e] + [torch.nextafter(e, torch.full_like(e, v)) for v in (-math.inf, math.inf)])


@SETTINGS
@given(data=st.data(), n=st.integers(1, 4), which=st.integers(0, 3))
def test_any_tensors(data, n, which):
    plan_check(draw_tensors(data, n), [EDGES[(which+i) % 4] for i in range(n)])


@SETTINGS
@given(n=st.integers(1, 9000), sd=st.floats(1e-30, 1e30), shift=st.sampled_from([0., 1., 30., 10000.]),
       bins=st.sampled_from([1, 2, 40, 300]), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_any_size_and_scale(n, sd, shift, bins, seed, dtype):
    x = ((torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)+shift)*sd).to(dtype)
    g = uniform_edges((shift-3)*sd, (shift+3)*sd, bins)
    plan_check([x, x[:n//2], around(g)], [g]*3)


@pytest.mark.parametrize('g', EDGES)
def test_values_on_edges(g):
    x = around(g)
    plan_check([x, x.repeat(50), x.half(), x[x.isfinite()].bfloat16()], [g]*4)
    plan_check([x.reshape(1, -1).expand(9, -1), SPECIAL.repeat(300)], [g]*2)


def test_bin_starts_of_edges_beyond_float32():
    e = np.array([-1e39, -1e-50, 1e-50, 3.4028234663852886e38, 1e39])
    assert bin_starts(e).tolist() == [-3.4028234663852886e38, 0., 1.401298464324817e-45, 3.4028234663852886e38, math.inf]
    x = torch.tensor([-3e38, 0., -1e-45, 1e-45, 3.4028234663852886e38])
    plan_check([x], [e])


def test_dense_tensors_keep_their_strides():
    "A view with the strides of the tensor itself lets one fused copy fill all views"
    x = torch.randn(4, 6, 5, 5)
    xs = [x, x.to(memory_format=torch.channels_last), x.transpose(0, 2), x[:, ::2]]
    views = DevicePlan(xs, EDGES[:1]*4).groups[0].views
    assert [v.stride() == x.stride() for v, x in zip(views, xs)] == [True, True, True, False]


def test_layout_differs_from_the_plan():
    x = torch.randn(4, 6, 5, 5)
    check([x], EDGES[:1], DevicePlan([x.to(memory_format=torch.channels_last)], EDGES[:1])([x]))


@pytest.mark.parametrize('v', [.3, 1., 1e-30, 1e30, 3e38])
def test_a_constant_has_no_variance(v):
    x = torch.full((3000,), v)
    s = unpack(DevicePlan([x], EDGES[:1])([x]))
    assert s.mean[0] == pytest.approx(x[0].item(), rel=1e-14) and s.var[0] <= (1e-7*v)**2


@pytest.mark.parametrize('bad', [None, math.nan, math.inf])
def test_mean_ten_thousand_times_the_deviation(bad):
    x = torch.randn(100_000)*1e-3+10
    if bad: x[::7] = bad
    plan_check([x], [uniform_edges(9.9, 10.1, 40)])


def test_missing_tensors():
    xs, edges = [torch.randn(5, 700), torch.randn(3), torch.zeros(0), torch.randn(1024)], EDGES
    plan = DevicePlan(xs, edges)
    whole = plan(xs)
    some = plan([None, xs[1], None, torch.zeros(0)])
    s = unpack(some)
    assert s.numel.tolist() == [0, 3, 0, 0] and s.mean.isnan().tolist() == s.var.isnan().tolist() == [True, False, True, True]
    assert not some[[0, 2, 3], :-2].any() and some[1].equal(whole[1])
    assert not plan([None]*4)[:, :-2].any()
    assert np.array_equal(plan(xs), whole, equal_nan=True) # nothing remains of the previous step
    check(xs, edges, whole)


def test_groups(monkeypatch):
    monkeypatch.setattr(device, 'GROUP', 3000)
    xs = [torch.randn(n) for n in (10, 5000, 20, 1024, 1500, 0, 2)]
    plan = DevicePlan(xs, EDGES[:1]*7)
    assert [g.ids for g in plan.groups] == [[0], [1], [2, 3], [4, 5], [6]]
    assert len({g.buf.data_ptr() for g in plan.groups}) == 1
    check(xs, EDGES[:1]*7, plan(xs))


def test_parameters_and_their_gradients():
    m = torch.nn.Linear(70, 30)
    m(torch.randn(4, 70)).sum().backward()
    plan = DevicePlan(ps := list(m.parameters()), EDGES[:1]*2)
    assert not plan(ps).requires_grad
    check([p.grad for p in ps], EDGES[:1]*2, plan([p.grad for p in ps]))


def test_pack_and_unpack():
    xs = [torch.randn(500), torch.zeros(0), torch.tensor([math.nan])]
    s = tensor_stats(xs, EDGES[:1]*3)
    rows = pack(s)
    assert rows.shape == (3, 46) and rows.dtype == torch.float64
    for r in (rows, rows.numpy()):
        for a, b in zip(unpack(r), s): assert a.dtype == b.dtype and torch.allclose(a, b, equal_nan=True, rtol=0, atol=0)
    many = unpack(torch.stack([rows]*4))
    assert many.hist.shape == (4, 3, 40) and many.mean.shape == (4, 3)


@SETTINGS
@given(cuts=st.lists(st.integers(0, 3000), max_size=6), shift=st.sampled_from([0., 10000.]), seed=st.integers(0, 99))
def test_combined_parts_equal_the_whole(cuts, shift, seed):
    x = (torch.randn(3000, generator=torch.Generator().manual_seed(seed))+shift)*1e-3
    x[:5] = math.nan # the first part sometimes holds only these
    g = uniform_edges(*auto_range(x[None]), 40)
    cuts = [0, *sorted(cuts), 3000]
    parts = [pack(tensor_stats([x[a:b].double(), x[:7]], [g]*2)) for a, b in zip(cuts, cuts[1:])]
    rows = combine(torch.cat(parts), torch.tensor([0, 1]*len(parts)), 2)
    check([x, x[:7].repeat(len(parts))], [g]*2, rows)


def test_combine_without_finite_values():
    parts = [pack(tensor_stats([x], EDGES[:1])) for x in (torch.zeros(0), torch.tensor([math.inf]))]
    s = unpack(combine(torch.cat(parts), torch.tensor([0, 0]), 1))
    assert (s.numel, s.nonfinite) == (1, 1) and s.mean.isnan() and s.var.isnan()


@pytest.mark.parametrize('n', [0, 1, 3, 4, 5, 12, 13])
def test_buffer_keeps_order(n):
    buffer, row = RowBuffer(4), torch.zeros(2, 3)
    for _ in range(2): # the buffer is used again
        for i in range(n): buffer.push(row.fill_(i))
        assert buffer.waiting == n and buffer.full == (n >= 4)
        got = buffer.take()
        if n: assert got.dtype == np.float64 and got.shape == (n, 2, 3) and (got == np.arange(n)[:, None, None]).all()
        else: assert got is None
    assert buffer.take() is None


def test_taken_rows_do_not_change():
    buffer = RowBuffer(2)
    buffer.push(torch.ones(3))
    got = buffer.take()
    for _ in range(3): buffer.push(torch.zeros(3))
    assert (got == 1).all()


class Ops(TorchDispatchMode):
    "Records which operations run inside, and which of them make the host wait"
    def __enter__(self):
        self.names, self.waits = [], []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        res, name = func(*args, **(kwargs or {})), func._schema.name
        self.names.append(name)
        inputs = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        asynchronous = name == 'aten::empty_like' or (name == 'aten::copy_' and args[2:] == (True,))
        if isinstance(res, torch.Tensor) and not asynchronous:
            if {a.device.type for a in [*inputs, res]} == {'cpu', 'cuda'}: self.waits.append(name)
        return res


class Event:
    "Stands in for `torch.cuda.Event`"
    def record(self, stream): self.recorded = True


def record(where, P=3, wait=None, rows=2):
    "Run two steps of a plan for fake tensors, and return its operations and its buffer"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.cuda, 'Event', Event)
        m.setattr(torch.cuda, 'current_stream', lambda device: None)
        xs = [torch.ones(70, 20, device=where), *[torch.ones(64, device=where, dtype=torch.float16)]*(P-1)]
        plan, buffer = DevicePlan(xs, EDGES[:1]*P), RowBuffer(rows)
        with Ops() as ops:
            for _ in range(2):
                row = plan([None, *xs[1:]])
                if wait: wait(row)
                buffer.push(combine(torch.cat([row, plan(xs)]), torch.arange(P, device=where).repeat(2), P))
    return ops, buffer


def test_the_host_never_waits():
    "Fake tensors have no values, so reading one on the host raises an error"
    with FakeTensorMode(allow_non_fake_inputs=True): ops, buffer = record('cuda')
    assert ops.names and not ops.waits
    assert len(buffer._sent) == 1 and buffer._sent[0][1].recorded and buffer._sent[0][0].device.type == 'cpu'


WAITS = dict(item=lambda r: r[0, 0].item(), nonzero=lambda r: r.nonzero(), mask=lambda r: r[r > 0],
             bincount=lambda r: torch.bincount(r[0].long()), tolist=lambda r: r.tolist())


@pytest.mark.parametrize('wait', WAITS.values(), ids=WAITS)
def test_waiting_would_be_noticed(wait):
    waited = pytest.raises((DataDependentOutputException, DynamicOutputShapeException))
    with FakeTensorMode(allow_non_fake_inputs=True), waited: record('cuda', wait=wait)


@pytest.mark.parametrize('wait', [lambda r: r.cpu(), lambda r: r[0, 0].add_(torch.tensor([1.]).to(r.device)[0])])
def test_a_copy_to_the_host_would_be_noticed(wait):
    with FakeTensorMode(allow_non_fake_inputs=True): assert record('cuda', wait=wait)[0].waits


def test_operations_do_not_grow_with_tensors():
    few, many = record('cpu', 2)[0], record('cpu', 40)[0]
    assert few.names == many.names and few.names.count('aten::_foreach_copy_') == 4


def err(kind, text): return pytest.raises(kind, match=text)


def test_errors():
    x, g = torch.ones(3), EDGES[0]
    with err(ValueError, 'Found 1 tensors and 2 arrays of edges: pass two lists'): DevicePlan([x], [g, g])
    with err(ValueError, 'Found 0 tensors'): DevicePlan([], [])
    with err(ValueError, r'same number of bins. Found \[2, 40\]: choose edges'): DevicePlan([x, x], [g, [0, 1, 2.]])
    with err(TypeError, 'Tensor 1 is torch.float64.*use `tensor_stats`'): DevicePlan([x, x.double()], [g, g])
    with err(ValueError, r'Tensor 1 is \(3,\) on meta. The plan was made for \(3,\) on cpu'): DevicePlan([x, x.to('meta')], [g, g])
    plan = DevicePlan([x], [g])
    with err(ValueError, 'is for 1 tensors. Found 2: pass None'): plan([x, x])
    with err(ValueError, r'Tensor 0 is \(4,\) on cpu. The plan was made for \(3,\).*make a new one'): plan([torch.ones(4)])
    with err(TypeError, 'torch.int64'): plan([torch.ones(3).long()])
    with err(ValueError, r'at least 7. Found shape \(3,\)'): unpack(x)
    with err(ValueError, 'Found rows=0: pass'): RowBuffer(0)
    buffer = RowBuffer()
    buffer.push(x)
    with err(ValueError, r'holds rows of \(3,\). Found \(4,\): use another buffer'): buffer.push(torch.ones(4))
