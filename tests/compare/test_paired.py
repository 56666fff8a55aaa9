"""Statistics of paired seeds agree with plain enumeration, SciPy, textbooks and simulations"""
import math
import warnings
from dataclasses import FrozenInstanceError, replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from scipy import stats
from helpers import make

from fastai_bnstats.compare import paired
from fastai_bnstats.compare.paired import Paired, bootstrap_band, detectable, holm, least_pairs, paired_test, sign_flip, tost, verdict

rng = lambda s=0: np.random.default_rng(s)
def arm(x): return dict(enumerate(np.asarray(x, float).tolist()))
NUMBERS = 'mean', 'low', 'high', 'p', 't_p', 't_low', 't_high', 'tost_p', 'detectable', 'effect' # of a Paired
def ratio_of(d, **kw): return paired_test(arm(np.exp(d)), arm(np.ones(len(d))), **kw)


# ---- sign flips

def brute(d):
    "p by plain enumeration; whole numbers, so that ties are exact"
    seen = abs(sum(d))
    return sum(abs(sum(e*x for e, x in zip(signs, d, strict=True))) >= seen for signs in product((-1, 1), repeat=len(d)))/2**len(d)


@pytest.mark.parametrize('n', [1, 2, 3, 5, 6, 7, 8, 9])
def test_p_agrees_with_plain_enumeration(n):
    for s in range(8): # few distinct values, so that there are many ties
        d = rng(s).integers(-6, 9, n).tolist()
        assert sign_flip(d)[0] == brute(d), d
        assert sign_flip(np.array(d)*.1)[0] == brute(d), 'a tie is a tie after rounding'


@pytest.mark.parametrize('n', [6, 7, 8, 9, 12])
def test_p_agrees_with_scipy(n):
    for s in range(4):
        d = rng(s).normal(.5, 1, n)
        want = stats.permutation_test((d,), lambda x, axis: x.mean(axis), permutation_type='samples', n_resamples=np.inf, vectorized=True)
        assert sign_flip(d)[0] == pytest.approx(want.pvalue)


@pytest.mark.parametrize('n', [6, 7, 8, 9])
def test_interval_agrees_with_a_scan(n):
    d = rng(n).normal(.3, 1, n)
    _, low, high, exact = sign_flip(d)
    signs = np.array(list(product((-1, 1), repeat=n)))
    def rejects(delta): return np.mean(abs(signs@(d-delta)) >= abs((d-delta).sum())-1e-12) < .05
    assert exact
    for delta in np.r_[np.linspace(d.min()-.5, d.max()+.5, 400), low+1e-6, low-1e-6, high+1e-6, high-1e-6]:
        assert rejects(delta) == (not low <= delta <= high), delta


def test_intervals_of_six_and_eight_pairs():
    d = rng(1).normal(size=6)
    assert sign_flip(d)[1:3] == pytest.approx((d.min(), d.max()))
    d = rng(4).normal(size=8)
    means = np.sort([np.mean([x for i, x in enumerate(d) if a >> i & 1]) for a in range(1, 256)])
    assert sign_flip(d)[1:3] == pytest.approx((means[5], means[-6])) # 2*(1+5) = 12 of 256 are just significant
    assert 12/256 < .05 < 14/256


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=6, max_size=10), st.floats(-50, 50).map(lambda x: round(x, 3)))
def test_zero_is_inside_exactly_when_p_is_not_below_the_level(d, delta):
    d = np.array(d)-delta
    p, low, high, _ = sign_flip(d)
    assert (low <= 0 <= high) == (p >= .05)
    assert low <= d.mean()+1e-9 and high >= d.mean()-1e-9


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=9), st.integers(1, 50))
def test_signs_order_and_unit_do_not_matter(d, unit):
    p, low, high, _ = sign_flip(d)
    q, mlow, mhigh, _ = sign_flip(-np.array(d[::-1])*unit)
    assert p == q and (mlow, mhigh) == pytest.approx((-high*unit, -low*unit), nan_ok=True)


