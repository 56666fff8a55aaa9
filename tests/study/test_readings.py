"""Each run as a few numbers: they agree with NumPy, mean what the claim says, and say when a run diverged"""
import json
import math

import numpy as np
import pytest
import torch
from dataclasses import replace
from fastai.basics import nn
from helpers import loaders, make, tiny_learner

from fastai_bnstats.compare import depth_slope, grad_rms, relative_grad, zero_share
from fastai_bnstats.record import ActivationHistCallback, GradHistCallback, OutputGradHistCallback, WeightHistCallback
from fastai_bnstats.study import load_runs
from fastai_bnstats.study.readings import READINGS, divergence, run_readings
from fastai_bnstats.study.results import QUANTITIES, load_run

SHOWN = 20 # layers in the figures; shortcuts are hidden


def npz(folder, arm, quantity, seed=0):
    with np.load(folder/f'source0/seed{seed}'/arm/f'{quantity}.npz') as z: return {k: z[k] for k in z.files}


def mean_log(x): return float(np.exp(np.log(x).mean()))


def test_readings_are_those_of_plain_numpy(study):
    "Computed from the files of the study with NumPy only"
    for arm in ('naive_bn', 'freeze'):
        r = load_runs(study)[arm][0]['readings']
        w, g, u, o, og = (npz(study, arm, q) for q in QUANTITIES)
        last = w['fit'] == w['fit'].max()
        shown = np.array(['idconv' not in n and '.idpath' not in n for n in w['names']])
        assert shown.sum() == SHOWN
        rows = np.ix_(np.flatnonzero(last), np.flatnonzero(shown))
        for x, name in ((w, ''), (o, 'output_')):
            change = np.diff(np.log(x['var'][rows]), axis=0)
            assert r[f'{name}change_size'] == pytest.approx(mean_log(np.median(np.abs(change), 0)))
            assert r[f'{name}roughness'] == pytest.approx(mean_log([((d[1:]-d[:-1])**2).mean()/d.var() for d in change.T]))
            raw = np.diff(x['var'][rows], axis=0)
            assert r[f'{name}change_size_raw'] == pytest.approx(mean_log(np.median(np.abs(raw), 0)))
            assert r[f'{name}roughness_raw'] == pytest.approx(mean_log([((d[1:]-d[:-1])**2).mean()/d.var() for d in raw.T]))
            assert r[f'{name}drift'] == pytest.approx(np.median(np.abs(change.sum(0))/np.abs(change).sum(0)))
        for grads, values, name in ((g, w, ''), (og, o, 'output_')):
            rms = [np.sqrt(x['mean']**2+x['var'])[rows] for x in (grads, values)]
            assert r[f'{name}grad_rms'] == pytest.approx(mean_log(np.median(rms[0], 0)))
            norms = rms[0]*rms[1]*grads['numel'][rows]
            line = np.stack([np.linspace(0, 1, SHOWN), np.ones(SHOWN)], 1)
            slopes = [np.linalg.lstsq(line, np.log(x), rcond=None)[0][0] for x in norms]
            assert r[f'{name}grad_slope'] == pytest.approx(np.median(slopes)) and r[f'{name}grad_zero'] == 0
            slopes = [np.linalg.lstsq(line, np.log(x), rcond=None)[0][0] for x in rms[0]]
            assert r[f'{name}grad_slope_raw'] == pytest.approx(np.median(slopes))
        loss = w['loss'][w['loss_fit'] == w['loss_fit'].max()]
        assert r['loss_var'] == pytest.approx((np.diff(np.log(loss))**2).mean()/2)
        assert r['loss_var_raw'] == pytest.approx((np.diff(loss)**2).mean()/2)
        assert r['first_loss'] == loss[0] and r['final_train'] == pytest.approx(loss.mean()) # one epoch
        ulast = (u['fit'] == u['fit'].max()) & (u['epoch'] < 3)
        body = np.array([n.startswith('0.') and k == 'weight' and '.idpath' not in n for n, k in zip(u['names'], u['kind'])])
        norm = np.array([n.startswith('0.') and k in ('gamma', 'beta') for n, k in zip(u['names'], u['kind'])])
        head = u['names'] == '1.2.weight'
        assert body.sum() == 19 and norm.sum() == 44
        for part, sel in (('body', body), ('head', head)):
            assert r[f'path_{part}'] == pytest.approx(mean_log((u['step_norm']/u['norm'])[ulast][:, sel].sum(0)))
            start, end, way = (u[k][ulast][-1][sel] for k in ('start_norm', 'norm', 'fit_norm'))
            assert r[f'displacement_{part}'] == pytest.approx(mean_log(way/start))
            cosine = (start**2+end**2-way**2)/(2*start*end)
            assert r[f'angle_{part}'] == pytest.approx(mean_log(np.arccos(np.clip(cosine, -1, 1))), rel=1e-4)
        assert r['displacement_body_raw'] == pytest.approx(mean_log(u['fit_norm'][ulast][-1][body]))
        trained = [k in ('weight', 'bias', 'gamma', 'beta') for k in u['kind']]
        far = (u['fit_norm']/u['start_norm'])[u['fit'] == u['fit'].max()][-1][trained]
        assert r['farthest'] == pytest.approx(np.nanmax(far))
        content = json.loads((study/f'source0/seed0/{arm}/result.json').read_text())
        final, n = content['epochs'][-1], w['valid_n'][w['valid_fit'] == w['valid_fit'].max()].sum()
        wrong = round(n*(1-final['accuracy']))
        assert r['accuracy'] == final['accuracy'] and r['error_odds'] == pytest.approx((wrong+.5)/(n-wrong+.5))
        assert r['final_valid'] == pytest.approx(final['valid_loss'], rel=1e-5)
        np.testing.assert_allclose(np.array(content['losses'].split(), float), loss, rtol=1e-4)


