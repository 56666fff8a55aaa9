"""Steps, rows and losses in all the ways in which callbacks cancel, nest and replace"""
import itertools
import pickle
import warnings
from contextlib import contextmanager
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune
from fastai.basics import (SGD, Callback, CancelBackwardException, CancelBatchException, CancelEpochException, CancelFitException,
                           CancelStepException, CancelTrainException, Learner, nn, partial, random)

from fastai_bnstats.record import ActivationHistCallback, GradHistCallback, OutputGradHistCallback, UpdateHistCallback, WeightHistCallback
from fastai_bnstats.recording import Recording
from helpers import loaders, tiny_learner, tiny_model

RECORDERS = [WeightHistCallback, GradHistCallback, UpdateHistCallback, ActivationHistCallback, OutputGradHistCallback]
EVENTS = ['before_epoch', 'before_train', 'before_batch', 'after_pred', 'after_loss', 'before_backward', 'after_backward',
          'before_step', 'after_step', 'after_cancel_step', 'after_cancel_batch', 'after_batch', 'after_train']
CANCELS = [CancelStepException, CancelBackwardException, CancelBatchException, CancelTrainException, CancelEpochException,
           CancelFitException]


def raises_once(event, exc, order, at=1):
    "A callback that raises an exception once, in an event of the second minibatch of the first epoch"
    def run(self):
        if self.done or getattr(self, 'iter', at) != at or not self.training: return
        self.done = True
        raise exc()
    return type('RaisesOnce', (Callback,), {event: run, 'order': order, 'done': False})()


class SkipAlways(Callback):
    "Skips the second step, so that `after_cancel_step` and `after_cancel_batch` happen"
    order = -30
    def __init__(self, event): self.event = event
    def before_step(self):
        if self.event == 'after_cancel_step' and self.iter == 1: raise CancelStepException()
    def before_backward(self):
        if self.event == 'after_cancel_batch' and self.iter == 1: raise CancelBatchException()


@contextmanager
def unchanged(learn):
    "Give the learner back what a nested call overwrites, as a careful callback does"
    names = ['training', 'xb', 'yb', 'dl', 'epoch', 'n_epoch', 'iter', 'n_iter', 'pred', 'loss', 'loss_grad']
    state, mode = {n: getattr(learn, n) for n in names if n in learn.__dict__}, learn.model.training
    yield
    learn.model.train(mode)
    for n, v in state.items(): setattr(learn, n, v)


class CountSteps(Callback):
    "The truth: which minibatches the optimizer has stepped in"
    order = 1000
    def before_fit(self):
        self.steps, step, learn = [], self.learn.opt.step, self.learn
        def counted(*args, **kwargs):
            self.steps.append((learn.epoch, learn.iter))
            return step(*args, **kwargs)
        self.learn.opt.step = counted


def check(rec, truth, escaped):
    "Every step of the optimizer has a row and a number of its own, which its last loss has too"
    done = [(e, b) for e, b, stepped in zip(rec.epoch.tolist(), rec.batch.tolist(), rec.stepped.tolist()) if stepped]
    assert done == truth.steps or escaped and done == truth.steps[:-1] # no event follows an exception that ends the fit
    assert (np.diff(rec.step) > 0).all() and (np.diff(rec.loss_step) >= 0).all()
    number = {(e, b): s for e, b, s in zip(rec.epoch.tolist(), rec.batch.tolist(), rec.step.tolist())}
    losses = zip(rec.loss_epoch.tolist(), rec.loss_batch.tolist(), rec.loss_step.tolist())
    assert all(number[e, b] == s for e, b, s in losses if (e, b) in number)


@pytest.mark.parametrize('exc', CANCELS)
@pytest.mark.parametrize('order', [20, pytest.param(90, marks=pytest.mark.slow)])
@pytest.mark.parametrize('event', EVENTS)
def test_every_step_has_a_row_and_a_number_of_its_own(event, order, exc):
    truth, cbs = CountSteps(), [cls() for cls in RECORDERS]
    learn = tiny_learner(dls=loaders(n=48), cbs=[*cbs, SkipAlways(event), raises_once(event, exc, order), truth])
    escaped = False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        try: learn.fit(2)
        except tuple(CANCELS): escaped = True
    for cb in cbs: check(cb.recording, truth, escaped)