@pytest.mark.parametrize('n', [1, 2, 3, 4, 5])
def test_fewer_than_six_pairs_have_p_but_no_interval(n):
    p, low, high, exact = sign_flip(np.arange(1, n+1))
    assert p == 2/2**n and math.isnan(low) and math.isnan(high) and exact


def test_more_than_16_pairs_are_sampled_and_the_result_says_so():
    for n, mean in ((17, .5), (20, .4), (40, .3), (80, 0.)):
        d = rng(n).normal(mean, 1, n)
        p, low, high, exact = sign_flip(d)
        t = stats.ttest_1samp(d, 0)
        assert not exact and p == pytest.approx(t.pvalue, rel=.25, abs=2e-3) and sign_flip(d)[:3] == (p, low, high)
        assert (low, high) == pytest.approx(tuple(t.confidence_interval()), abs=.1*d.std()) and (low <= 0 <= high) == (p >= .05)
        assert sign_flip(d+100)[0] > 0, 'the signs that were seen count'
    assert sign_flip(rng(0).normal(size=16))[3]


def test_sampled_signs_agree_with_all_of_them(monkeypatch):
    d = rng(3).normal(.4, 1, 16)
    whole = sign_flip(d)
    monkeypatch.setattr(paired, 'MAX_EXACT_PAIRS', 15)
    paired._subset_weights.cache_clear()
    some = sign_flip(d)
    paired._subset_weights.cache_clear()
    assert not some[3] and some[0] == pytest.approx(whole[0], abs=.01) and some[1:3] == pytest.approx(whole[1:3], abs=.03)


def test_sampled_subsets_come_with_their_complements(monkeypatch):
    for exact, n in ((16, 20), (5, 6), (6, 7), (7, 8), (8, 9)): # few pairs, so that the empty and the full set are drawn repeatedly
        monkeypatch.setattr(paired, 'MAX_EXACT_PAIRS', exact)
        paired._subset_weights.cache_clear()
        w = paired._subset_weights(n)
        a = w > 0
        codes, rest = a@2**np.arange(n), ~a@2**np.arange(n)
        assert a[-1].all() and not (codes[:-1] == 2**n-1).any() and (codes > 0).all() and sorted(codes[:-1]) == sorted(rest[:-1])
        np.testing.assert_allclose(w.sum(1), 1)
    paired._subset_weights.cache_clear()


@pytest.mark.parametrize('bad', [[], [1, np.nan], [1, np.inf], [[1, 2]], 3.])
def test_sign_flip_needs_one_number_per_seed(bad):
    with pytest.raises(ValueError, match='Expected one finite difference per seed. Found .*: use paired_test'): sign_flip(bad)


NOISE = {'normal': lambda r, s: r.normal(size=s), 't3': lambda r, s: r.standard_t(3, s), 'uniform': lambda r, s: r.uniform(-1, 1, s),
         'skewed arms': lambda r, s: r.exponential(size=s)-r.exponential(size=s)}


@pytest.mark.parametrize('noise', NOISE)
@pytest.mark.parametrize('n, level', [(6, 2/64), (8, 12/256)])
def test_size_and_coverage_are_exact_under_the_null(noise, n, level):
    N = 4000
    res = np.array([sign_flip(d)[:3] for d in NOISE[noise](rng(n), (N, n))])
    rejected, outside = (res[:, 0] < .05).sum(), ((res[:, 1] > 0)|(res[:, 2] < 0)).sum()
    assert level <= .05 and rejected == outside
    # the number of rejections is binomial(N, level) exactly, for any symmetric distribution
    # both tails at 1e-4, so 16 such checks fail by chance once in 600
    low, high = stats.binom.ppf([1e-4, 1-1e-4], N, level)
    assert low <= rejected <= high
    assert rejected/N <= .05+3*math.sqrt(.05*.95/N) and 1-outside/N >= .94


def test_power_at_the_detectable_difference():
    n, N = 10, 1500
    found = np.mean([sign_flip(d)[0] < .05 for d in rng(0).normal(detectable(n, 1), 1, (N, n))])
    assert .72 < found < .84


