"""Distances and measures agree with SciPy, NumPy and cases calculated by hand"""
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance

from fastai_bnstats.compare import measures as C
from fastai_bnstats.recording import Recording, empty_recording, full_counts, shares, total_variation

EDGES = np.linspace(-1, 1, 11)


def recording(values, fit=None, epoch=None, quantity='weights', edges=EDGES, every=1, **arrays):
    "A recording of `values` (T,P,n), made with NumPy"
    values = np.asarray(values, float)
    T, P, n = values.shape
    fin = np.isfinite(values)
    count = lambda v: np.histogram(v[np.isfinite(v)], edges)[0]
    fit = np.zeros(T, int) if fit is None else np.asarray(fit)
    epoch = np.zeros(T, int) if epoch is None else np.asarray(epoch)
    batch = np.array([sum((fit[:i] == fit[i]) & (epoch[:i] == epoch[i])) for i in range(T)])
    clean = np.where(fin, values, np.nan)
    none = np.zeros(0, int)
    base = dict(
        names=np.array([f'{i}.weight' for i in range(P)]), edges=np.tile(edges, (P, 1)),
        hist=np.array([[count(v) for v in row] for row in values]),
        under=(clean < edges[0]).sum(-1), over=(clean > edges[-1]).sum(-1), nonfinite=(~fin).sum(-1), numel=np.full((T, P), n),
        mean=np.nanmean(clean, -1), var=np.nanvar(clean, -1),
        step=np.arange(T)*every, fit=fit, epoch=epoch, batch=batch, phase=np.array([f'fit{f}' for f in fit]),
        stepped=np.ones(T, bool), trainable=np.ones((T, P), bool), lr=np.full((T, 1), .1),
        loss=np.linspace(2, 1, T), loss_step=np.arange(T), loss_fit=fit, loss_epoch=epoch, loss_batch=batch,
        valid_loss=np.zeros(0), valid_step=none, valid_fit=none, valid_epoch=none, valid_batch=none, valid_n=none,
        meta=dict(quantity=quantity, phases=[f'fit{i}' for i in range(fit.max()+1)], every=every))
    return Recording(**{**base, **arrays})


rng = np.random.default_rng(0)


# --- distances

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32-1), st.floats(.05, .4), st.floats(-.3, .3))
def test_w1_agrees_with_scipy_to_one_bin(seed, scale, shift):
    r = np.random.default_rng(seed)
    x, y = (np.clip(r.normal(m, s, (2, 3, 200)), -1, 1) for m, s in ((0, .2), (shift, scale)))
    w = (recording(x)-recording(y)).distance('w1')
    for t in range(2):
        for p in range(3): assert abs(w[t, p]-wasserstein_distance(x[t, p], y[t, p])) <= .2+1e-12 # the width of a bin


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32-1))
def test_distances_of_counts_agree_with_scipy(seed):
    r = np.random.default_rng(seed)
    x, y = r.normal(0, .6, (2, 2, 50)), r.normal(.2, .7, (2, 2, 50)) # some lie outside the edges
    x[0, 0, :3], y[1, 1, :2] = np.nan, np.inf
    a, b = recording(x), recording(y)
    d, (ca, cb) = a-b, (full_counts(v) for v in (a, b))
    at = np.r_[-1, (EDGES[1:]+EDGES[:-1])/2, 1]
    for t in range(2):
        for p in range(2):
            assert d.distance('w1')[t, p] == pytest.approx(wasserstein_distance(at, at, ca[t, p, :-1], cb[t, p, :-1]))
            assert d.distance('tv')[t, p] == pytest.approx(np.abs(ca[t, p]/50-cb[t, p]/50).sum()/2)
            assert d.distance('js')[t, p] == pytest.approx(jensenshannon(ca[t, p], cb[t, p], base=2))
    for k in C.DISTANCES: # zero to itself, and symmetric
        assert not np.nan_to_num((a-a).distance(k)).any()
        np.testing.assert_allclose(d.distance(k), (b-a).distance(k), atol=1e-12)
    assert (d.distance('tv') <= 1).all() and (d.distance('js') <= 1+1e-12).all()


