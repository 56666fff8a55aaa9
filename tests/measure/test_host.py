"""`tensor_stats` and its edges agree with NumPy in float64"""
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from fastai_bnstats.measure.edges import auto_range, binning, uniform_edges
from fastai_bnstats.measure.host import one_thread, tensor_stats

SETTINGS = settings(max_examples=150, deadline=None)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAN, INF = float('nan'), float('inf')
VIEWS = dict(channels_last=lambda x: x.to(memory_format=torch.channels_last), slices=lambda x: x[::2, :, 1:],
             transposed=lambda x: x.transpose(0, 3), expanded=lambda x: x.expand(64, 32, 9, 9), scalar=lambda x: x[0, 0, 0, 0])
BAD_RANGES = [((0, 1, 0), 'bins must be at least 1'), ((1, 1, 4), 'finite lo < hi'), ((NAN, 1, 4), 'finite lo < hi'),
              ((0, INF, 4), 'finite lo < hi')]


def check(x, g):
    "Every count equals NumPy's over the same edges, and every element is counted once"
    s = tensor_stats([x], [g])
    v = x.detach().double().reshape(-1).numpy()
    fin, e = v[np.isfinite(v)], g.edges.numpy()
    assert (s.hist[0].numpy() == np.histogram(fin, e)[0]).all()
    assert (s.under[0], s.over[0], s.nonfinite[0], s.numel[0]) == ((fin < e[0]).sum(), (fin > e[-1]).sum(), len(v)-len(fin), len(v))
    assert s.hist.sum()+s.under.sum()+s.over.sum()+s.nonfinite.sum() == len(v)
    if len(fin):
        assert s.mean[0] == pytest.approx(fin.mean(), rel=1e-5, abs=1e-6*np.abs(fin).max())
        assert s.var[0] == pytest.approx(fin.var(), rel=1e-5, abs=1e-300)
    else: assert s.mean[0].isnan() and s.var[0].isnan()


@SETTINGS
@given(lo=st.floats(-1e6, 1e6, width=32), width=st.floats(1e-3, 1e6), bins=st.integers(1, 300))
def test_edges_agree_with_the_counting(lo, width, bins):
    e = uniform_edges(lo, lo+width, bins)
    assert len(e) == bins+1 and (e.diff() > 0).all()
    np.testing.assert_allclose(e, np.linspace(lo, lo+width, bins+1), atol=4e-7*max(abs(lo), abs(lo+width), width))
    assert e[0] <= np.float32(lo)+1e-30 and e[-1] >= np.float32(lo+width) or binning(e).scale is None
    x = torch.cat([e.float()] + [torch.nextafter(e.float(), torch.tensor(v)) for v in (-np.inf, np.inf)]).repeat(50)
    check(x.repeat(4096//len(x)+1), binning(e))


@SETTINGS
@given(x=hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, max_side=12), elements=st.floats(width=32)),
       bins=st.integers(1, 60))
def test_any_small_tensor(x, bins): check(torch.tensor(x), binning(uniform_edges(-3, 3, bins)))


@SETTINGS
@given(n=st.integers(4096, 40000), sd=st.floats(1e-6, 1e6), shift=st.sampled_from([0., 1., 30., 10000.]),
       bins=st.sampled_from([1, 2, 40, 179, 180, 1000]), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_any_large_tensor(n, sd, shift, bins, seed, dtype):
    x = ((torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)+shift)*sd).to(dtype)
    check(x, binning(uniform_edges(*auto_range(x[:100][None], 3.), bins)))


@pytest.mark.parametrize('bad', [NAN, INF, -INF, 3e38])
def test_one_bad_value_among_many(bad):
    x = torch.randn(2**20+4097) # three chunks
    x[77] = bad
    check(x, binning(uniform_edges(-2, 2, 40)))


def test_denormals_and_zeros(): check(torch.tensor([0., -0., 1e-45, -1e-45, 1e-39]*2000), binning(uniform_edges(0, 1, 40)))


@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
def test_any_stride(view): check(view(torch.randn(64, 32, 9, 9)), binning(uniform_edges(-2, 2, 40)))


def test_mean_ten_thousand_times_the_deviation():
    x = torch.randn(100_000)*1e-3+10
    s = tensor_stats([x], [binning(uniform_edges(9.9, 10.1, 40))])
    assert s.var[0] == pytest.approx(x.double().var(correction=0).item(), rel=1e-5)


def test_recorded_edges_count_the_same():
    e = uniform_edges(-.123, .456, 40)
    g = binning(e.numpy())
    assert g.scale is not None
    x = torch.randn(50_000)
    assert tensor_stats([x], [g]).hist.equal(tensor_stats([x], [binning(e)]).hist)


@pytest.mark.parametrize('edges', [np.geomspace(1e-3, 10, 41), np.array([-1, 0, 5.]), np.linspace(1, 1+1e-9, 41)])
def test_any_edges_count_exactly(edges): check(torch.randn(20_000), binning(edges))