def test_minibatches_are_not_independent_samples():
    x = rng(0).normal(size=(2, 300, 180))
    for t in range(1, 180): x[..., t] = .95*x[..., t-1]+x[..., t]*math.sqrt(1-.95**2)
    assert (stats.ttest_ind(x[0], x[1], axis=1).pvalue < .05).mean() > .6
    with pytest.raises(TypeError, match='not independent samples'): paired_test(x[0, 0], x[1, 0])


# ---- many claims

def test_holm_by_hand():
    np.testing.assert_allclose(holm([.01, .04, .03, .005]), [.03, .06, .06, .02])
    np.testing.assert_allclose(holm([.5, np.nan, .01]), [1, 1, .03])
    assert holm([]).shape == (0,) and holm([.02]).tolist() == [.02]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_agrees_with_the_step_down_procedure(ps):
    adj = holm(ps)
    assert (adj >= ps).all() and (adj <= 1).all()
    order = np.argsort(ps)
    assert (np.diff(adj[order]) >= 0).all()
    rejected = set() # as Holm defines it: stop at the first p that is too large
    for i, k in enumerate(order):
        if not (len(ps)-i)*ps[k] < .05: break
        rejected.add(int(k))
    assert {i for i, a in enumerate(adj) if a < .05} == rejected


@pytest.mark.parametrize('bad, text', [([.1, 1.5], r'between 0 and 1. Found \[1.5\]'), ([-.1], 'between 0 and 1'), ([[.1]], 'shape')])
def test_holm_refuses(bad, text):
    with pytest.raises(ValueError, match=text): holm(bad)


def test_more_claims_need_more_pairs():
    assert [least_pairs(m) for m in (1, 2, 3, 4, 5, 10, 20)] == [6, 7, 7, 8, 8, 9, 10]
    for m in (1, 2, 5, 10):
        d = np.arange(1., least_pairs(m)+1)
        assert m*sign_flip(d)[0] < .05 <= m*sign_flip(d[1:])[0]
    for kw in (dict(m=0), dict(alpha=0), dict(alpha=1)):
        with pytest.raises(ValueError, match='Expected m of at least 1 and 0 < alpha < 1. Found m='): least_pairs(**kw)


def test_no_false_verdict_among_five_claims_in_more_than_5_percent():
    N, n = 2000, 8
    template = ratio_of(rng(0).normal(size=n))
    def false_verdicts(ds): # five measures of the same arms, which depend on each other
        rs = [replace(template, differences=d, mean=d.mean(), p=sign_flip(d)[0], tost_p=1.) for d in ds]
        return any(verdict(r, p) in ('supported', 'contradicted') for r, p in zip(rs, holm([r.p for r in rs]), strict=True))
    for share in (0., .7):
        r = rng(1)
        common, own = r.normal(size=(N, 1, n)), r.normal(size=(N, 5, n))
        wrong = sum(false_verdicts(ds) for ds in math.sqrt(share)*common+math.sqrt(1-share)*own)
        assert wrong <= stats.binom.ppf(1-1e-4, N, .05), wrong # the true rate is at most .05: Holm's bound
    assert wrong > 0


# ---- equality and power

@settings(deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=3, max_size=12), st.floats(-3, -.01), st.floats(.01, 3))
def test_equivalence_agrees_with_the_90_percent_interval(d, low, high):
    assume(np.ptp(d) > 1e-3)
    ci = stats.ttest_1samp(d, 0).confidence_interval(.9)
    assume(min(abs(ci.low-low), abs(ci.high-high)) > 1e-9)
    assert (tost(d, low, high) < .05) == (low < ci.low and ci.high < high)


def test_tost_without_spread_or_pairs():
    assert tost([.01]*6, -.1, .1) == 0 and tost([.2]*6, -.1, .1) == 1 and tost([0.]*6, -.1, .1) == 0
    assert math.isnan(tost([.1], -1, 1)) and math.isnan(tost([.1, np.nan], -1, 1))
    with pytest.raises(ValueError, match='Expected a margin from low to high. Found 1 to -1'): tost([.1, .2], 1, -1)