def test_total_variation_is_the_share_that_moved():
    a, b = recording(rng.normal(0, .3, (3, 2, 100))), recording(rng.normal(0, .4, (3, 2, 100)))
    np.testing.assert_allclose((a-b).distance('tv'), (a-b).moved())
    np.testing.assert_array_equal(a.distance('tv', since=1), a.moved(1)) # bit-identical


def test_total_variation_of_shares_and_of_counts():
    counts = np.array([[1, 3, 0], [2, 0, 2], [0, 0, 0]])
    np.testing.assert_array_equal(shares(counts), [[.25, .75, 0], [.5, 0, .5], [np.nan]*3])
    assert total_variation(counts[0], counts[1]) == 3 and total_variation(*shares(counts[:2])) == .75
    assert np.isnan(total_variation(*shares(counts[1:])))


def test_w1_of_a_shift_is_its_size():
    x = np.repeat(np.array([[[-.5]], [[-.3]], [[.5]]]), 10, -1)
    assert recording(x).distance().ravel().tolist() == pytest.approx([0, .2, 1])
    assert recording(x).distance(since=-1).ravel().tolist() == pytest.approx([1, .8, 0])
    assert recording(x).distance('js').ravel().tolist() == pytest.approx([0, 1, 1])


def test_tensors_of_different_sizes_are_compared_by_shares():
    a, b = recording(np.zeros((1, 1, 10))), recording(np.zeros((1, 1, 30)))
    assert [float((a-b).distance(k)[0, 0]) for k in C.DISTANCES] == [0, 0, 0]


def test_without_elements_there_is_no_distance():
    a = replace(recording(np.zeros((1, 1, 4))), hist=np.zeros((1, 1, 10), int), numel=np.zeros((1, 1), int))
    assert all(np.isnan((a-a).distance(k)).all() and np.isnan(a.distance(k)).all() for k in C.DISTANCES)
    assert empty_recording(['w'], EDGES[None]).distance().shape == (0, 1)


def test_distances_refuse():
    a = recording(np.zeros((1, 1, 4)))
    with pytest.raises(ValueError, match="kind must be 'w1' .*, 'tv' .* or 'js' .*Found 'kl'"): (a-a).distance('kl')
    other = recording(np.zeros((1, 1, 4)), edges=EDGES*2)
    with pytest.raises(ValueError, match=r'different bin edges in 1 of 1 layers.*range=first_recording'): (a-other).distance()


def test_a_difference_keeps_both_recordings():
    a, b = recording(rng.normal(0, .6, (3, 2, 50))), recording(rng.normal(0, .6, (3, 2, 50)))
    d = a-b
    np.testing.assert_array_equal(d.a, full_counts(a)); np.testing.assert_array_equal(d.b, full_counts(b))
    for k in ('hist', 'under', 'over', 'nonfinite'):
        np.testing.assert_array_equal(getattr(d, k), getattr(a, k).astype(np.int64)-getattr(b, k))
    np.testing.assert_array_equal(d.numel, a.numel)


# --- change of variance

def test_log_var_change_ignores_scale_and_stops_between_fits():
    x = rng.normal(0, .2, (6, 2, 100))
    r = recording(x, fit=[0, 0, 0, 1, 1, 1])
    c = C.log_var_change(r)
    np.testing.assert_allclose(np.delete(c, 2, 0), np.delete(np.diff(np.log(x.var(-1)), axis=0), 2, 0))
    assert np.isnan(c[2]).all()
    np.testing.assert_allclose(C.log_var_change(recording(3*x, fit=[0, 0, 0, 1, 1, 1])), c, atol=1e-12)
    np.testing.assert_allclose(C.change_size(r), np.nanmedian(np.abs(c), 0))


