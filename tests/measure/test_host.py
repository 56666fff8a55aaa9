"""`tensor_stats` counts exactly as NumPy does in float64"""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from torch.utils._python_dispatch import TorchDispatchMode

from fastai_bnstats.measure import compiled, host
from fastai_bnstats.measure.edges import auto_range, bin_starts, check_edges, line_through, uniform_edges
from fastai_bnstats.measure.host import tensor_stats

SETTINGS = settings(max_examples=150, deadline=None)
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NAN, INF = float('nan'), float('inf')
VIEWS = dict(channels_last=lambda x: x.to(memory_format=torch.channels_last), slices=lambda x: x[::2, :, 1:],
             transposed=lambda x: x.transpose(0, 3), expanded=lambda x: x.expand(64, 32, 9, 9), scalar=lambda x: x[0, 0, 0, 0],
             negative=lambda x: torch._neg_view(x), gaps=lambda x: x[:, ::2])
BAD_RANGES = [((0, 1, 0), 'bins must be at least 1'), ((1, 1, 4), 'finite lo < hi'), ((NAN, 1, 4), 'finite lo < hi'),
              ((0, INF, 4), 'finite lo < hi'),
              ((1., 1+1e-15, 40), r'no 41 different edges.*over the range .1.0, 1.00.*pass another range=, or fewer bins'),
              ((-1e308, 1e308, 2), 'no 3 different edges')]


def check(x, e):
    "Every count equals NumPy's over the same edges, and every element is counted once"
    s = tensor_stats([x], [e])
    v = x.detach().double().reshape(-1).numpy()
    fin = v[np.isfinite(v)]
    assert (s.hist[0].numpy() == np.histogram(fin, e)[0]).all()
    assert (s.under[0], s.over[0], s.nonfinite[0], s.numel[0]) == ((fin < e[0]).sum(), (fin > e[-1]).sum(), len(v)-len(fin), len(v))
    assert s.hist.sum()+s.under.sum()+s.over.sum()+s.nonfinite.sum() == len(v)
    if len(fin):
        assert s.mean[0] == pytest.approx(fin.mean(), rel=1e-5, abs=1e-6*np.abs(fin).max())
        assert s.var[0] == pytest.approx(fin.var(), rel=1e-5, abs=max(1e-300, 1e-25*np.square(fin).max()))
    else: assert s.mean[0].isnan() and s.var[0].isnan()


def around(e, dtype=np.float32):
    "The edges as numbers of `dtype`, and both neighbours of each"
    with np.errstate(over='ignore'): e = np.asarray(e).astype(dtype)
    return torch.tensor(np.concatenate([e, np.nextafter(e, dtype(-INF)), np.nextafter(e, dtype(INF))]))