def test_an_update_after_a_cancelled_one_is_of_one_step():
    cancel = raises_once('after_step', CancelBatchException, 20)
    learn = tiny_learner(cbs=[UpdateHistCallback(), cancel], opt_func=partial(SGD, wd=0.), lr=.1)
    w = [learn.model[0][0].weight.detach().clone()]
    learn.add_cb(type('Copy', (Callback,), {'order': -50, 'after_step': lambda self: w.append(self.model[0][0].weight.detach().clone())})())
    learn.fit(1, wd=0.)
    steps = [(b-a).norm().item() for a, b in zip(w, w[1:])]
    assert learn.update_hist.recording.step_norm[:, 0].tolist() == pytest.approx(steps, rel=1e-5)


MINIBATCH = ['before_batch', 'after_pred', 'after_loss', 'before_step', 'after_step', 'after_batch']


def nested(event, order, call):
    "A callback that calls the learner in an event of the second minibatch, or at the end of each epoch"
    def run(self):
        if self.busy or event in MINIBATCH and (self.iter != 1 or not self.training): return
        self.busy = True
        with unchanged(self.learn): call(self.learn)
        self.busy = False
    return type('Nested', (Callback,), {event: run, 'order': order, 'busy': False})()


def recordings(learn, epochs, cbs=()):
    "What the four recorders make of the same fit"
    recorders = [cls() for cls in RECORDERS]
    for dl in learn.dls.loaders: dl.rng = random.Random(1)
    learn.fit(epochs, cbs=[*recorders, *cbs])
    return [cb.recording for cb in recorders]


@pytest.mark.slow
@pytest.mark.parametrize('order', [20, 90])
@pytest.mark.parametrize('event', ['before_fit', 'before_train', 'before_batch', 'after_step', 'after_batch', 'after_train', 'after_epoch',
                                   'after_fit'])
@pytest.mark.parametrize('call', [Learner.validate, Learner.get_preds], ids=['validate', 'get_preds'])
def test_a_validation_within_a_fit_changes_nothing(call, event, order):
    plain = recordings(tiny_learner(tiny_model(bn=False)), 2)
    for a, b in zip(recordings(tiny_learner(tiny_model(bn=False)), 2, [nested(event, order, call)]), plain):
        assert a.fit.tolist() == [0]*8 and a.step.tolist() == list(range(8))
        for n in ('epoch', 'batch', 'loss_step', 'valid_fit', 'valid_epoch', 'valid_batch', 'valid_step'):
            assert getattr(a, n).tolist() == getattr(b, n).tolist() # losses differ: the call draws from the same generators


@pytest.mark.parametrize('order', [20, 90])
@pytest.mark.parametrize('event', MINIBATCH)
def test_a_fit_within_a_fit_is_a_fit_of_its_own(event, order, tmp_path):
    learn = tiny_learner()
    learn.inner = []
    once = nested(event, order, lambda learn: learn.inner or learn.inner.append(learn.fit(1)))
    before = 1 if event != 'after_batch' and (event, order) != ('after_step', 90) else 2 # rows of the outer fit before the inner one
    for rec in recordings(learn, 1, [once]):
        assert rec.fit.tolist() == [0]*before+[1]*4+[0]*(4-before) and (np.diff(rec.step) > 0).all()
        assert rec.meta['phases'] == ['fit0', 'fit1']
        assert rec.batch[rec.fit == 0].tolist() == rec.batch[rec.fit == 1].tolist() == [0, 1, 2, 3]
        assert len(rec.loss) == 8 and rec.valid_fit.tolist() == [1, 1, 0, 0]
        assert Recording.load(rec.save(tmp_path/'r')).is_same(rec)


@pytest.mark.parametrize('event', ['before_batch', 'after_batch', 'after_step'])
@pytest.mark.parametrize('order', [20, 90])
def test_an_inner_fit_that_fails_leaves_the_outer_one_as_it_was(event, order, tmp_path):
    class Fails(Callback):
        def after_batch(self):
            if self.iter == 2: raise RuntimeError('inner')
    def call(learn):
        if learn.inner: return
        learn.inner = True
        with pytest.raises(RuntimeError): learn.fit(1, cbs=Fails())
    cb = WeightHistCallback(path=tmp_path/'run')
    learn = tiny_learner(cbs=[cb, nested(event, order, call)])
    learn.inner = False
    learn.fit(2)
    rec = Recording.load(tmp_path/'run')
    outer = rec.sel(fit=0)
    assert list(zip(outer.epoch.tolist(), outer.batch.tolist())) == list(itertools.product(range(2), range(4)))
    assert rec.fit.tolist().count(1) == 2 and not cb.fits and not (tmp_path/'run/.lock').exists()


