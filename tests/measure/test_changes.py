"""What a step changes equals what NumPy computes in float64 from copies of the weights"""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from fastai_bnstats.measure import Meter, Past, DevicePast, finite_range, unpack
from fastai_bnstats.measure.changes import past_of

SETTINGS = settings(max_examples=60, deadline=None)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
BOTH = pytest.mark.parametrize('cls', [Past, DevicePast])


def meter_of(P, ranges=None): return Meter(ranges or [None]*P, ['weight']*P, auto=lambda x, n_sd, kind: finite_range(x, n_sd))


def wide(x): return x.detach().double().numpy().reshape(-1)


def check(past, meter, before, start):
    "Measure, and compare with copies of the tensors"
    row, norms = past.measure(meter)
    s = unpack(row)
    for i, x in enumerate(past.tensors):
        single = torch.float64 if x.dtype == torch.float64 else torch.float32
        d = (x.detach().to(single)-before[i].to(single)).double().numpy().reshape(-1)
        fin = d[np.isfinite(d)]
        if meter.chosen[i] is not None: assert (s.hist[i].numpy() == np.histogram(fin, meter.chosen[i])[0]).all()
        else: assert not s.hist[i].any() and fin.min() == fin.max() == s.mean[i]
        assert (s.numel[i], s.nonfinite[i]) == (d.size, d.size-fin.size)
        assert s.mean[i] == pytest.approx(fin.mean(), rel=1e-6, abs=1e-9*np.abs(fin).max())
        assert s.var[i] == pytest.approx(fin.var(), rel=1e-5, abs=1e-12*np.square(fin).max())
        want = [np.linalg.norm(v) for v in (wide(x), fin, wide(x)-wide(start[i]), wide(start[i]))]
        assert norms[i].tolist() == pytest.approx(want, rel=1e-5, nan_ok=True)


def copies(xs): return [x.detach().clone() for x in xs]


@BOTH
@SETTINGS
@given(seed=st.integers(0, 999), dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3), sd=st.sampled_from([1e-3, 1., 1e3]))
def test_steps_and_what_happens_between_them(cls, seed, dtypes, sd):
    g = torch.Generator().manual_seed(seed)
    def noise(*shape): return torch.randn(shape, generator=g, dtype=torch.float64)*sd
    xs = [noise(seed % 40+1, 6, 3, 3).to(t) for t in dtypes]
    past, meter, start = cls(xs), meter_of(len(xs)), copies(xs)
    past.begin_fit()
    for step in range(3):
        past.begin_step()
        before = copies(xs)
        for x in xs: x += (noise(*x.shape)*.1).to(x.dtype)
        check(past, meter, before, start)
        if step: xs[0].data.clamp_(-sd, sd) # such a change is not counted by PyTorch's version counter


@BOTH
@pytest.mark.parametrize('view', [lambda x: x.to(memory_format=torch.channels_last), lambda x: x.transpose(0, 1), lambda x: x[:, ::2],
                                  lambda x: x[..., :1].expand(x.shape)])
def test_any_layout(cls, view):
    x = view(torch.randn(8, 6, 5, 5))
    past, meter, start = cls([x]), meter_of(1), copies([x])
    past.begin_fit()
    past.begin_step()
    past.tensors = [x*1.01+.01]
    check(past, meter, start, start)


@BOTH
def test_a_layout_that_changes(cls):
    x = torch.randn(8, 6, 5, 5)
    past, meter, start = cls([x]), meter_of(1), copies([x])
    past.begin_fit()
    past.begin_step()
    past.tensors = [(x+torch.randn_like(x)).to(memory_format=torch.channels_last)]
    check(past, meter, start, start)
    past.begin_step()
    before = copies(past.tensors)
    past.tensors[0] += 1
    check(past, meter, before, start)


@BOTH
def test_steps_of_one_size_have_no_edges_yet(cls):
    x = torch.randn(300).mul(64).round().div(64) # so that sums are exact
    past, meter, start = cls([x]), meter_of(1), copies([x])
    past.begin_fit()
    for change in (.5, torch.randn(300)):
        past.begin_step()
        before = copies([x])
        x += change
        check(past, meter, before, start)
        assert meter.has_all_edges == isinstance(change, torch.Tensor)


