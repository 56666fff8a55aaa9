"""What diagnose finds in recordings made by hand, and in trainings that are broken on purpose"""
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.basics import SGD, Callback, CancelStepException, nn, partial
from fastai.callback.tracker import TerminateOnNaNCallback
from helpers import loaders, make, tiny_learner, tiny_model

from fastai_bnstats.compare import Findings, diagnose
from fastai_bnstats.compare.diagnose import LONG, ROWS, SKIPPED, step_sizes
from fastai_bnstats.record import ActivationHistCallback, GradHistCallback, OutputGradHistCallback, UpdateHistCallback, WeightHistCallback

KINDS = ['not finite', 'zero gradient', 'dead output', 'loss spike', 'did not move', 'dead scale', 'steps skipped']


LOSSES = 'loss', 'loss_step', 'loss_fit', 'loss_epoch', 'loss_batch'


def table(quantity='weights', fits=(('a', 10),), P=3, **fields):
    "A recording of 4 minibatches an epoch, in which nothing is suspicious; `fields` replace its arrays"
    r = make(fits=fits, P=P)
    return replace(r, **fields, meta={**r.meta, 'quantity': quantity})


def put(a, where, value):
    a = np.array(a)
    a[where] = value
    return a


def moments_zero(r, where): return dict(mean=put(r.mean, where, 0.), var=put(r.var, where, 0.))


def found(*recs): return [(f.kind, f.step, f.layer) for f in diagnose(*recs)]


# not finite

def test_the_earliest_in_causal_order_is_found():
    n, loss = make((('a', 10),), P=3).nonfinite, make((('a', 10),)).loss
    bad = dict(nonfinite=put(n, np.s_[20:, 1:], 3))
    w, g, o = (table(q, **bad, loss=put(loss, np.s_[20:], np.nan)) for q in ('weights', 'gradients', 'outputs'))
    assert found(w, g, o) == [('not finite', 20, '1.weight')] and diagnose(w, g, o)[0].quantity == 'outputs'
    assert found(w, g) == [('not finite', 20, '')] and diagnose(w, g)[0].quantity == 'loss'
    w, g = (replace(r, loss=loss) for r in (w, g))
    assert diagnose(w, g)[0].quantity == 'gradients' and diagnose(w)[0].quantity == 'weights'
    earlier = table('weights', nonfinite=put(n, np.s_[19:, 2], 1), loss=loss)
    f, = diagnose(earlier, g)
    assert (f.step, f.layer, f.quantity, f.fit, f.epoch, f.batch, f.phase) == (19, '2.weight', 'weights', 0, 4, 3, 'a')
    assert f.text.startswith('1 of 150 weights is NaN or infinite; one row earlier their RMS was 1')


def test_infinite_gradients_of_skipped_steps_are_normal():
    g = table('gradients')
    g = replace(g, nonfinite=put(g.nonfinite, 7, 2), stepped=put(g.stepped, 7, False))
    assert found(g) == []
    assert found(replace(g, stepped=np.ones(40, bool))) == [('not finite', 7, '0.weight')]


def test_a_validation_loss_can_be_the_only_one():
    r = table()
    f, = diagnose(replace(r, valid_loss=put(r.valid_loss, 3, np.inf)))
    assert (f.kind, f.step, f.epoch, f.quantity) == ('not finite', 15, 3, 'validation loss')
    assert f.text == 'The validation loss is inf; one minibatch earlier it was 1. In all, 1 of 10 is not finite.'


def test_modules_within_come_before_those_around():
    o = table('outputs', P=4, names=np.array(['(root)', 'body', 'body.0', 'head']))
    f, = diagnose(replace(o, nonfinite=put(o.nonfinite, np.s_[9], 1)))
    assert f.layers == ('body.0', 'head')


# zero gradients and dead outputs

