"""fastai's callbacks train with recorders as they do without, alone and in pairs, and each optimizer step has its row

With `ALL_PAIRS=1` in the environment, all pairs are tested, which takes some minutes."""
import itertools
import os
import warnings
from copy import deepcopy

import pytest
import torch
from fastai.basics import Callback, SkipToEpoch, nn, set_seed
from fastai.callback.all import (ActivationStats, BnFreeze, ChannelsLast, CollectDataCallback, CSVLogger, CutMix, EarlyStoppingCallback,
                                 GradientAccumulation, GradientClip, MCDropoutCallback, MixUp, ModelResetter, ParamScheduler,
                                 ProgressCallback, ReduceLROnPlateau, SaveModelCallback, SchedCos, ShortEpochCallback,
                                 TerminateOnNaNCallback)
from fastai.callback.core import FetchPredsCallback
from fastai.callback.fp16 import AMPMode, MixedPrecision

from fastai_bnstats.record import ActivationHistCallback, GradHistCallback, OutputGradHistCallback, UpdateHistCallback, WeightHistCallback
from helpers import loaders, tiny_learner, tiny_model

RECORDERS = [WeightHistCallback, GradHistCallback, UpdateHistCallback, ActivationHistCallback, OutputGradHistCallback]


class EMA(Callback):
    "Validates with the running mean of the weights"
    order = 70
    def before_fit(self): self.mean = deepcopy(self.model.state_dict())
    def after_batch(self):
        if not self.training: return
        for n, t in self.model.state_dict().items():
            if t.is_floating_point(): self.mean[n].lerp_(t, .1)
    def before_validate(self):
        self.kept = deepcopy(self.model.state_dict())
        self.model.load_state_dict(self.mean)
    def after_validate(self): self.model.load_state_dict(self.kept)


class OneMoreBatch(Callback):
    "Runs a batch after the validation, as TensorBoardCallback(log_preds=True) does"
    order = 70
    def after_epoch(self): self.learn.one_batch(0, self.dls.valid.one_batch())


class Predicts(Callback):
    "Predicts during training"
    order, busy = 80, False
    def after_epoch(self): # which get_preds calls too
        if self.busy: return
        self.busy = True
        self.learn.get_preds(dl=self.dls.valid)
        self.busy = False


CALLBACKS = { # name -> function that makes the callback
    'MixUp': lambda: MixUp(.4),
    'CutMix': lambda: CutMix(1.),
    'MixedPrecision': MixedPrecision,
    'MixedPrecision, bfloat16': lambda: MixedPrecision(amp_mode=AMPMode.BF16),
    'GradientAccumulation': lambda: GradientAccumulation(32),
    'GradientClip': lambda: GradientClip(.1),
    'EarlyStopping': lambda: EarlyStoppingCallback(patience=0, min_delta=10.),
    'SaveModel': lambda: SaveModelCallback(with_opt=True),
    'SaveModel, every epoch': lambda: SaveModelCallback(every_epoch=True),
    'ReduceLROnPlateau': lambda: ReduceLROnPlateau(patience=0, min_delta=10.),
    'ParamScheduler': lambda: ParamScheduler({'lr': SchedCos(1e-2, 1e-3)}),
    'CSVLogger': CSVLogger,
    'BnFreeze': BnFreeze,
    'ModelResetter': ModelResetter,
    'ChannelsLast': ChannelsLast,
    'TerminateOnNaN': TerminateOnNaNCallback,
    'EMA': EMA,
    'OneMoreBatch': OneMoreBatch,
    'Predicts': Predicts,
    'FetchPreds': FetchPredsCallback,
    'ActivationStats': lambda: ActivationStats(with_hist=True),
    'CollectData': CollectDataCallback,
    'ShortEpoch': lambda: ShortEpochCallback(.5),
    'SkipToEpoch': lambda: SkipToEpoch(1),
    'MCDropout': MCDropoutCallback,
    'Progress': ProgressCallback,
}