class OneMoreBatch(Callback):
    "Runs a batch after the validation, as fastai's TensorBoardCallback(log_preds=True) does"
    order = 70
    def after_epoch(self): self.learn.one_batch(0, self.dls.valid.one_batch())


def test_only_the_validation_of_the_epoch_counts():
    learn = tiny_learner(cbs=[WeightHistCallback(), OneMoreBatch()])
    learn.fit(3)
    rec = learn.weight_hist.recording
    assert rec.valid_batch.tolist() == [0, 1]*3 and rec.valid_epoch.tolist() == [0, 0, 1, 1, 2, 2] and len(rec.loss) == 12


class Replace(Callback):
    "Replaces the linear layer in the middle of an epoch"
    order = 80
    def __init__(self, out=2): self.out = out
    def after_batch(self):
        if self.training and self.iter == 1: self.model[1][-1] = nn.Linear(4, self.out)


@pytest.mark.parametrize('cls', RECORDERS)
def test_a_layer_that_replaces_another_is_recorded(cls):
    learn = tiny_learner(cbs=[cls(), Replace()])
    with pytest.warns(UserWarning, match='replaced during the fit: 1.3.*. What took the place is recorded from now on') as ws: learn.fit(1)
    assert sum('replaced during the fit' in str(w.message) for w in ws) == 1
    rec = learn.cbs.filter(lambda cb: isinstance(cb, cls))[0].recording
    assert len(rec) == 4
    if cls is WeightHistCallback:
        last = learn.model[1][-1].weight.detach().double()
        assert rec.mean[-1, -1] == pytest.approx(last.mean().item(), abs=1e-8) and rec.mean[1, -1] != rec.mean[2, -1]


def test_a_layer_of_another_size_ends_the_recording():
    learn = tiny_learner(cbs=[WeightHistCallback(), Replace(out=5)])
    with pytest.warns(UserWarning, match='stopped recording in before_batch.*1.3.weight changed size'): learn.fit(1)
    assert len(learn.weight_hist.recording) == 2 and len(learn.recorder.losses) == 4


@pytest.mark.parametrize('how,back', [(lambda m: prune.l1_unstructured(m, 'weight', amount=.5), lambda m: prune.remove(m, 'weight')),
                                      (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, 'weight'))])
@pytest.mark.parametrize('first', [False, True])
def test_a_weight_may_begin_or_cease_to_be_computed_during_a_fit(how, back, first):
    learn = tiny_learner(cbs=[WeightHistCallback()])
    if first: how(learn.model[1][-1])
    class Change(Callback):
        order = 80
        def after_batch(self):
            if self.training and self.iter == 1: (back if first else how)(self.model[1][-1])
    learn.fit(1, cbs=Change()) # warnings are errors
    rec = learn.weight_hist.recording
    assert len(rec) == 4 and rec.mean[-1, -1] == pytest.approx(learn.model[1][-1].weight.mean().item(), abs=1e-3)


@pytest.mark.parametrize('copied', [deepcopy, lambda learn: pickle.loads(pickle.dumps(learn))], ids=['deepcopy', 'pickle'])
def test_a_copy_says_that_the_recording_stayed_with_the_original(copied):
    learn = tiny_learner(cbs=WeightHistCallback())
    learn.fit(1)
    try: other = copied(learn)
    except (AttributeError, TypeError, pickle.PicklingError): pytest.skip('this learner can not be copied by plain fastai')
    with pytest.warns(UserWarning, match='is a copy, and its recording stayed with the original. Save that one'):
        assert len(other.weight_hist.recording) == 0
    assert len(learn.weight_hist.recording) == 4
    other.fit(1)
    assert len(other.weight_hist.recording) == 4 and len(learn.weight_hist.recording) == 4