# --- edges
@SETTINGS
@given(lo=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6), bins=st.integers(1, 300), dtype=st.sampled_from([np.float32, np.float64]))
def test_values_on_edges_and_beside_them(lo, width, bins, dtype):
    e = uniform_edges(lo, lo+width, bins)
    assert np.array_equal(e, np.linspace(lo, lo+width, bins+1))
    x = around(e, dtype)
    check(x, e)
    check(x.repeat(10_000//len(x)+1), e)


@SETTINGS
@given(e=st.lists(st.floats(-1e38, 1e38), min_size=2, max_size=30, unique=True).map(sorted),
       dtype=st.sampled_from([np.float32, np.float64]))
def test_any_increasing_edges(e, dtype): check(around(e, dtype), check_edges(e))


@SETTINGS
@given(e=st.lists(st.floats(-1e39, 1e39), min_size=2, max_size=9, unique=True).map(sorted), x=st.floats(width=32, allow_nan=False))
def test_a_float32_is_compared_with_starts_as_with_edges(e, x):
    starts, e = bin_starts(np.array(e)), np.array(e)
    assert starts.dtype == np.float32
    assert ((starts <= np.float32(x))[:-1] == (e[:-1] <= x)).all() and (starts[-1] <= np.float32(x)) == (e[-1] < x)


@SETTINGS
@given(lo=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6), bins=st.integers(1, 5000), seed=st.integers(0, 99))
def test_a_guess_is_never_wrong_by_more_than_it_says(lo, width, bins, seed):
    "In float32, where the guess rounds most"
    e = uniform_edges(lo, lo+width, bins)
    shift, scale, error, bits = compiled.fixed_point(*line_through(e), bins)
    if not error: return
    x = (lo+width*np.random.default_rng(seed).random(1000)).astype(np.float32)
    truth = (x.astype(np.longdouble)-e[0])*bins/(np.longdouble(e[-1])-e[0])*2**bits+2**bits
    inside = (x >= e[0]) & (x <= e[-1])
    guess = x*np.float32(scale)+np.float32(shift)
    assert np.abs(np.trunc(guess)-truth)[inside].max(initial=0) <= error


def test_old_edges_which_float32_rounded_still_get_a_guess():
    "Recordings of earlier versions have edges that are not quite equally spaced"
    e = np.linspace(-.123, .456, 41).astype(np.float32)
    e[1:] = np.nextafter(e[1:], np.float32(INF))
    e = e.astype(float)
    assert compiled.fixed_point(*line_through(e), 40)[2]
    check(torch.cat([torch.randn(50_000), around(e)]), e)


@pytest.mark.parametrize('edges', [np.geomspace(1e-3, 10, 41), np.array([-1, 0, 5.]), np.linspace(1, 1+1e-9, 41),
                                   np.geomspace(1e-3, 1, 200), np.array([-INF, 0, 1]), np.array([0, 1, INF])])
def test_edges_without_a_guess(edges):
    assert not compiled.fixed_point(*line_through(edges), len(edges)-1)[2]
    check(torch.randn(20_000), edges)


@pytest.mark.parametrize('ends', [(-10, 10), (-1, 1), (-3, 5), (0, 1), (-2, 6), (-1e-3, 1e-3), (-.3, .7)])
def test_zeros_of_a_relu_are_counted_as_numpy_does(ends): check(torch.zeros(5), uniform_edges(*map(float, ends), 40))


def test_ranges():
    assert auto_range(torch.ones(64), centre=1.) == (0., 2.)
    lo, hi = auto_range(torch.full((8, 4, 3, 3), .5))
    assert lo < .5 < hi # a range around a constant has some width
    assert auto_range(torch.tensor([NAN]*3)) == (-1., 1.)


@pytest.mark.parametrize('args,text', BAD_RANGES)
def test_errors(args, text):
    with pytest.raises(ValueError, match=text): uniform_edges(*args)


@pytest.mark.parametrize('edges,found', [([0, 1, 1], '1 at edge 2 after 1'), ([0, NAN, 1], 'NaN at edge 1'), ([[0, 1]], r'shape \(1, 2\)'),
                                         ([0], r'shape \(1,\)'), ([-1e308, 1e308, INF, INF], 'inf at edge 3 after inf')])
def test_bad_edges(edges, found):
    error = f'one row of at least 2 increasing numbers. Found {found}: pass'
    with pytest.raises(ValueError, match=error): tensor_stats([torch.ones(3)], [edges])


# --- values
@SETTINGS
@given(x=hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, max_side=12), elements=st.floats(width=32)),
       bins=st.integers(1, 100))
def test_any_small_tensor(x, bins): check(torch.tensor(x), uniform_edges(-3, 3, bins))


@SETTINGS
@given(n=st.integers(1, 40000), sd=st.floats(1e-6, 1e6), shift=st.sampled_from([0., 1., 30., 10000.]),
       bins=st.sampled_from([1, 2, 40, 62, 63, 180, 1000]), seed=st.integers(0, 99), dtype=st.sampled_from(DTYPES))
def test_any_large_tensor(n, sd, shift, bins, seed, dtype):
    x = ((torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)+shift)*sd).to(dtype)
    e = uniform_edges(*auto_range(x[:100][None], 3.), bins)
    check(torch.cat([x, around(e).to(dtype)]), e)