def test_several_tensors_and_gradients():
    xs = [torch.randn(5000, requires_grad=True), torch.zeros(0), torch.randn(3)]
    s = tensor_stats(xs, [binning(uniform_edges(-1, 1, 7))]*3)
    assert s.hist.shape == (3, 7) and s.numel.tolist() == [5000, 0, 3] and s.mean[1].isnan()


def test_threads_are_restored_after_an_error():
    n = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == n


def test_ranges():
    assert auto_range(torch.ones(64), centre=1.) == (0., 2.)
    lo, hi = auto_range(torch.full((8, 4, 3, 3), .5))
    assert lo < .5 < hi # a range around a constant has some width
    assert auto_range(torch.tensor([NAN]*3)) == (-1., 1.)


@pytest.mark.parametrize('args,text', BAD_RANGES)
def test_errors(args, text):
    with pytest.raises(ValueError, match=text): uniform_edges(*args)


def test_bad_edges():
    with pytest.raises(ValueError, match='one row of at least 2 increasing numbers'): binning([0, 1, 1])


@pytest.mark.parametrize('threads', [2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    n, xs = torch.get_num_threads(), [torch.randn(s) for s in (700_000, 10, 2_300_001, 20_000, 1_000_000)]
    xs[3][5] = NAN
    binnings = [binning(uniform_edges(-3, 3, 40)) for _ in xs]
    try:
        torch.set_num_threads(1)
        one = tensor_stats(xs, binnings)
        torch.set_num_threads(threads)
        many = tensor_stats(xs, binnings)
        assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(n)
    assert all(a.equal(b) for a, b in zip(one, many))
    for x, g in zip(xs, binnings): check(x, g)


class Operations(TorchDispatchMode):
    "Counts operations, and keeps the size of the largest new tensor"
    def __init__(self): super().__init__(); self.n, self.most = 0, 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self.n += 1
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if not isinstance(t, torch.Tensor) or t.untyped_storage().data_ptr() in seen: continue
            self.most = max(self.most, t.untyped_storage().nbytes())
        return out


def operations(xs, bins=40):
    binnings = [binning(uniform_edges(-3, 3, bins))]*len(xs)
    tensor_stats(xs, binnings) # allocate what later calls reuse
    with Operations() as o: tensor_stats(xs, binnings)
    return o


def test_large_tensors_are_not_copied_and_need_14_operations_per_chunk():
    x = torch.randn(6_000_000)
    o = operations([x])
    assert o.most < x.nbytes/8 and o.n <= 14*12+40
    assert operations([x], bins=150).n == o.n


def test_small_tensors_are_counted_together():
    few, many = (operations([torch.randn(100) for _ in range(n)]).n for n in (10, 110))
    assert many-few <= 3*100 # each is detached and viewed twice


@pytest.mark.parametrize('scale', [0., 1e-44, 1e-38, 1e-30, 1e-20, 1e-16])
@pytest.mark.parametrize('shift', [0., 50.])
def test_values_whose_squares_underflow_are_exact_and_fast(scale, shift, monkeypatch):
    x = ((torch.randn(40_000, dtype=torch.float64)+shift)*scale).float()
    monkeypatch.setattr('fastai_bnstats.measure.host._exact', lambda *a: pytest.fail('the slow path was taken'))
    check(x, binning(uniform_edges(-.1, .1, 40)))


@pytest.mark.parametrize('n', [100, 16_384, 100_000])
@pytest.mark.parametrize('lo,hi,scale', [(1e-30, 2e-30, 1e-25), (-1e-30, 1e-30, 1e-20), (1e-38, 2e-38, 1e-33), (-3e-39, 3e-39, 1e-30)])
def test_values_far_outside_of_a_tiny_range(lo, hi, scale, n):
    check((torch.randn(n, dtype=torch.float64)*scale).float(), binning(uniform_edges(lo, hi, 40)))


@pytest.mark.parametrize('n', [100, 16_384])
@pytest.mark.parametrize('bins', [1, 3, 40])
@pytest.mark.parametrize('lo,hi', [(-3e38, 3e38), (-3.4e38, 3.4e38), (0., 3.4e38)])
def test_ranges_as_wide_as_float32(lo, hi, bins, n):
    check((torch.randn(n, dtype=torch.float64)*1e38).float(), binning(uniform_edges(lo, hi, bins)))


@pytest.mark.parametrize('ends', [(-10, 10), (-1, 1), (-3, 5), (0, 1), (-2, 6), (-1e-3, 1e-3)])
def test_zero_on_an_edge_belongs_to_the_bin_above(ends):
    "A ReLU outputs exact zeros, which are not negative"
    e = uniform_edges(*map(float, ends), 40)
    g = binning(e)
    assert g.scale is not None and e[-1] >= ends[1]
    s = tensor_stats([torch.zeros(5)], [g])
    assert s.hist[0].argmax() == np.histogram([0.], np.linspace(*ends, 41))[0].argmax() and s.under == 0