def test_a_gradient_that_is_zero_to_the_end_is_found():
    g = table('gradients')
    dead = replace(g, **moments_zero(g, (np.s_[30:], 1)))
    assert found(dead) == [('zero gradient', 30, '1.weight')]
    f, = diagnose(replace(dead, **moments_zero(dead, (np.s_[25:], 2))))
    assert (f.step, f.layers) == (25, ('2.weight', '1.weight')) # in order of time
    f, = diagnose(replace(dead, **moments_zero(dead, (np.s_[30:], 0))))
    assert (f.step, f.layers) == (30, ('0.weight', '1.weight')) # then in that of the network
    assert f'({10} rows); one row earlier their RMS was' in f.text and f.text.endswith('So is 1 other: 1.weight.')


@pytest.mark.parametrize('change', ['alive at the end', 'few rows', 'frozen', 'no gradient', 'longer before', 'skipped', 'learning rate 0',
                                    'loss 0'])
def test_a_zero_gradient_that_is_no_finding(change):
    g = table('gradients')
    r = replace(g, **moments_zero(g, (np.s_[40-ROWS+1 if change == 'few rows' else 30:], 1)))
    if change == 'alive at the end': r = replace(r, var=put(r.var, (-1, 1), 1e-30))
    if change == 'frozen': r = replace(r, trainable=put(r.trainable, (np.s_[30:], 1), False))
    if change == 'no gradient': r = replace(r, numel=put(r.numel, (np.s_[30:], 1), 0), mean=put(r.mean, (np.s_[30:], 1), np.nan))
    if change == 'longer before': r = replace(r, **moments_zero(r, (np.s_[10:15], 1)))
    if change == 'skipped': r = replace(r, stepped=put(r.stepped, np.s_[33:], False))
    if change == 'learning rate 0': r = replace(r, lr=put(r.lr, np.s_[33:], 0))
    if change == 'loss 0': r = replace(r, loss=put(r.loss, np.s_[33:], 0))
    assert found(r) == []


def test_a_gradient_that_was_never_there_is_zero_from_the_first_row():
    g = table('gradients')
    f, = diagnose(replace(g, **moments_zero(g, np.s_[:, 2])))
    assert (f.kind, f.step, f.layer) == ('zero gradient', 0, '2.weight') and 'earlier' not in f.text


def test_outputs_need_not_train():
    o = table('outputs', trainable=np.zeros((40, 3), bool))
    assert found(replace(o, **moments_zero(o, (np.s_[12:], 1)))) == [('dead output', 12, '1.weight')]


# spikes

def spiked(r, at=33, n=1): return replace(r, loss=put(r.loss, np.s_[at:at+n], 50.))


def test_a_spike_names_the_layers_that_moved_most():
    sizes = np.tile([1., 10., 100.], (40, 1))*np.linspace(1, 2, 40)[:, None]
    u = spiked(table('updates', fit_norm=np.ones((40, 3)), step_norm=put(sizes, 33, [5., 200., 300.])))
    f, = diagnose(u)
    times = np.array([5., 200., 300.])/np.median(sizes[:33], 0)
    order = np.argsort(-times)
    assert (f.kind, f.step, f.epoch, f.batch) == ('loss spike', 33, 8, 1) and f.layers == tuple(u.names[order])
    assert f', {f.layers[1]} {times[order[1]]:.3g}×' in f.text and 'back to normal at the next minibatch' in f.text
    assert 'not back to normal' in diagnose(spiked(u, 33, 7))[0].text
    assert diagnose(replace(u, step_norm=np.zeros((40, 3))))[0].layers == () # no layer moved before


