"""Spikes of a loss: planted ones, a second implementation, and silence about noise"""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastai_bnstats.compare import find_spikes
from fastai_bnstats.compare.spikes import LEAST, MADS, RISE, TIMES, WINDOW


def slowly(loss):
    "The rule in plain words, one loss after the other: (start, peak, n, back) of each spike"
    found, members, i = [], set(), 0
    while i < len(loss):
        past = range(max(0, i-WINDOW), i)
        finite = [loss[k] for k in past if np.isfinite(loss[k])]
        usual = [loss[k] for k in past if np.isfinite(loss[k]) and k not in members]
        i += 1
        if len(finite) < LEAST or len(usual) < LEAST or not np.isfinite(loss[i-1]): continue
        x, mid = loss[i-1], np.median(finite)
        limit = mid+max(MADS*1.4826*np.median([abs(v-mid) for v in finite]), RISE*abs(mid))
        if not (x > limit and x-mid > TIMES*max(abs(v-mid) for v in usual)): continue
        stop = i-1
        while stop < len(loss) and not loss[stop] <= limit: stop += 1 # NaN is not back to normal
        members |= set(range(i-1, stop))
        peak = max((k for k in range(i-1, stop) if np.isfinite(loss[k])), key=lambda k: (loss[k], -k))
        found.append((i-1, peak, stop-i+1, stop < len(loss)))
        i = stop
    return found


usual = st.floats(.5, 1.5)
values = st.one_of(usual, usual, usual, st.sampled_from([np.nan, np.inf, -np.inf, 30., 1e4, 0., -50.]))


@settings(max_examples=150)
@given(st.lists(values, max_size=150))
def test_two_implementations_agree(loss):
    assert [(s.start, s.peak, s.n, s.back) for s in find_spikes(loss)] == slowly(loss)


def noisy(n=300, seed=0, sd=.1): return (1+2*np.exp(-np.arange(n)/50))*np.exp(sd*np.random.default_rng(seed).normal(size=n))


@pytest.mark.parametrize('start, n', [(30, 1), (100, 3), (295, 5), (15, 60)])
def test_a_planted_spike_is_found(start, n):
    loss = noisy()
    loss[start:start+n] = 40
    loss[start+n//2] = 50
    s, = find_spikes(loss)
    assert (s.start, s.peak, s.n, s.back) == (start, start+n//2, n, start+n < 300)
    assert s.usual == np.median(loss[max(0, start-WINDOW):start])


def test_each_of_several_spikes_is_found():
    loss = noisy()
    loss[[60, 65, 70, 200]] *= 10
    assert [s.start for s in find_spikes(loss)] == [60, 65, 70, 200]


def test_a_spike_that_ends_in_nan_does_not_come_back():
    loss = noisy()
    loss[200:210] = 10.**np.arange(1, 11)
    loss[210:] = np.nan
    s, = find_spikes(loss)
    assert (s.start, s.peak, s.n, s.back) == (200, 209, 100, False)


@given(st.integers(0, 20), st.floats(1e-6, 1e6))
@settings(max_examples=20)
def test_the_unit_of_the_loss_does_not_matter(seed, c):
    loss = noisy(seed=seed, sd=.5)
    loss[150] *= 20
    assert [s.start for s in find_spikes(c*loss)] == [s.start for s in find_spikes(loss)]


@given(st.lists(st.floats(0, 1e6), max_size=200))
@settings(max_examples=50)
def test_a_loss_that_only_falls_has_no_spike(loss): assert find_spikes(sorted(loss, reverse=True)) == []


def test_fits_are_judged_apart_even_if_they_are_nested():
    outer, inner, fit = noisy(200, 1), 50*noisy(60, 2), [0]*100+[1]*60+[0]*100
    both = np.r_[outer[:100], inner, outer[100:]]
    assert find_spikes(both, fit) == [] and [s.start for s in find_spikes(both)] == [100]
    both[140] *= 10
    s, = find_spikes(both, fit)
    assert s.start == s.peak == 140


@pytest.mark.parametrize('sd', [.02, .1, .3])
def test_noise_is_no_spike(sd): assert not any(find_spikes(noisy(500, k, sd)) for k in range(20))


@pytest.mark.parametrize('loss', [[], [1.], [np.nan]*100, [np.inf]*100, [2.]*100, [1.]*LEAST+[np.nan], [1.]*(LEAST-1)+[100.], [0.]*100])
def test_nothing_to_find(loss): assert find_spikes(loss) == []


def test_a_rise_of_a_constant_loss_counts_from_a_fifth():
    assert find_spikes([2.]*50+[2.3]) == [] and [s.start for s in find_spikes([2.]*50+[2.5])] == [50]


@pytest.mark.parametrize('loss, fit', [(np.zeros((2, 3)), None), (np.zeros(3), [0, 0]), (1., None)])
def test_shapes_are_checked(loss, fit):
    with pytest.raises(ValueError, match='one loss for each minibatch, and its fit. Found shapes'): find_spikes(loss, fit)


def test_many_losses():
    loss = noisy(25_000, sd=.05)
    loss[[9_999, 20_001]] = 50
    assert [s.start for s in find_spikes(loss)] == [9_999, 20_001]