def power(n, size, alpha, N=20000, seed=1):
    "Share of samples in which the sign-flip test finds a mean of `size` standard deviations, by plain enumeration"
    signs = np.array(list(product((-1, 1), repeat=n)))
    hits = 0
    for x in np.array_split(rng(seed).normal(size, 1, (N, n)), 10):
        sums = x@signs.T
        hits += ((np.abs(sums) >= np.abs(x.sum(1))[:, None]-1e-12).mean(1) < alpha).sum()
    return hits/N


@pytest.mark.parametrize('n, alpha', [(6, .05), (8, .05), (8, .01), (9, .01), (11, .05)])
def test_detectable_is_the_power_of_the_test_that_decides(n, alpha):
    assert power(n, detectable(n, 1, alpha), alpha) == pytest.approx(.8, abs=.012) # sampling: .003 for each of the two simulations
    assert power(n, .9*detectable(n, 1, alpha), alpha) < .77


def test_eight_pairs_find_less_than_a_t_test_promises():
    from scipy.optimize import brentq
    n, alpha = 8, .01
    def t_power(d):
        t = stats.t.ppf(1-alpha/2, n-1)
        return stats.nct.sf(t, n-1, d*n**.5)-.8
    promised = brentq(t_power, .1, 9)
    assert promised == pytest.approx(1.60, abs=.02) and detectable(n, 1, alpha) == pytest.approx(1.91, abs=.03)


def test_detectable_scales_and_refuses():
    assert detectable(8, 3.) == pytest.approx(3*detectable(8, 1.)) and detectable(8, 0.) == 0
    assert detectable(8, 1, alpha=.01) > detectable(8, 1) > detectable(8, 1, power=.5)
    assert math.isnan(detectable(1, 1)) and math.isnan(detectable(6, math.nan))
    assert detectable(7, 1, .01) == math.inf and detectable(5, 1) == math.inf # too few pairs for this test
    assert .9 < detectable(20, 1)/(2.8016/20**.5) < 1.1 # with many pairs: that of a normal distribution
    for kw in (dict(alpha=0), dict(power=1), dict(alpha=.9)):
        with pytest.raises(ValueError, match='0 < alpha < power < 1'): detectable(6, 1, **kw)
    with pytest.raises(ValueError, match='at least 0'): detectable(6, -1)


# ---- bands

def test_band_is_pointwise_and_agrees_with_scipy():
    x = rng(0).normal(size=(12, 5))
    band = bootstrap_band(x, n=20000)
    ci = stats.bootstrap((x,), np.mean, axis=0, method='percentile', n_resamples=20000, rng=rng(0)).confidence_interval
    np.testing.assert_allclose(band, [ci.low, ci.high], atol=.02)
    assert (bootstrap_band(x, .5)[0] > bootstrap_band(x)[0]).all()
    assert (bootstrap_band(x) == bootstrap_band(x)).all() and (bootstrap_band(x) != bootstrap_band(x, seed=1)).any()
    assert bootstrap_band(x[:, 0]).shape == (2,) and bootstrap_band(x.reshape(12, 5, 1)).shape == (2, 5, 1)


def test_band_leaves_out_gaps():
    x = rng(0).normal(size=(6, 4))
    x[0, 1], x[1:, 2], x[:, 3] = np.nan, np.inf, np.nan
    band = bootstrap_band(x)
    assert np.isfinite(band[:, :2]).all() and np.isnan(band[:, 2:]).all() and (band[0, :2] <= np.nanmean(x[:, :2], 0)).all()
    assert np.isnan(bootstrap_band(x[:1])).all()
    for bad, kw, text in ((3., {}, 'seeds'), (np.zeros((0, 3)), {}, 'seeds'), (x, dict(level=95), 'between 0 and 1')):
        with pytest.raises(ValueError, match=text): bootstrap_band(bad, **kw)


# ---- two arms