def test_a_sudden_step_before_is_the_cause():
    "The loss of step 33 is computed before its update, so a huge update of step 32 caused it, although step 33 is large too"
    sizes = put(put(np.ones((40, 3)), 32, [5., 2000., 300.]), 33, [8., 3., 2.])
    u = table('updates', fit_norm=np.ones((40, 3)), step_norm=sizes)
    f, = diagnose(spiked(replace(u, lr=put(np.full((40, 2), .01), (32, 1), 30.))))
    assert (f.step, f.layers) == (33, ('1.weight', '2.weight', '0.weight'))
    assert f.text.endswith('Step 32 before it moved 1.weight 2000×, 2.weight 300×, 0.weight 5× as far as usual, '
                           'with a learning rate of 30 instead of 0.01.')
    f, = diagnose(spiked(replace(u, step_norm=put(sizes, 32, 5.), lr=np.full((40, 1), .01)))) # not sudden
    assert f.layers[0] == '0.weight' and 'largest steps here' in f.text and 'before it' not in f.text.partition('before it is')[2]
    thin = replace(u.sel(step=range(0, 40, 4)), **{k: getattr(spiked(u), k) for k in LOSSES})
    assert diagnose(thin)[0].layer == '1.weight' # no row at step 33
    f, = diagnose(spiked(table('gradients', lr=put(np.full((40, 1), .01), 32, 1.))))
    assert f.layers == () and f.text.endswith('Step 32 before it had a learning rate of 1 instead of 0.01.')


def test_without_updates_the_weights_tell():
    w = table(P=2)
    jump = replace(w, mean=w.mean+np.where(np.arange(40) >= 33, 3., 0)[:, None]*[0, 1])
    f, = diagnose(spiked(jump))
    assert f.layer == '1.weight' and 'changes of mean and standard deviation' in f.text
    losses = {k: getattr(spiked(jump), k) for k in LOSSES}
    thin = replace(jump.sel(step=range(0, 40, 4)), **losses)
    assert diagnose(thin)[0].layer == '1.weight' # the row after the step
    ones = np.ones((10, 2))
    assert diagnose(replace(thin, meta={**w.meta, 'quantity': 'updates'}, step_norm=ones, fit_norm=ones))[0].layer == ''


def test_step_sizes_of_weights_are_a_lower_bound():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(6, 100)).cumsum(0)
    r = table(fits=(('a', 1), ('b', 1)), P=1).sel(step=range(6))
    r = replace(r, mean=w.mean(1)[:, None], var=w.var(1)[:, None], numel=np.full((6, 1), 100))
    true, got = np.linalg.norm(np.diff(w, axis=0), axis=1), step_sizes(r)[:, 0]
    assert np.isnan(got[[0, 4]]).all() # the first row of each fit
    assert (got[[1, 2, 3, 5]] <= true[[0, 1, 2, 4]]).all() and (got[[1, 2, 3, 5]] > 0).all()
    shift = replace(r, mean=np.arange(6.)[:, None], var=np.ones((6, 1)))
    assert step_sizes(shift)[1, 0] == 10 # each of 100 weights moves by 1: exact


# layers that did not move

def frozen_rows(r, rows, p): return {k: put(getattr(r, k), (rows, p), getattr(r, k)[rows, p][:1]) for k in ('hist', 'mean', 'var')}


def test_a_layer_that_did_not_move_in_one_fit():
    w = table(fits=(('a', 2), ('b', 3)))
    f, = diagnose(replace(w, **frozen_rows(w, np.s_[8:], 1)))
    assert (f.kind, f.step, f.layers, f.phase) == ('did not move', 8, ('1.weight',), 'b')
    assert f.text == 'Histogram, mean and variance did not change, in 11 rows in which it was trainable.'


@pytest.mark.parametrize('change', ['mean', 'hist', 'var', 'frozen', 'frozen a while', 'skipped', 'learning rate 0', 'no values',
                                    'not finite', 'few rows'])
def test_a_layer_that_did_not_move_and_is_no_finding(change):
    w = table(fits=(('a', 1 if change == 'few rows' else 3),))
    r = replace(w, **frozen_rows(w, np.s_[:], 1))
    last = (-1, 1)
    if change in ('mean', 'var'): r = replace(r, **{change: put(getattr(r, change), last, .5)})
    if change == 'hist': r = replace(r, hist=put(r.hist, (-1, 1), r.hist[-1, 1][::-1]))
    if change == 'frozen': r = replace(r, trainable=put(r.trainable, np.s_[:, 1], False))
    if change == 'frozen a while': r = replace(r, trainable=put(r.trainable, (np.s_[4:], 1), False))
    if change == 'skipped': r = replace(r, stepped=put(r.stepped, np.s_[4:], False))
    if change == 'learning rate 0': r = replace(r, lr=np.zeros((12, 1)))
    if change == 'no values': r = replace(r, numel=put(r.numel, np.s_[:, 1], 0), mean=put(r.mean, np.s_[:, 1], np.nan))
    if change == 'not finite': r = replace(r, nonfinite=put(r.nonfinite, np.s_[1:, 1], 1))
    assert [f for f in found(r) if f[0] == 'did not move'] == []