@pytest.mark.parametrize('bad', [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize('bins', [40, 100])
def test_one_bad_value_among_many(bad, bins):
    x = torch.randn(2**20+4097) # two parts
    x[77] = bad
    check(x, uniform_edges(-2, 2, bins))


@pytest.mark.parametrize('dtype', DTYPES)
def test_nothing_but_bad_values(dtype): check(torch.tensor([NAN, INF, -INF]*9000, dtype=dtype), uniform_edges(-2, 2, 40))


@pytest.mark.parametrize('n', [1, 2, 1023, 1024, 1025, 2047, 8000, 2**20-1, 2**20, 2**20+1, 2**21+1])
def test_sizes_around_those_of_chunks_and_parts(n):
    check(torch.randn(n, generator=torch.Generator().manual_seed(0)), uniform_edges(-2, 2, 40))


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.bool])
def test_other_types_of_numbers(dtype): check(torch.arange(300).to(dtype), uniform_edges(0, 9, 3))


def test_large_whole_numbers_keep_all_their_digits():
    x = torch.tensor([2**40, 2**40+1])
    assert tensor_stats([x], [uniform_edges(2**40-.5, 2**40+1.5, 2)]).hist.tolist() == [[1, 1]]


def test_denormals_and_zeros(): check(torch.tensor([0., -0., 1e-45, -1e-45, 1e-39]*2000), uniform_edges(0, 1, 40))


@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
def test_any_stride(view): check(view(torch.randn(64, 32, 9, 9)), uniform_edges(-2, 2, 40))


@pytest.mark.parametrize('n', [1000, 100_000, 3_000_000])
@pytest.mark.parametrize('mean', [1., 1e4, -1e5])
def test_the_mean_may_be_far_larger_than_the_deviation(mean, n):
    wide = torch.randn(n, dtype=torch.float64)+mean
    for x in (wide, wide.float()):
        s = tensor_stats([x], [uniform_edges(mean-5, mean+5, 40)])
        assert s.var[0] == pytest.approx(x.double().var(correction=0).item(), rel=1e-9)


def test_an_outlier_at_the_start_costs_few_digits():
    "Sums are taken around the first value"
    x = torch.randn(2_000_000)
    x[0] = 1e6
    s = tensor_stats([x], [uniform_edges(-5, 5, 40)])
    assert s.var[0] == pytest.approx(x.double().var(correction=0).item(), rel=1e-7)


def test_equal_values_have_no_variance():
    s = tensor_stats([torch.full((3_000_001,), .1)], [uniform_edges(0, 1, 40)])
    assert (s.mean[0], s.var[0]) == (float(np.float32(.1)), 0)


@pytest.mark.parametrize('scale', [0., 1e-44, 1e-38, 1e-30, 1e-20, 1e-16])
@pytest.mark.parametrize('shift', [0., 50.])
def test_values_whose_squares_float32_can_not_hold(scale, shift):
    x = ((torch.randn(40_000, dtype=torch.float64)+shift)*scale).float()
    check(x, uniform_edges(-.1, .1, 40))
    v = x.double().numpy()
    assert tensor_stats([x], [uniform_edges(-.1, .1, 40)]).var[0] == pytest.approx(v.var(), rel=1e-9, abs=0)


@pytest.mark.parametrize('n', [100, 16_384, 100_000])
@pytest.mark.parametrize('lo,hi,scale', [(1e-30, 2e-30, 1e-25), (-1e-30, 1e-30, 1e-20), (1e-38, 2e-38, 1e-33), (-3e-39, 3e-39, 1e-30),
                                         (1e-45, 4e-45, 1e-44)])
def test_values_far_outside_of_a_tiny_range(lo, hi, scale, n):
    check((torch.randn(n, dtype=torch.float64)*scale).float(), uniform_edges(lo, hi, 40))


@pytest.mark.parametrize('n', [100, 16_384])
@pytest.mark.parametrize('bins', [1, 3, 40])
@pytest.mark.parametrize('lo,hi', [(-3e38, 3e38), (-3.4e38, 3.4e38), (0., 3.4e38), (-1e39, 1e39)])
def test_ranges_as_wide_as_float32(lo, hi, bins, n):
    check((torch.randn(n, dtype=torch.float64)*1e38).float(), uniform_edges(lo, hi, bins))