def test_variance_zero_has_no_logarithm():
    x = rng.normal(0, .2, (4, 2, 50)); x[:, 1] = .5
    assert np.isnan(C.log_var_change(recording(x))[:, 1]).all()
    assert np.isfinite(C.change_size(recording(x))).tolist() == [True, False]


def test_roughness_is_the_von_neumann_ratio():
    x = rng.normal(size=50)
    assert C.roughness(x[:, None])[0] == pytest.approx(((x[1:]-x[:-1])**2).sum()/49/(((x-x.mean())**2).sum()/50))
    assert np.isnan(C.roughness(np.ones((5, 1)))[0]) and np.isnan(C.roughness(np.full((5, 1), np.nan))[0])
    gap = np.r_[x, np.nan, x]
    d = np.r_[np.diff(x), np.diff(x)]
    assert C.roughness(gap[:, None])[0] == pytest.approx((d**2).mean()/np.r_[x, x].var()) # no difference across the gap


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32-1), st.floats(-100, 100), st.floats(.01, 100))
def test_roughness_ignores_level_and_scale(seed, level, scale):
    x = np.random.default_rng(seed).normal(size=(30, 2))
    np.testing.assert_allclose(C.roughness(level+scale*x), C.roughness(x), rtol=1e-6)
    assert (C.roughness(x) < 4*30/29).all()


# --- lengths

def updates(w, fit=None, **kw):
    "The recording of updates of one tensor with the successive values `w` (T+1, n)"
    n, steps = lambda v: np.linalg.norm(v, axis=-1)[:, None], np.diff(w, axis=0)
    norms = dict(norm=n(w[1:]), step_norm=n(steps), fit_norm=n(w[1:]-w[0]), start_norm=np.full((len(w)-1, 1), np.linalg.norm(w[0])))
    return recording(steps[:, None], fit, quantity='updates', **norms, **kw)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32-1), st.sampled_from([1e-6, 1e-3, .1, 1]))
def test_lengths_and_angle_agree_with_the_vectors(seed, size):
    r = np.random.default_rng(seed)
    w = np.cumsum(np.r_[[r.normal(size=8)], size*r.normal(size=(5, 8))], 0)
    rec = updates(w)
    unit = lambda v: v/np.linalg.norm(v)
    angle = 2*np.arctan2(np.linalg.norm(unit(w[-1])-unit(w[0])), np.linalg.norm(unit(w[-1])+unit(w[0]))) # Kahan: accurate at all angles
    assert C.angle(rec)[0] == pytest.approx(angle, rel=1e-6, abs=1e-9)
    assert C.displacement(rec)[0] == pytest.approx(np.linalg.norm(w[-1]-w[0])/np.linalg.norm(w[0]))
    assert C.path_length(rec)[0] == pytest.approx(sum(np.linalg.norm(b-a)/np.linalg.norm(b) for a, b in pairwise(w)))


def test_lengths_ignore_scale():
    w = np.cumsum(rng.normal(size=(6, 8)), 0)
    for f in (C.path_length, C.displacement, C.angle): assert f(updates(w))[0] == pytest.approx(f(updates(7*w))[0])


def test_a_right_angle_and_a_half_turn():
    assert C.angle(updates(np.array([[1., 0], [0, 2]])))[0] == pytest.approx(np.pi/2)
    assert C.angle(updates(np.array([[1., 0], [-3, 0]])))[0] == pytest.approx(np.pi)
    assert C.angle(updates(np.array([[1., 0], [5, 0]])))[0] == 0