def test_a_ratio_compares_geometric_means():
    a, b = {s: math.exp(x) for s, x in enumerate(rng(0).normal(1, 1, 7))}, {s: math.exp(x) for s, x in enumerate(rng(1).normal(0, 1, 9))}
    r = paired_test(a, b)
    assert r.seeds == tuple(range(7)) and r.n == 7 and r.exact and r.reason == ''
    assert r.margin == pytest.approx((math.log(.8), math.log(1.25)))
    d = np.log([a[s]/b[s] for s in range(7)])
    np.testing.assert_allclose(r.differences, d)
    t = stats.ttest_1samp(d, 0)
    assert (r.p, r.low, r.high) == pytest.approx(sign_flip(d)[:3])
    assert (r.t_p, r.t_low, r.t_high) == pytest.approx((t.pvalue, *t.confidence_interval(.95)))
    assert r.mean == pytest.approx(d.mean()) and r.interval == pytest.approx(tuple(np.exp([r.low, r.high])))
    assert r.effect == pytest.approx(stats.gmean([a[s] for s in range(7)])/stats.gmean([b[s] for s in range(7)]))
    assert r.tost_p == tost(d, *r.margin) and r.detectable == pytest.approx(detectable(7, d.std(ddof=1)))
    five = paired_test(a, b, m=5)
    assert five.detectable == pytest.approx(detectable(7, d.std(ddof=1), .01)) and five.detectable > r.detectable
    assert all(type(getattr(r, f)) is float for f in NUMBERS)


def test_a_difference_and_its_opposite():
    a, b = arm(rng(0).normal(.1, 1, 8)), arm(rng(1).normal(0, 1, 8))
    r, q = paired_test(a, b, 'difference', (-.5, .5)), paired_test(dict(reversed(b.items())), a, 'difference', (-.5, .5))
    assert r.effect == r.mean == pytest.approx(np.mean([a[s]-b[s] for s in a])) and r.interval == (r.low, r.high) and r.margin == (-.5, .5)
    assert q.seeds == r.seeds and (q.p, q.t_p, q.tost_p) == pytest.approx((r.p, r.t_p, r.tost_p))
    assert (q.mean, q.low, q.high) == pytest.approx((-r.mean, -r.high, -r.low))


def test_seeds_are_matched_by_name_and_numbers_can_have_any_type():
    a = {3: np.float32(2), 4: torch.tensor(4.), 2: np.array(8), 9: 1, 'x': 5, True: True} # the key True equals 1
    b = {2: 4, 1: 1, 3: 1., 4: 1, 10: 3, 'x': np.int64(5)}
    r = paired_test(a, b)
    assert set(r.seeds) == {1, 2, 3, 4, 'x'}
    assert dict(zip(r.seeds, np.exp(r.differences), strict=True)) == pytest.approx({3: 2, 1: 1, 4: 4, 2: 2, 'x': 1})
    assert paired_test({2: 1, 0: 1}, {0: 1, 2: 1}).seeds == (0, 2)
    assert paired_test({'a': True, 'b': np.True_}, {'a': False, 'b': False}, 'difference', (-1, 1)).mean == 1


def test_no_seed_in_common():
    with pytest.raises(ValueError, match=r'Found \[0, 1\] in a, \[2\] in b: train both arms with the same seeds'):
        paired_test({0: 1, 1: 1}, {2: 1})
    with pytest.raises(ValueError, match=r'Found \[\] in a'): paired_test({}, {2: 1})


@pytest.mark.parametrize('bad, found', [
    (np.zeros(180), 'an array of length 180 as arm a'), (np.zeros((3, 180)), r'an array of shape \(3, 180\)'),
    ([1., 2.], 'a list of length 2'), ((1,), 'a tuple of length 1'), (torch.zeros(7), 'a Tensor of length 7'),
    (3., 'a float as arm'), (np.array(3.), 'an array as arm'),
    (None, 'a NoneType'), ('abc', 'a str of length 3'), ({0: np.zeros(180), 1: 2.}, 'an array of length 180 for seed 0 as arm a'),
    ({0: 1., 'x': [1, 2]}, "a list of length 2 for seed 'x'"), ({0: np.zeros(1)}, 'an array of length 1 for seed 0'),
    ({0: '3'}, 'a str of length 1 for seed 0'), ({0: None}, 'a NoneType for seed 0'), ({0: 1j}, 'a complex for seed 0'),
    ({0: np.array('a')}, 'an array for seed 0')])