def test_updates_are_believed_more_than_weights():
    w = table(fits=(('a', 3),))
    still = replace(w, **frozen_rows(w, np.s_[:], 1))
    ones = np.ones((12, 3))
    u = replace(w, step_norm=put(ones, np.s_[:, 2], 0), fit_norm=put(ones, np.s_[:, 2], 0), meta={**w.meta, 'quantity': 'updates'})
    assert found(u, still) == [('did not move', 0, '2.weight')]
    assert found(u.sel(layers=[0, 1]), still) == []
    assert found(u.sel(layers=[0, 2]), still) == [('did not move', 0, '2.weight'), ('did not move', 0, '1.weight')]
    between = replace(u, fit_norm=ones) # still at the recorded steps, but not between them
    assert found(between) == []


def test_a_bias_before_batch_norm_may_be_too_slow_to_move():
    w = table(names=np.array(['0.weight', '0.bias', '1.weight']), kind=np.array(['weight', 'bias', 'gamma']))
    assert found(replace(w, **frozen_rows(w, np.s_[:], 1))) == []
    both = replace(w, **{k: np.where(np.arange(3).reshape(1, 3, *[1]*(getattr(w, k).ndim-2)) < 2, getattr(w, k)[:1], getattr(w, k))
                         for k in ('hist', 'mean', 'var')})
    f, = diagnose(both)
    assert f.layers == ('0.weight', '0.bias')


# scales