def test_lengths_refuse():
    w = np.cumsum(rng.normal(size=(5, 3)), 0)
    for f in (C.path_length, C.displacement, C.angle):
        with pytest.raises(ValueError, match='Expected a recording of updates. Found one of weights: record with UpdateHistCallback'):
            f(recording(np.zeros((2, 1, 3))))
        with pytest.raises(ValueError, match=r'Expected updates of one fit. Found 2 fits: select one with rec.sel\(fit=1\)'):
            f(updates(w, fit=[0, 0, 1, 1]))
        with pytest.raises(ValueError, match='Expected a recording with rows. Found none: select more rows'): f(updates(w).sel(step=[]))
    with pytest.raises(ValueError, match=r'Found gaps \(every=5\): record with every=1'): C.path_length(updates(w, every=5))
    with pytest.raises(ValueError, match='path_length needs every step. Found gaps'): C.path_length(updates(w).sel(step=[0, 3]))
    assert C.displacement(updates(w).sel(step=[0, 3]))[0] == C.displacement(updates(w))[0]
    zero = np.zeros((3, 2))
    assert np.isnan([f(updates(zero))[0] for f in (C.path_length, C.displacement, C.angle)]).all()


# --- losses, gradients

def losses(x):
    "A recording of one fit with the training losses `x`"
    i, zero = np.arange(len(x)), np.zeros(len(x), int)
    return replace(recording(np.zeros((1, 1, 2))), loss=np.asarray(x, float), loss_step=i, loss_fit=zero, loss_epoch=zero, loss_batch=i)


def test_variability_measures_noise_and_ignores_trend():
    x = rng.normal(0, .1, 20000)
    assert C.loss_variability(losses(x), log=False) == pytest.approx(.01, rel=.05)
    assert C.loss_variability(losses(np.linspace(100, 0, 20000)+x), log=False) == pytest.approx(.01, rel=.05)
    assert C.loss_variability(losses(np.exp(np.linspace(5, 0, 20000)+x))) == pytest.approx(.01, rel=.05) # noise in proportion to the loss
    assert np.isnan(C.loss_variability(losses([1.]))) and C.loss_variability(losses([1, 3]), log=False) == 2
    assert C.loss_variability(losses([1, np.e])) == pytest.approx(.5) and np.isnan(C.loss_variability(losses([1, -1])))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32-1), st.floats(.01, 100))
def test_the_variability_of_the_log_loss_ignores_its_unit(seed, unit):
    x = np.random.default_rng(seed).gamma(2, size=30)
    assert C.loss_variability(losses(unit*x)) == pytest.approx(C.loss_variability(losses(x)))


def test_a_few_large_losses_fool_the_variability_of_the_loss_but_not_that_of_its_logarithm():
    "Two series with the same noise; three minibatches of one have a loss that is 20 times as large"
    a, b = np.exp(rng.normal(0, .5, (2, 300)))
    heavy = b.copy()
    heavy[[50, 130, 250]] *= 20
    def ratio(**kw): return C.loss_variability(losses(heavy), **kw)/C.loss_variability(losses(a), **kw)
    d = np.diff(heavy)**2
    assert np.sort(d)[-6:].sum()/d.sum() > .8 # six differences are most of the number
    assert ratio(log=False) > 10 and ratio() < 2


def test_training_loss_is_compared_within_fits():
    r = replace(recording(np.zeros((6, 1, 2)), fit=[0, 0, 0, 1, 1, 1]), loss=np.array([1, 2, 1, 100, 102, 100.]))
    assert C.loss_variability(r, log=False) == pytest.approx((1+1+4+4)/4/2)
    assert C.loss_variability(r) == pytest.approx((2*np.log(2)**2+2*np.log(1.02)**2)/4/2)
    assert np.isnan(C.loss_variability(r.sel(step=[0])))


def test_validation_loss_is_compared_at_the_same_minibatch():
    i = np.arange(6) # 3 epochs of 2 minibatches, one hard and one easy; the last epoch in another fit
    r = replace(recording(np.zeros((1, 1, 2))), valid_loss=np.array([10, 1, 12, 2, 50, 50.]), valid_fit=np.array([0, 0, 0, 0, 1, 1]),
                valid_epoch=np.array([0, 0, 1, 1, 0, 0]), valid_batch=i % 2, valid_step=i, valid_n=np.full(6, 8))
    assert C.loss_variability(r, valid=True, log=False) == pytest.approx((4+1)/2/2)
    assert C.loss_variability(r, valid=True) == pytest.approx((np.log(1.2)**2+np.log(2)**2)/2/2)