def test_anything_but_one_number_per_seed_is_refused(bad, found):
    good = {0: 1., 1: 2.}
    with pytest.raises(TypeError, match='Expected one number per seed.*'+found): paired_test(bad, good)
    why = 'arm b. Successive minibatches .* not independent samples.*Reduce each run to one number first.*train more seeds'
    with pytest.raises(TypeError, match=why): paired_test(good, bad)


def test_recordings_are_refused():
    rec = make(fits=(('freeze', 2),), P=3)
    with pytest.raises(TypeError, match=f'a Recording of length {len(rec)} as arm a'): paired_test(rec, rec)
    with pytest.raises(TypeError, match='a Recording of length .* for seed 0'): paired_test({0: rec}, {0: rec})


@pytest.mark.parametrize('value', [0., -1., math.nan, math.inf, -math.inf])
def test_a_diverged_run_is_not_left_out(value):
    a, b = arm(np.arange(1., 8)), arm(np.full(7, .2))
    r = paired_test({**a, 3: value}, b)
    assert r.reason == f'seed 3: not a positive finite number (a={value:g}, b=0.2)'
    assert r.n == 7 and np.isnan(r.differences).tolist() == [s == 3 for s in range(7)]
    assert all(math.isnan(getattr(r, f)) for f in NUMBERS) and 'seed 3' in repr(r)
    assert holm([r.p]) == 1 and verdict(r, .001) == 'undecided'
    both = paired_test({**a, 3: value}, {**b, 5: value})
    assert 'seed 3' in both.reason and '; seed 5: not a positive finite number (a=6, b=' in both.reason


def test_a_difference_can_be_zero_or_negative_but_not_infinite():
    b = arm(np.zeros(6))
    assert paired_test(arm([-1, 0, 1, 2, 3, 4]), b, 'difference', (-1, 1)).reason == ''
    assert paired_test(arm([-1, 0, 1, 2, 3, math.inf]), b, 'difference', (-1, 1)).reason == 'seed 5: not a finite number (a=inf, b=0)'


def test_huge_ratios_do_not_overflow():
    r = paired_test(arm([1e300]*6), arm([1e-300]*6))
    assert r.mean == pytest.approx(600*math.log(10)) and r.effect == math.inf and r.reason == '' and 'inf' in repr(r)


@pytest.mark.parametrize('factor, t_p, tost_p', [(1., 1, 0), (1.05, 0, 0), (3., 0, 1)])
def test_arms_with_equal_ratios(factor, t_p, tost_p):
    b = rng(0).uniform(1, 9, 6)
    r = paired_test(arm(b*factor), arm(b))
    assert (r.t_p, r.tost_p, r.detectable) == (t_p, tost_p, 0) and r.p == (1 if factor == 1 else 2/64)
    assert (r.t_low, r.t_high, r.low, r.high) == pytest.approx([math.log(factor)]*4)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8), st.floats(1e-6, 1e6), st.floats(0, 1e-10))
def test_no_input_causes_a_warning(xs, factor, noise):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        r = paired_test(arm(xs), arm([x*factor*(1+noise*i) for i, x in enumerate(xs)]))
    assert not r.reason and 0 <= r.p <= 1 and repr(r)


def test_one_pair():
    r = paired_test({4: 2.}, {4: 1.})
    assert (r.seeds, r.n, r.p, r.reason) == ((4,), 1, 1, '') and r.effect == pytest.approx(2) and '1 seed;' in repr(r)
    assert all(math.isnan(getattr(r, f)) for f in ('low', 'high', 't_p', 't_low', 't_high', 'tost_p', 'detectable'))
    assert verdict(r, 1., math.nan) == 'undecided'