@BOTH
def test_lazy_tensors_come_into_being(cls):
    m, x = nn.LazyLinear(4), torch.randn(30)
    past, meter = cls([m.weight, x]), meter_of(2)
    past.begin_fit()
    past.begin_step()
    x.mul_(torch.randn(30))
    row, norms = past.measure(meter)
    assert row[0, -3] == 0 and norms[0].isnan().all() and not norms[1].isnan().any()
    m(torch.randn(2, 3))
    past.begin_fit()
    past.begin_step()
    before = start = copies([m.weight, x])
    with torch.no_grad(): m.weight += torch.randn(4, 3)
    x.mul_(torch.randn(30))
    check(past, meter, before, [start[0], torch.from_numpy(past.start[1]) if cls is Past else past.start[1]])


@BOTH
def test_bad_values(cls):
    x = torch.randn(5000)
    past, meter, start = cls([x]), meter_of(1, [(-1, 1)]), copies([x])
    past.begin_fit()
    past.begin_step()
    x += torch.randn(5000)
    x[7], x[8] = float('nan'), float('inf')
    check(past, meter, start, start)
    past.begin_step()
    before = copies([x])
    x[8] = 1.
    check(past, meter, before, start)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_parts_and_threads(dtype, monkeypatch):
    torch.manual_seed(0)
    x, steps = torch.randn(2_300_001).to(dtype), [torch.randn(2_300_001).to(dtype) for _ in range(2)]
    got = []
    for n in (1, 2, 5):
        monkeypatch.setattr(torch, 'get_num_threads', lambda n=n: n)
        y = [x.clone(), x[:5].clone()]
        past, meter, start = Past(y), meter_of(2), copies(y)
        past.begin_fit()
        for d in steps:
            past.begin_step()
            before = copies(y)
            for v in y: v += d[:len(v)]
            check(past, meter, before, start)
        past.begin_step()
        y[0] += 1
        got.append(past.measure(meter))
    assert all(a.equal(b) for r in got[1:] for a, b in zip(got[0], r))


@pytest.mark.parametrize('scale', [1e-25, 1e25])
def test_norms_beyond_the_squares_of_float32(scale):
    x = (torch.randn(5000)*scale)
    past, meter, start = Past([x]), meter_of(1), copies([x])
    past.begin_fit()
    past.begin_step()
    x.mul_(torch.randn(5000))
    check(past, meter, start, start)


def test_the_norm_of_millions_of_values():
    x = torch.randn(3_000_001)+1
    past = Past([x])
    past.begin_fit()
    past.begin_step()
    norms = past.measure(meter_of(1))[1][0]
    assert norms.tolist() == pytest.approx([x.double().norm().item(), 0, 0, x.double().norm().item()], rel=1e-12)


def test_copies_are_not_the_tensors_themselves():
    x = torch.ones(3)
    past = Past([x])
    past.begin_fit()
    x += 1
    assert past.start[0].tolist() == past.before[0].tolist() == [1, 1, 1]
    past.begin_step()
    assert past.start[0].tolist() == [1, 1, 1] and past.before[0].tolist() == [2, 2, 2]


def test_what_a_device_needs():
    class OnCuda:
        is_cuda = True
        def detach(self): return self
    assert type(past_of([torch.ones(2)])) is Past and type(past_of([torch.ones(2), OnCuda()])) is DevicePast


@pytest.mark.parametrize('new', [torch.randn(300_000), torch.ones(10), torch.randn(1000).double()], ids=['larger', 'smaller', 'wider'])
def test_a_tensor_that_changes_its_size_or_type(new):
    "Nothing would notice, since the parameter is the same"
    w = nn.Parameter(torch.randn(1000))
    past, meter = Past([w]), meter_of(1, [(-1, 1)])
    past.begin_fit()
    past.begin_step()
    w.data = new
    error = 'Tensor 0 had 1000 values in float32 when the fit began. Found .*: its change can.t be measured. Change sizes and types'
    for f in (past.begin_step, lambda: past.measure(meter)):
        with pytest.raises(ValueError, match=error): f()


def test_a_lazy_tensor_that_exists_after_a_nested_fit():
    m = nn.LazyLinear(4)
    past = DevicePast([m.weight])
    past.begin_fit()
    m(torch.randn(2, 3))
    past.begin_step()


def test_bad_first_values_cost_no_digits():
    x = torch.randn(100_000, dtype=torch.float64)
    past, meter = Past([x]), meter_of(1, [(1e6-5, 1e6+5)])
    past.begin_fit()
    past.begin_step()
    before = x.clone()
    x += 1e6+torch.randn(100_000, dtype=torch.float64)
    x[0] = float('nan')
    d = (x-before).numpy()[1:]
    assert past.measure(meter)[0][0, -1] == pytest.approx(d.var(), rel=1e-8)