# --- many tensors
def test_several_tensors_and_gradients():
    xs = [torch.randn(5000, requires_grad=True), torch.zeros(0), torch.randn(3)]
    s = tensor_stats(xs, [uniform_edges(-1, 1, 7)]*3)
    assert s.hist.shape == (3, 7) and s.numel.tolist() == [5000, 0, 3] and s.mean[1].isnan() and s.var[1].isnan()


@pytest.mark.parametrize('threads', [2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    n, xs = torch.get_num_threads(), [torch.randn(s) for s in (700_000, 10, 2_300_001, 20_000, 1_000_000)]
    xs[3][5] = NAN
    edges = [uniform_edges(-3, 3, 40) for _ in xs]
    try:
        torch.set_num_threads(1)
        one = tensor_stats(xs, edges)
        torch.set_num_threads(threads)
        many = tensor_stats(xs, edges)
        assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(n)
    assert all(a.equal(b) for a, b in zip(one, many))
    for x, e in zip(xs, edges): check(x, e)


def test_parts_start_with_the_largest_and_run_in_several_threads(monkeypatch):
    import threading
    seen, both = [], threading.Barrier(2, timeout=600)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    def task(n): return n, lambda: (seen.append(n), n > 5 and both.wait()) # the two large ones wait for each other
    host.run_all([task(1), task(host.PART+1), task(3), task(host.PART)])
    assert sorted(seen[:2]) == [host.PART, host.PART+1] and seen[2:] == [3, 1]


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    def fail(): raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError): host.run_all([(host.PART, fail), (host.PART, lambda: None)])


class LargestNew(TorchDispatchMode):
    "Keeps the size of the largest new tensor"
    most = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        seen = {t.untyped_storage().data_ptr() for t in (*args, *(kwargs or {}).values()) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in seen:
                self.most = max(self.most, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('view', [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x.to(memory_format=torch.channels_last)])
def test_large_tensors_are_not_copied(dtype, view):
    x = view(torch.randn(1000, 600, 2, 5).to(dtype))
    with LargestNew() as new: tensor_stats([x], [uniform_edges(-3, 3, 40)])
    assert new.most <= host.PART*4 # of shorter types, a part at a time is widened


@pytest.mark.parametrize('first', [NAN, INF])
def test_bad_first_values_cost_no_digits(first):
    x = torch.randn(100_000, dtype=torch.float64)+1e6
    x[0] = first
    s = tensor_stats([x], [uniform_edges(1e6-5, 1e6+5, 40)])
    assert s.var[0] == pytest.approx(x[1:].var(correction=0).item(), rel=1e-8)


@pytest.mark.parametrize('n', [100, 200_000])
def test_different_numbers_of_bins(n):
    xs, text = [torch.randn(n)]*2, 'same number of bins. Found 4 and 400: choose edges with one bins='
    with pytest.raises(ValueError, match=text): tensor_stats(xs, [uniform_edges(-3, 3, 4), uniform_edges(-3, 3, 400)])


def test_no_tensors(): assert tensor_stats([], []).hist.shape == (0, 1)


def test_no_layout_needs_a_new_kernel():
    f = compiled.kernel('count', np.float32)
    n = len(f.signatures)
    x = torch.randn(40, 6)
    for v in (x[::2], x[..., 0], x.flatten()[::2], x[:1, :1].expand(40, 6), x.T): check(v, uniform_edges(-2, 2, 4))
    assert len(f.signatures) == n


def test_another_default_device():
    x = torch.randn(50)
    with torch.device('meta'): s = tensor_stats([x, x[:0]], [uniform_edges(-2, 2, 4)]*2)
    assert s.numel.tolist() == [50, 0]


def test_threads_wait_for_the_next_step(monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 8)
    pools = []
    real = host._pool
    monkeypatch.setattr(host, '_pool', lambda *a: pools.append(real(*a)) or pools[-1])
    for n in (10, 3, 10, 3): host.run_all([(host.PART, lambda: None)]*n)
    assert len(set(map(id, pools))) == 1