@pytest.mark.parametrize('kw, text', [
    (dict(scale='log'), "'ratio', 'odds ratio', 'difference', 'rank'. Found 'log'"),
    (dict(margin=(1.1, 2)), 'contain 1, which means no effect'),
    (dict(scale='difference', margin=(.9, 1.1)), r'contain 0.*Found \(0.9, 1.1\): pass margin= on the scale of the difference'),
    (dict(scale='rank', margin=(-1, 1)), r'Ranks have no equivalence margin. Found margin=\(-1, 1\): leave it out'),
    (dict(margin=(-.1, 1.1)), 'low must be above 0'), (dict(margin=(.9, math.inf)), 'finite'), (dict(margin=.9), 'low, high'),
    (dict(m=0), 'at least 1. Found 0'), (dict(alpha=0), '0 < alpha')])
def test_wrong_settings_are_refused(kw, text):
    with pytest.raises(ValueError, match=text): paired_test(arm([1, 2, 3]), arm([2, 2, 2]), **kw)


def test_a_result_is_immutable_and_has_a_readable_repr():
    r = ratio_of(np.log([.5, .6, .7, .55, .62, .58, .61, .66]))
    assert repr(r).startswith('Paired(a/b 0.6 [0.5') and 'p=0.00781 (exact), 8 seeds' in repr(r)
    assert 'equivalence within 0.8 to 1.25' in repr(r) and 'detectable ×' in repr(r)
    with pytest.raises(FrozenInstanceError): r.p = 0
    with pytest.raises(ValueError, match='read-only'): r.differences[0] = 0
    assert '±' in repr(paired_test(arm([1, 2, 3]), arm([0, 0, 1]), 'difference', (-1, 1))) and isinstance(r, Paired)


def test_verdicts():
    up = ratio_of(np.linspace(.2, .5, 8))
    assert verdict(up, .01) == 'supported' and verdict(up, .01, direction=-1) == 'contradicted' and verdict(up, .05) == 'undecided'
    assert verdict(up, 1., .04) == 'negligible'
    assert verdict(up, 1., .05) == verdict(up, 1., math.nan) == verdict(up, math.nan) == 'undecided'
    assert verdict(up, .01, .01) == 'negligible' # significant, although too small to matter
    with pytest.raises(ValueError, match="direction must be 1 .* Found 'up'"): verdict(up, .01, direction='up')


def test_scales():
    a, b = {s: 2.+s for s in range(8)}, {s: 1. for s in range(8)}
    odds, ratio, diff = (paired_test(a, b, k) for k in ('odds ratio', 'ratio', 'difference'))
    assert odds.effect == ratio.effect and odds.margin == ratio.margin and 'odds ratio a/b' in repr(odds)
    assert diff.margin is None and math.isnan(diff.tost_p) and 'equivalence' not in repr(diff)
    assert paired_test(a, b, 'difference', (-1, 1)).tost_p > .5


# ---- runs that diverged count as worse than all others

def test_ranks_agree_with_scipy_and_know_infinity():
    a, b = {0: 3., 1: math.inf, 2: 1., 3: math.inf}, {0: 1., 1: 2., 2: 5., 3: math.inf}
    r = paired_test(a, b, 'rank')
    ranks = stats.rankdata([3, 1e9, 1, 1e9, 1, 2, 5, 1e9])
    assert r.differences.tolist() == (ranks[:4]-ranks[4:]).tolist() and r.margin is None and not r.reason
    assert r.p == brute((2*r.differences).astype(int).tolist())
    assert 'ranks of a-b' in repr(r) and verdict(r, 1., r.tost_p) == 'undecided'
    assert 'seed 1: not a finite number' in paired_test({**a, 1: math.nan}, b, 'rank').reason