def test_the_variability_of_the_validation_loss_is_that_of_the_validation_loss():
    rec = make(fits=(('freeze', 2), ('unfreeze', 3)))
    rec = replace(rec, valid_loss=np.array([9., 8, .5, .4, .6])) # one minibatch for each epoch
    r = run_readings(dict(weights=rec), [dict(accuracy=.5)])
    assert r['valid_var'] == pytest.approx((np.diff(np.log([.5, .4, .6]))**2).mean()/2) # of the last phase
    loss = rec.loss[rec.loss_fit == 1]
    assert r['loss_var'] == pytest.approx((np.diff(np.log(loss))**2).mean()/2)


def test_readings_in_the_file_are_those_of_the_recordings(study):
    for arm in ('naive_nobn', 'freeze_non_bn'):
        run = load_runs(study)[arm][0]
        recs = {q: load_run(study, arm, quantity=q) for q in QUANTITIES}
        again = run_readings(recs, run['epochs'], run['diverged'])
        for k in READINGS: np.testing.assert_equal(run['readings'][k], again[k] if math.isfinite(again[k]) else math.nan)


def test_a_ratio_of_accuracies_hides_a_tenfold_error():
    "99.3 % against 90.8 % of 143 pictures"
    def odds(k):
        rec = replace(make(fits=(('naive', 1),)), valid_n=np.array([143]))
        return run_readings(dict(weights=rec), [dict(accuracy=1-k/143)])
    many, few = odds(13), odds(1)
    assert .9 < many['accuracy']/few['accuracy'] < 1/.9 # a margin of 10 % calls this no difference
    assert many['error_odds'] == 13.5/130.5 and many['error_odds']/few['error_odds'] > 9
    assert odds(0)['error_odds'] == .5/143.5 # no error at all


# ---- gradients of real networks

RECORDERS = dict(gradients=GradHistCallback, weights=WeightHistCallback,
                 output_gradients=OutputGradHistCallback, outputs=ActivationHistCallback)


def one_step(model, dls=None):
    "Recordings of the first minibatch; a learning rate of 0, so that the network stays as it is"
    cbs = {q: c() for q, c in RECORDERS.items()}
    tiny_learner(model, dls or loaders(16, 16), cbs=list(cbs.values())).fit(1, 0.)
    return {q: c.recording.sel(layers='*.conv*') for q, c in cbs.items()}


class Net(nn.Module):
    "Five convolutions, each with a batch norm layer unless it is folded into them"
    def __init__(self, bn=True):
        super().__init__()
        for i in range(5):
            setattr(self, f'l{i}', nn.ModuleDict(dict(conv=nn.Conv2d(3 if i == 0 else 4, 4, 3, padding=1, bias=not bn),
                                                      bn=nn.BatchNorm2d(4, eps=1e-12) if bn else nn.Identity())))
        self.head = nn.Linear(4, 2)
    def forward(self, x):
        for i in range(5): x = getattr(self, f'l{i}')['bn'](getattr(self, f'l{i}')['conv'](x)).relu()
        return self.head(x.mean((2, 3)))


def net(scale=1., dead=None):
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.l0['conv'].weight.mul_(scale)
        if dead is not None:
            model.get_submodule(f'l{dead}.bn').bias.fill_(-100.) # the ReLU gives 0 only
            model.get_submodule(f'l{dead+1}.bn').bias.fill_(1.)
    return model


def readings(recs):
    return {q: (relative_grad(recs[q], recs[v]), grad_rms(recs[q])) for q, v in (('gradients', 'weights'), ('output_gradients', 'outputs'))}