def gammas(rms, every=1, **fields):
    n = len(rms)
    r = table(fits=(('a', n//4),), P=2, kind=np.array(['weight', 'gamma']))
    moments = dict(mean=np.stack([r.mean[:, 0], rms], 1), var=np.stack([r.var[:, 0], 0*rms], 1))
    return replace(r, **moments, step=r.step*every, loss_step=r.loss_step*every, **fields)


@pytest.mark.parametrize('rms, step', [
    (np.r_[np.ones(20), np.full(20, .009)], 20),
    (np.r_[np.ones(20), .011, np.full(19, -.009)], 21),
    (np.r_[np.zeros(4), np.full(6, .5), np.full(30, .001)], 10), # started at 0, then lived
    (np.r_[np.ones(30), np.full(10, .011)], None),
    (np.r_[np.ones(36), np.full(ROWS-1, 0.)], None),
    (np.r_[np.ones(20), np.zeros(19), .02], None),
    (np.r_[np.full(20, .05), np.full(20, .001)], None), # was never alive
    (np.full(40, 1e-6), None)]) # has not trained for long
def test_a_scale_is_dead_if_it_was_alive(rms, step):
    assert found(gammas(rms)) == ([] if step is None else [('dead scale', step, '1.weight')])


def test_a_scale_that_stays_at_zero_is_dead_after_many_steps():
    rms = np.linspace(0, .005, 40)
    long = gammas(rms, every=LONG//39+1)
    assert found(long) == [('dead scale', 0, '1.weight')]
    assert found(gammas(rms, every=LONG//39)) == []
    assert found(replace(long, trainable=np.zeros((40, 2), bool))) == []
    assert found(replace(long, names=np.array(['0.weight', '1.gamma']))) == [] # a LayerScale starts near 0 and may stay there


# skipped steps

def test_steps_skipped_to_the_end():
    r = table()
    skip = lambda at: replace(r, stepped=put(r.stepped, at, False))
    assert found(skip(np.s_[40-SKIPPED:])) == [('steps skipped', 40-SKIPPED, '')]
    assert found(skip(np.s_[40-SKIPPED+1:])) == found(skip(np.s_[:39])) == []


# what a user sees

def test_nothing_suspicious():
    d = diagnose(table())
    assert d == [] and isinstance(d, Findings)
    assert repr(d).split('\n') == [
        'Nothing suspicious.',
        'Looked at: values that are not finite in losses, weights; spikes of the loss; layers that did not move; skipped steps.',
        'Could not look at: gradients that became 0 (record gradients too, as with GradHistCallback); '
        'outputs that became 0 (record outputs too, as with ActivationHistCallback); '
        "scales of norm layers (record all weights, as with WeightHistCallback('all'))."]


def test_a_model_without_norm_layers():
    r = table(kind=np.array(['weight', 'bias', 'weight']))
    def missed(total): return diagnose(replace(r, meta={**r.meta, 'trained': {'0': [3, total]}})).missed[-1]
    assert missed(3) == 'scales of norm layers (the model has none)' and 'record all weights' in missed(4)
    _, found = train(mlp(), record=ALL[:1], epochs=1)
    assert 'scales of norm layers (the model has none)' in found.missed


def test_it_says_what_is_too_short_and_what_is_thinned():
    r = table('gradients', fits=(('a', 1), ('b', 1)))
    d = diagnose(replace(r, meta={**r.meta, 'every': 16}))
    assert 'gradients (every 16 steps)' in repr(d)
    assert d.missed[:2] == ['spikes of the loss (no fit has more than 10 minibatches)',
                            f'gradients that became 0 (no fit has more than {ROWS} rows)']


def test_texts_and_tables():
    d = diagnose(spiked(table(names=np.array(['<a>', 'b', 'c']))))
    assert repr(d).startswith(f'Step 33 (a, epoch 8, batch 1), {d[0].layer}: loss spike. The loss is 50, the median before it is 0.')
    assert '<b>Step 33 (a, epoch 8, batch 1)</b>' in d._repr_html_() and '<a>' not in d._repr_html_() and str(d) == repr(d)
    frame = d.to_frame()
    assert len(frame) == 1 and list(frame)[:3] == ['kind', 'step', 'phase'] and frame.layer[0] == d[0].layer
    assert list(diagnose(table()).to_frame()) == list(frame)
    assert d.recording_of(d[0]) is d.recs['weights'] and d[0].kind in KINDS


@pytest.mark.parametrize('recs, error, text', [
    ([], TypeError, 'at least one Recording'),
    ([[1, 2]], TypeError, 'Found list'),
    ([table(), table()], ValueError, 'Found two of weights'),
    ([table('spectra')], ValueError, 'Found one of spectra'),
    ([table(), table('updates', loss=np.ones(40))], ValueError, 'weights and updates have different losses'),
    ([table(fits=(('a', 1), ('b', 1))).sel(fit=0), table('updates', fits=(('a', 1), ('b', 1))).sel(fit=1)], ValueError, 'different losses'),
    ([table().sel(step=[99])], ValueError, 'no rows and no losses')])
def test_errors(recs, error, text):
    with pytest.raises(error, match=text): diagnose(*recs)


NONE = np.full((40, 3), np.nan)


@pytest.mark.parametrize('r', [table().sel(step=0), table(P=1), table().sel(epoch=0), table(loss=NONE[:, 0]), table().sel(layers=0),
                               table(mean=NONE, var=NONE, numel=np.zeros((40, 3), int))])
def test_small_and_odd_recordings(r):
    d = diagnose(r)
    assert repr(d) and d._repr_html_() and all(f.kind == 'not finite' for f in d)


def test_rows_without_losses_and_losses_without_rows():
    r = table()
    d = diagnose(replace(r, **{k: getattr(r, k)[:0] for k in LOSSES}))
    assert d == [] and 'spikes of the loss (no fit has more than 10 minibatches)' in d.missed
    late = spiked(table('gradients'))
    assert [f.kind for f in diagnose(replace(late.sel(step=[99]), **{k: getattr(late, k) for k in LOSSES}))] == ['loss spike']


# trainings that are broken on purpose

def mlp(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


ALL = WeightHistCallback, GradHistCallback, UpdateHistCallback, ActivationHistCallback


def train(model, *cbs, epochs=5, lr=1e-2, every=1, record=ALL, **kwargs):
    "The learner after a fit, and the findings"
    recording = [cb('all', every=every) for cb in record]
    learn = tiny_learner(model, cbs=[*recording, *cbs], **kwargs)
    learn.fit(epochs, lr)
    return learn, diagnose(*(cb.recording for cb in recording))


class At(Callback):
    "Do something before one minibatch of the training"
    order = -5
    def __init__(self, step, do): self.at, self.do = step, do
    def before_batch(self):
        if self.training and self.epoch*len(self.dls.train)+self.iter == self.at: self.do(self.learn)


def brighten(learn): learn.xb = (learn.xb[0]*200,)
def spoil(learn): learn.xb = (learn.xb[0].index_fill(0, torch.tensor([0]), float('nan')),)
def kill(learn): learn.model[1].bias.data.fill_(-1e4)


class Truth(Callback):
    "The first step, quantity and layer in which anything was not finite, by looking at the tensors"
    order = 54
    def before_fit(self):
        self.earliest, self.hooks, named = None, [], self.model.named_modules()
        for n, m in named:
            if not list(m.children()): self.hooks.append(m.register_forward_hook(lambda m, i, o, n=n: self.see('outputs', n, o)))
    def see(self, what, name, t):
        if not self.training or self.earliest or t.isfinite().all(): return
        self.earliest = (self.epoch*len(self.dls.train)+self.iter, what, name)
    def after_loss(self): self.see('loss', '', self.learn.loss)
    def before_step(self):
        for n, p in self.model.named_parameters(): self.see('gradients', n, p.grad)
    def after_step(self):
        for n, p in self.model.named_parameters(): self.see('updates', n, p)
    def after_fit(self):
        for h in self.hooks: h.remove()


class Root(nn.Module):
    "The derivative of a square root at 0 is infinite"
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(192, 8), nn.Linear(8, 2)
    def forward(self, x):
        y = self.first(x.flatten(1))
        return self.last((y-y.detach()).abs().sqrt())


def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Linear(16, 16), nn.Linear(16, 2))
def step_to_infinity(learn): learn.opt.set_hyper('lr', float('inf'))


@pytest.mark.parametrize('model, lr, at, quantity', [
    (linear, 1e6, None, 'outputs'), (Root, .01, None, 'gradients'),
    (linear, .01, step_to_infinity, 'updates')])
def test_a_training_that_explodes(model, lr, at, quantity):
    truth = Truth()
    _, found = train(model(), truth, *([At(5, at)] if at else []), lr=lr, opt_func=SGD, epochs=2)
    f, = [f for f in found if f.kind == 'not finite']
    assert (f.step, f.quantity, f.layer) == truth.earliest and f.quantity == quantity


def test_a_minibatch_with_nan_and_a_training_that_stops_there():
    _, found = train(mlp(), At(6, spoil), TerminateOnNaNCallback())
    assert [(f.kind, f.step, f.epoch, f.batch, f.layer) for f in found] == [('not finite', 6, 1, 2, '0')] # Flatten passes it on
    learn, found = train(mlp(), At(6, spoil), every=4)
    f, = found
    assert (f.step, f.quantity) == (6, 'loss') and 'every 4 steps' in repr(found) # rows are at steps 0, 4, 8


def test_a_relu_that_dies():
    learn, found = train(mlp(), At(8, kill), record=[*ALL, OutputGradHistCallback])
    assert [(f.kind, f.step, f.layer) for f in found] == [
        ('dead output', 8, '2'), ('zero gradient', 8, '1'), ('zero gradient', 8, '1.weight')]
    assert found[2].layers == ('1.weight', '1.bias', '3.weight')
    assert (learn.model[1].weight.grad == 0).all()


def test_a_bad_minibatch():
    _, found = train(mlp(), At(30, brighten), epochs=9, opt_func=SGD, record=ALL[2:3])
    assert [(f.kind, f.step, f.epoch, f.batch) for f in found] == [('loss spike', 30, 7, 2)] and 'largest steps here' in found[0].text


@pytest.mark.parametrize('k, how', [(2, 'moved {} '), (0, 'changed mean and standard deviation of {} ')])
def test_one_huge_step(k, how):
    class OneHugeStep(Callback):
        order = 60 # after the scheduler
        def before_batch(self):
            if self.training: self.opt.set_hyper('lr', 30. if self.epoch*4+self.iter == 29 else 1e-2)
    learn, found = train(mlp(), OneHugeStep(), epochs=9, opt_func=SGD, record=ALL[k:k+1])
    f = next(f for f in found if f.kind == 'loss spike')
    rec, = found.recs.values()
    size = step_sizes(rec)
    most = rec.names[np.argmax(size[29]/np.nanmedian(size[:29], 0))]
    assert (f.step, f.layer) == (30, most) and rec.lr[29, 0] == 30
    assert f'Step 29 before it {how.format(most)}' in f.text and f.text.endswith('with a learning rate of 30 instead of 0.01.')


class Forgetful(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.forgotten, self.last = nn.Linear(192, 8), nn.Linear(8, 8), nn.Linear(8, 2)
    def forward(self, x): return self.last(F.relu(self.first(x.flatten(1))))


def test_a_layer_that_is_never_used():
    _, found = train(Forgetful())
    f, = found
    assert (f.kind, f.step, f.layers) == ('did not move', 0, ('forgotten.weight', 'forgotten.bias'))
    assert 'does the forward pass use it?' in f.text


def test_a_layer_that_the_optimizer_does_not_know():
    _, found = train(mlp(), splitter=lambda m: [list(m[1].parameters()), list(m[5].parameters())])
    f, = found
    assert (f.kind, f.step, f.layers) == ('did not move', 0, ('3.weight', '3.bias')) and 'is it in the optimizer?' in f.text


def test_a_group_with_a_learning_rate_of_zero():
    _, found = train(mlp(), lr=[0., 1e-2], splitter=lambda m: [list(m[1].parameters()), list(m[3:].parameters())])
    f, = found
    assert f.layers == ('1.weight', '1.bias') and 'in a group with a learning rate above 0?' in f.text


def test_weight_decay_that_kills_gamma():
    learn, found = train(tiny_model(), epochs=8, lr=.1, opt_func=partial(SGD, mom=0.), wd=3., wd_bn_bias=True, record=ALL[:1])
    dead = {f.layer: f.step for f in found if f.kind == 'dead scale'}
    rms = learn.weight_hist.recording.sel(kind='gamma')
    assert dead == {n: int((rms.rms[:, i] < .01).argmax()) for i, n in enumerate(rms.names.tolist())} and len(dead) == 3


class Skip(Callback):
    "Skips steps, as mixed precision does after an infinite gradient"
    order = 10
    def __init__(self, which): self.which, self.n = which, -1
    def before_step(self):
        self.n += 1
        if not self.which(self.n): return
        next(self.model.parameters()).grad.view(-1)[0] = float('inf')
        raise CancelStepException


def test_a_training_that_skips_all_steps():
    _, found = train(mlp(), Skip(lambda n: n >= 5), epochs=9)
    assert [(f.kind, f.step, f.layer) for f in found] == [('steps skipped', 5, '')]


def test_a_loader_with_other_losses_is_another_run():
    a, _ = train(mlp(), record=ALL[:1], epochs=1)
    b, _ = train(mlp(), record=ALL[1:2], epochs=1, dls=loaders(seed=5))
    with pytest.raises(ValueError, match='different losses'): diagnose(a.weight_hist.recording, b.grad_hist.recording)