def test_runs_that_diverge_in_one_arm_are_found_however_small_the_others_are():
    b = {s: 1+.1*s for s in range(8)}
    a = {**{s: 1.01+.1*s for s in range(3)}, **dict.fromkeys(range(3, 8), math.inf)}
    r = paired_test(a, b, 'rank')
    assert r.p == 2/256 and verdict(r, r.p) == 'supported' and verdict(r, r.p, direction=-1) == 'contradicted'
    healthy = paired_test({s: .9*b[s] if math.isinf(a[s]) else a[s] for s in b}, b) # the part before the divergence would look better
    assert healthy.effect < 1


@pytest.mark.slow
@pytest.mark.parametrize('chance', [.2, .5])
def test_ranks_with_infinite_values_keep_the_level(chance):
    N, n, r = 2000, 8, rng(5)
    x = np.where(r.random((N, 2, n)) < chance, np.inf, r.normal(size=(N, 2, n)))
    hits = sum(paired_test(arm(a), arm(b), 'rank').p < .05 for a, b in x)
    assert hits <= stats.binom.ppf(1-1e-4, N, .05)


def many_tosts(ds, low, high):
    "`tost` of each row, much faster"
    ps = np.maximum(stats.ttest_1samp(ds, low, axis=-1, alternative='greater').pvalue,
                    stats.ttest_1samp(ds, high, axis=-1, alternative='less').pvalue)
    for d, p in [*zip(np.reshape(ds, (-1, np.shape(ds)[-1])), ps.ravel())][::97]: assert tost(d, low, high) == pytest.approx(p, rel=1e-9)
    return ps


def false_words(mean, claims=5, n=8, N=1500, share=.5, spread=.1):
    "How often at least one of several claims gets each word, where all effects have this mean (log scale)"
    words, r = dict(supported=0, contradicted=0, negligible=0), rng(3)
    template = ratio_of(r.normal(size=n))
    data = [mean+spread*(share**.5*r.normal(size=n)+(1-share)**.5*r.normal(size=(claims, n))) for _ in range(N)]
    for ds, tosts in zip(data, many_tosts(data, *template.margin), strict=True):
        rs = [replace(template, differences=d, mean=d.mean(), p=sign_flip(d)[0], tost_p=t) for d, t in zip(ds, tosts)]
        found = {verdict(x, p, e) for x, p, e in zip(rs, holm([x.p for x in rs]), holm(tosts))}
        for w in words: words[w] += w in found
    return words, N


@pytest.mark.slow
@pytest.mark.parametrize('share', [0, .5, .9])
def test_no_false_negligible_among_five_claims_in_more_than_5_percent(share):
    "At the margin, where it is hardest"
    for margin in (math.log(1.25), math.log(.8)):
        words, N = false_words(margin, share=share)
        assert words['negligible'] <= stats.binom.ppf(1-1e-4, N, .05)
    uncorrected = many_tosts(math.log(1.25)+.1*rng(3).normal(size=(1500, 8)), math.log(.8), math.log(1.25)) < .05
    assert 1-(1-np.mean(uncorrected))**5 > .15 # what five independent claims without correction would give


def test_an_effect_well_inside_the_margin_is_found_negligible():
    words, N = false_words(0, spread=.05)
    assert words['negligible'] > .95*N and words['supported']+words['contradicted'] < .05*N


def test_verdict_needs_a_result_and_a_p():
    r = paired.paired_test({s: 1.+s for s in range(6)}, {s: 1. for s in range(6)})
    with pytest.raises(TypeError, match='verdict expects a result of paired_test. Found 3: call paired_test first'): paired.verdict(3, .1)
    for p in (-1, 5):
        with pytest.raises(ValueError, match='between 0 and 1. Found p_adj='): paired.verdict(r, p)
        with pytest.raises(ValueError, match='between 0 and 1. Found tost_adj='): paired.verdict(r, .1, p)
    with pytest.raises(ValueError, match=r'one difference per seed. Found shape \(2, 2\): reduce each run'):
        paired.tost([[1, 2], [2, 3.]], -1, 1)
    with pytest.raises(ValueError, match='whole number of pairs. Found 8.7'): paired.detectable(8.7, 1)