def test_convolutions_before_batch_norm_can_have_any_scale():
    "The first convolution 8 times as large: the same function, gradients 8 times as small, the same reading"
    a, b = readings(one_step(net())), readings(one_step(net(8)))
    for q in a:
        np.testing.assert_allclose(b[q][0], a[q][0], rtol=1e-3)
        assert depth_slope(b[q][0]) == pytest.approx(depth_slope(a[q][0]), abs=1e-3)
        np.testing.assert_allclose(b[q][1]/a[q][1], [1/8, 1, 1, 1, 1], rtol=1e-3) # the size alone is fooled


def test_a_dead_layer_is_counted_and_does_not_look_like_growth():
    recs = one_step(net(dead=2))
    relative, rms = readings(recs)['gradients']
    assert (rms[:4] == 0).all() and rms[4] > 0 and zero_share(recs['gradients']) == .8
    assert rms[4]/np.maximum(rms[0], 1e-38) > 1e14 # relative to the first layer, gradients seem to grow
    assert math.isnan(depth_slope(relative)) # one layer makes no line


# ---- divergence

def rec_with(loss=None, **arrays):
    r = make(fits=(('naive', 2),))
    return dict(weights=replace(r, loss=np.full(len(r.loss), .5) if loss is None else np.asarray(loss, float), **arrays))


def test_a_run_that_learned_did_not_diverge():
    assert divergence(rec_with(), 4) == ''
    assert divergence(rec_with([9]*4+[.5]*4), 4) == '' # a bad start is no divergence


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_loss_that_is_not_finite(bad):
    loss = np.full(8, .5)
    loss[2] = bad
    assert divergence(rec_with(loss), 4) == 'the loss of minibatch 3 of 8 is not finite'


def test_a_validation_loss_that_is_not_finite():
    r = rec_with()['weights']
    assert divergence(dict(weights=replace(r, valid_loss=np.array([1, np.inf]))), 4) == 'a validation loss is not finite'


def test_weights_that_are_not_finite():
    r = make(fits=(('naive', 2),))
    bad = r.nonfinite.copy()
    bad[5, 0] = 3
    assert divergence(rec_with(nonfinite=bad), 4) == 'weights are not finite after step 6'


def test_a_run_that_ends_no_better_than_guessing():
    text = divergence(rec_with([.1]*4+[1.5]*4), 4)
    assert text == 'the training loss of the last epoch is 1.5, not below 1.386 (guessing 4 classes)'
    assert divergence(rec_with([.1]*4+[1.38]*4), 4) == ''


def test_of_a_single_epoch_the_second_half_counts():
    rec = rec_with([9.]*4+[1.5]*4)
    def once(*losses): return dict(weights=replace(rec['weights'].sel(epoch=0), loss=np.array(losses)))
    assert divergence(once(9., 9., 1.3, 1.4), 4) == ''
    text = 'the training loss of the second half of the only epoch is 1.5, not below 1.386 (guessing 4 classes)'
    assert divergence(once(.1, .1, 1.5, 1.5), 4) == text


def test_a_run_that_diverged_is_not_read_from_its_healthy_part():
    recs, epochs = rec_with([.5, .4, np.nan, *[np.nan]*5]), [dict(accuracy=.25)]
    r = run_readings(recs, epochs, divergence(recs, 4))
    for k, reading in READINGS.items():
        if reading.if_diverged == 'worst': assert r[k] == math.inf, k
        if reading.if_diverged == 'undefined': assert math.isnan(r[k]), k
    assert r['accuracy'] == .25 and math.isfinite(r['error_odds'])
    assert {k for k, x in READINGS.items() if x.if_diverged == 'worst'} == {
        'final_train', 'final_valid', 'loss_var', 'valid_var', 'loss_var_raw', 'valid_var_raw'}
    assert {k for k, x in READINGS.items() if x.if_diverged == 'kept'} == {'accuracy', 'error_odds', 'first_loss'}


def test_a_quantity_that_was_not_recorded_has_no_reading():
    r = run_readings(rec_with(), [dict(accuracy=.5)])
    assert math.isnan(r['grad_slope']) and math.isnan(r['output_roughness']) and math.isfinite(r['loss_var'])


def test_a_run_of_one_step_has_readings_without_a_warning():
    "Nothing changes from step to step, so most readings are NaN"
    r = run_readings(dict(weights=make(fits=(('naive', 1),), batches=1)), [dict(accuracy=.5)])
    assert math.isnan(r['drift']) and math.isnan(r['roughness']) and math.isnan(r['loss_var']) and math.isfinite(r['final_train'])