@pytest.mark.parametrize('su, sv', [(.3, .1), (.1, .3), (.2, .2), (.3, 0), (0, .3)])
def test_the_part_of_the_variability_that_is_not_shared(su, sv):
    "Where the minibatches make most of the noise, the unshared part still shows which run is noisier"
    shared, u, v = rng.normal(size=(3, 20000))
    a, b = np.exp(shared+su*u), np.exp(shared+sv*v)
    assert C.unshared_variability(a, b) == pytest.approx((su**2-sv**2)/(su**2+sv**2), abs=.15)
    assert C.unshared_variability(b, a) == pytest.approx(-C.unshared_variability(a, b))
    assert C.loss_variability(losses(a))/C.loss_variability(losses(b)) == pytest.approx((1+su**2)/(1+sv**2), rel=.03) # hardly differs


def test_unshared_variability_refuses_and_has_no_value():
    assert np.isnan(C.unshared_variability([1, 2, 3], [1, 2, 3])) # the same run twice
    assert C.unshared_variability([1, 2, 1], [2, 2, 2]) == 1 and C.unshared_variability([2, 2, 2], [1, 2, 1]) == -1
    for a, b in (([1, 2], [1, 2, 3]), ([[1, 2]], [[1, 2]])):
        with pytest.raises(ValueError, match='compares losses at the same minibatches. Found shapes'): C.unshared_variability(a, b)


def gradients(x, quantity='gradients'): return recording(x, quantity=quantity)


def test_sizes_of_gradients():
    x = rng.normal(0, 1, (5, 3, 400))*np.array([1, .1, .01])[None, :, None]
    np.testing.assert_allclose(C.grad_rms(gradients(x)), np.median(np.sqrt((x**2).mean(-1)), 0))
    x[1:3, 2] = 0
    assert C.zero_share(gradients(x)) == 2/15 and np.isnan(C.zero_share(gradients(x).sel(step=[])))
    for f in (C.grad_rms, C.zero_share):
        with pytest.raises(ValueError, match='Expected a recording of gradients. Found one of weights: record with GradHistCallback'):
            f(recording(x))


def test_relative_gradients():
    "The norm of the gradient times the norm of the weights"
    w, g = rng.normal(0, .2, (4, 3, 50)), rng.normal(0, .01, (4, 3, 50))
    want = np.linalg.norm(w, axis=-1)*np.linalg.norm(g, axis=-1)
    np.testing.assert_allclose(C.relative_grad(gradients(g), recording(w)), want)
    np.testing.assert_allclose(C.relative_grad(gradients(g, 'output_gradients'), gradients(w, 'outputs')), want)
    with pytest.raises(ValueError, match='gradients go with weights. Found a recording of outputs: pass one of weights'):
        C.relative_grad(gradients(g), gradients(w, 'outputs'))
    with pytest.raises(ValueError, match='output gradients go with outputs. Found a recording of weights'):
        C.relative_grad(gradients(g, 'output_gradients'), recording(w))
    for sel in (dict(layers=[0, 1]), dict(step=[0])):
        with pytest.raises(ValueError, match='the same layers and steps. Found others: select the same of both'):
            C.relative_grad(gradients(g), recording(w).sel(**sel))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32-1), st.floats(-5, 5))
def test_the_slope_over_depth_is_that_of_the_logarithm(seed, slope):
    r = np.random.default_rng(seed)
    level, n = r.normal(0, 3, 7)[:, None], r.integers(2, 9)
    assert C.depth_slope(np.exp(level+slope*np.linspace(0, 1, n))) == pytest.approx(slope, abs=1e-9)


def test_the_slope_over_depth_without_a_line():
    assert np.isnan(C.depth_slope(np.zeros((3, 4)))) and np.isnan(C.depth_slope([[1, 0], [np.nan, 1]]))
    assert C.depth_slope([[1, 0, np.e], [1, np.nan, np.e]]) == pytest.approx(1) # 0 and NaN are left out
    for bad in (np.ones(3), np.ones((2, 1))):
        with pytest.raises(ValueError, match='at least 2 layers. Found shape'): C.depth_slope(bad)