@pytest.mark.parametrize('order', [20, 90])
@pytest.mark.parametrize('event', ['before_batch', 'after_pred', 'after_loss'])
def test_an_interrupt_leaves_no_hooks(event, order):
    learn = tiny_learner(cbs=[ActivationHistCallback(), raises_once(event, KeyboardInterrupt, order)])
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    learn.model(torch.zeros(2, 3, 8, 8)) # with hooks from an interrupted `before_batch`, the first pass takes them away
    assert not any(len(m._forward_hooks) for m in learn.model.modules())


class Interrupt(Callback):
    order = 80
    def after_batch(self):
        if self.training and self.epoch == 1 and self.iter == 1: raise KeyboardInterrupt


@pytest.mark.parametrize('remove', [False, True])
def test_a_new_callback_continues_what_an_interrupted_one_wrote(remove, tmp_path):
    first = tiny_learner(cbs=[WeightHistCallback(path=tmp_path/'run'), Interrupt()])
    with pytest.raises(KeyboardInterrupt): first.fit(2)
    old = first.weight_hist
    if remove: first.remove_cb(old)
    learn = tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run', resume=True))
    learn.fit(1)
    rec = Recording.load(tmp_path/'run')
    assert rec.fit.tolist() == [0]*6+[1]*4 and rec.step.tolist() == list(range(10)), 'the rows of the interrupted epoch were saved first'
    assert learn.weight_hist.recording.is_same(rec)
    if not remove:
        first.remove_cb(Interrupt)
        with pytest.raises(FileExistsError, match='since the last fit, and its files have changed'): first.fit(1)


def test_a_folder_that_can_not_be_used_any_more_stops_no_training(tmp_path, monkeypatch):
    learn = tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run'))
    learn.fit(1)
    def broken(self): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr('fastai_bnstats.record.writer.FolderLock.claim', broken)
    with pytest.warns(UserWarning, match="this fit is not recorded, because its folder can't be used.*Training goes on"): learn.fit(1)
    assert len(learn.recorder.losses) == 4


def test_a_loss_that_can_not_be_recorded_leaves_the_recording_whole(monkeypatch):
    learn = tiny_learner(cbs=WeightHistCallback())
    learn.fit(1)
    monkeypatch.setattr('fastai_bnstats.record.callback.find_bs', lambda *a: 1/0)
    with pytest.warns(UserWarning, match='stopped recording in after_loss: ZeroDivisionError'): learn.fit(1)
    rec = learn.weight_hist.recording
    assert len(rec) == 8 and len(rec.loss) == 8 and len(rec.valid_loss) == 2


def test_a_folder_is_not_taken_from_a_fit_in_another_thread(tmp_path):
    import threading
    begun, go_on = threading.Event(), threading.Event()
    class Wait(Callback):
        order = 80
        def after_batch(self):
            if self.training and self.iter == 1:
                begun.set()
                assert go_on.wait(100)
    first = tiny_learner(cbs=[WeightHistCallback(path=tmp_path/'run'), Wait()])
    t = threading.Thread(target=first.fit, args=[1])
    t.start()
    try:
        assert begun.wait(100)
        with pytest.raises(FileExistsError, match='in use by another callback or process'):
            tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run', resume=True)).fit(1)
        assert not list((tmp_path/'run').glob('chunk*'))
    finally:
        go_on.set()
        t.join()
    assert len(Recording.load(tmp_path/'run')) == 4


def test_names_of_phases_become_text(tmp_path):
    learn = tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run'))
    learn.weight_hist.phase = 1
    learn.fit(1)
    assert Recording.load(tmp_path/'run').meta['phases'] == ['1']


@pytest.mark.parametrize('event', ['after_train', 'before_validate', 'before_epoch'])
def test_a_nested_validation_does_not_change_the_epoch(event):
    "fastai sets `learn.epoch` to 0 at the start of each validation, also within a later epoch"
    class Nested(Callback):
        order, inside = 60, False
        def __init__(self): setattr(self, event, self.validate)
        def validate(self):
            if self.inside: return
            self.inside = True
            with self.learn.no_logging(): self.learn.validate()
            self.inside = False
    learn = tiny_learner(cbs=WeightHistCallback())
    learn.fit(3, cbs=Nested())
    rec = learn.weight_hist.recording
    assert rec.epoch.tolist() == rec.loss_epoch.tolist() == [0]*4+[1]*4+[2]*4
    assert rec.valid_epoch.tolist() == [0]*2+[1]*2+[2]*2