PAIRED = list(CALLBACKS) if 'ALL_PAIRS' in os.environ else [ # those that cancel, nest, or change weights, gradients or minibatches
    'MixUp', 'MixedPrecision', 'GradientAccumulation', 'GradientClip', 'EarlyStopping', 'SaveModel', 'TerminateOnNaN', 'EMA',
    'OneMoreBatch', 'Predicts', 'FetchPreds', 'ShortEpoch', 'SkipToEpoch']

ENDLESS = [('Predicts', 'FetchPreds')] # each makes predictions within the other's, without this library too
PAIRS = [p for p in itertools.combinations(PAIRED, 2) if p not in ENDLESS]


class Resettable(nn.Sequential):
    def reset(self): "Called by ModelResetter"


class Truth(Callback):
    "What happened: the optimizer's steps, minibatches trained, and minibatches of the validations of epochs"
    order = 54 # before the recorders
    def __init__(self): self.depth, self.steps, self.trained, self.valid, self.validating = 0, [], [], [], False
    def before_fit(self):
        self.depth += 1
        if self.depth > 1: return # predictions within the fit
        step, learn = self.learn.opt.step, self.learn
        def counted(*args, **kwargs):
            self.steps.append((learn.epoch, learn.iter))
            return step(*args, **kwargs)
        learn.opt.step = counted
    def after_fit(self): self.depth -= 1
    def before_validate(self): self.validating |= self.depth == 1
    def after_validate(self): self.validating &= self.depth != 1
    def after_loss(self):
        if self.training: self.trained.append((self.epoch, self.iter))
        elif self.validating and self.dl is self.dls.valid: self.valid.append((self.epoch, self.iter))


def train(folder, cbs, recorders=(), model=None):
    "(all that training made, the truth); or its error in the place of the first"
    set_seed(7)
    model = model or Resettable(*tiny_model(), nn.Dropout(.1))
    truth, learn = Truth(), tiny_learner(model, loaders(n=48), path=folder)
    set_seed(5)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        try:
            learn.fit(2, cbs=[*cbs, *recorders, truth])
            made = learn.model.state_dict(), [float(x) for x in learn.recorder.losses], [list(map(str, v)) for v in learn.recorder.values]
        except Exception as e: made = f'{type(e).__name__}: {e}'
    assert not [str(w.message) for w in heard if 'HistCallback' in str(w.message)]
    return made, truth


def same_bits(a, b): return a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))


def same(a, b):
    if isinstance(a, str) or isinstance(b, str): return a == b
    bits = all(same_bits(x, y) for x, y in zip(a[0].values(), b[0].values(), strict=True))
    return bits and str(a[1:]) == str(b[1:])


def pairs(a, b): return list(zip(a.tolist(), b.tolist(), strict=True))


def check(folder, make):
    "Training with and without recorders"
    plain, _ = train(folder, make())
    recorders = [cls() for cls in RECORDERS]
    made, truth = train(folder, make(), recorders)
    assert same(plain, made)
    for rec in (cb.recording for cb in recorders):
        if isinstance(made, str) and not len(rec): continue
        assert pairs(rec.epoch[rec.stepped], rec.batch[rec.stepped]) == truth.steps
        assert pairs(rec.loss_epoch, rec.loss_batch) == truth.trained and len(rec.loss) == len(truth.trained)
        assert pairs(rec.valid_epoch, rec.valid_batch) == truth.valid and len(rec.valid_loss) == len(truth.valid)
        assert (rec.hist.sum(-1)+rec.under+rec.over+rec.nonfinite == rec.numel).all()
    return made, truth


@pytest.mark.parametrize('name', CALLBACKS)
def test_one_callback(name, tmp_path):
    made, truth = check(tmp_path, lambda: [CALLBACKS[name]()])
    assert not isinstance(made, str) and truth.steps and truth.trained and truth.valid


@pytest.mark.parametrize('names', PAIRS, ids=' + '.join)
def test_pairs(names, tmp_path):
    check(tmp_path, lambda: [CALLBACKS[n]() for n in names])