def depth_ratio(grads):
    "A reading that is easily fooled: the RMS of all deeper layers relative to the first"
    r = np.maximum(grads.rms, 1e-38)
    return C.geometric_mean(np.median(r[:, 1:]/r[:, :1], 0))


def test_a_change_of_scale_fools_the_ratio_to_the_first_layer_but_not_the_slope():
    "Weights 8 times as large before batch norm: the same function, with gradients 8 times as small"
    w, g = rng.normal(0, .2, (5, 4, 50)), rng.normal(0, .01, (5, 4, 50))
    k = np.array([8, 1, 1, 1.])[None, :, None]
    assert depth_ratio(gradients(g/k)) == pytest.approx(8*depth_ratio(gradients(g)))
    slopes = [C.depth_slope(C.relative_grad(gradients(g/f), recording(w*f))) for f in (1, k)]
    assert slopes[1] == pytest.approx(slopes[0])


def test_a_dead_layer_fools_the_ratio_to_the_first_layer_but_not_the_slope():
    "A middle layer is dead, so all layers before it have gradients of exactly 0"
    w, g = rng.normal(0, .2, (5, 6, 50)), rng.normal(0, .01, (5, 6, 50))
    dead = g.copy()
    dead[:, :3] = 0
    assert depth_ratio(gradients(dead)) > 1e14 # "gradients grow after the first layer"
    assert abs(C.depth_slope(C.relative_grad(gradients(dead), recording(w)))) < .5 and C.zero_share(gradients(dead)) == .5


def test_drift_and_noise():
    "Drift without noise is large and smooth; noise without drift is large and rough"
    t, noise = np.linspace(0, 1, 400)[:, None], rng.normal(0, .02, (400, 1))
    def series(log_var): return replace(recording(np.zeros((400, 1, 2))), var=np.exp(log_var))
    drift, rough = series(4*t), series(noise)
    assert C.drift_share(drift)[0] == pytest.approx(1) and C.drift_share(rough)[0] < .1
    assert .4 < C.change_size(drift)[0]/C.change_size(rough)[0] < 1 # the size hardly tells them apart
    bent = series(4*t+t**2)
    assert C.roughness(C.log_var_change(bent))[0] < .01 and C.roughness(C.log_var_change(rough))[0] > 2
    r = C.log_var_change(rough)
    assert C.drift_share(rough)[0] == pytest.approx(abs(r.sum())/np.abs(r).sum())
    assert np.isnan(C.drift_share(series(0*t))[0])


def test_geometric_mean():
    assert C.geometric_mean([1, 10, 100]) == pytest.approx(10) and C.geometric_mean(3) == pytest.approx(3)
    for bad in ([1, np.nan], [1, 0], [1, -1], [1, np.inf], []): assert np.isnan(C.geometric_mean(bad))


def test_a_change_per_step_needs_every_step():
    thin = recording(rng.normal(0, .2, (6, 2, 50)), every=5)
    for f in (C.log_var_change, C.change_size):
        with pytest.raises(ValueError, match='needs a row for every step. Found one row in 5 steps: record with every=1'): f(thin)


def test_wrong_arguments_are_refused():
    r = recording(rng.normal(0, .2, (6, 2, 50)))
    with pytest.raises(ValueError, match=r'one series per layer.*Found shape \(6,\): pass log_var_change'): C.roughness(np.arange(6.))
    with pytest.raises(ValueError, match='Found a Recording'): C.roughness(r)
    with pytest.raises(TypeError, match='one number per layer. Found a Recording: pass a measure of it'): C.geometric_mean(r)
    with pytest.raises(IndexError, match='Expected a row from -6 to 5. Found since=99: choose another row'): r.distance(since=99)
    with pytest.raises(ValueError, match=r"different layers: \['1.weight'\] are not in both"): r-r.sel(layers=0)
