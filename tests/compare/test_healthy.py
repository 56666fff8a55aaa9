"""diagnose is silent about healthy trainings"""
from functools import lru_cache

import numpy as np
import pytest
import torch
from fastai.basics import (SGD, Adam, Callback, CancelStepException, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, MSELossFlat,
                           RMSProp, nn, params, partial, ranger, set_seed)
from fastai.callback.schedule import * # adds fit_one_cycle and others to Learner  # noqa: F403
from fastai.callback.training import GradientAccumulation
from fastai.layers import ConvLayer, ResBlock
from fastai.losses import LabelSmoothingCrossEntropyFlat
from fastai.vision.models.xresnet import xresnet18
from helpers import quiet
from sklearn.datasets import load_diabetes, load_digits

import fastai_bnstats.freeze # noqa: F401  adds freeze_non_bn and freeze_body to Learner
from fastai_bnstats.compare import diagnose, find_spikes
from fastai_bnstats.record import ActivationHistCallback, GradHistCallback, UpdateHistCallback, WeightHistCallback

@lru_cache
def pictures(*classes):
    "Digits of these classes, in three colours: (picture, class)"
    xs, ys = load_digits(return_X_y=True)
    keep = np.isin(ys, classes)
    xs, ys = torch.tensor(xs[keep]).float().view(-1, 1, 8, 8).expand(-1, 3, -1, -1)/8-1, torch.tensor(ys[keep]-min(classes))
    return list(zip(xs, ys))


def batches(items, bs, n): return DataLoaders(DataLoader(items[:n], bs=bs, shuffle=True, drop_last=True), DataLoader(items[n:n+100], bs=bs))


ALL = WeightHistCallback, GradHistCallback, UpdateHistCallback, ActivationHistCallback


def conv(bn=True, classes=4):
    norm = nn.BatchNorm2d if bn else lambda n: nn.Identity()
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), norm(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), norm(16), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes)))


def residual():
    "The last gamma of each block starts at 0"
    body = nn.Sequential(ConvLayer(3, 8, stride=2), ResBlock(1, 8, 8), ResBlock(1, 8, 8))
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(.2), nn.Linear(8, 4)))


def mlp():
    body = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.LayerNorm(32), nn.GELU())
    return nn.Sequential(body, nn.Sequential(nn.Linear(32, 4)))


class Attention(nn.Module):
    "Each row of a picture is a word"
    def __init__(self):
        super().__init__()
        self.start, self.head = nn.Linear(24, 16), nn.Linear(16, 4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=.1, batch_first=True)
    def forward(self, x): return self.head(self.block(self.start(x.permute(0, 2, 1, 3).flatten(2))).mean(1))


def xresnet(): return xresnet18(n_out=4)


def two_groups(m): return [params(m[0]), params(m[1:])]


def learner(model, *cbs, bs=32, record=ALL, every=1, loss=CrossEntropyLossFlat, dls=None, **kwargs):
    dls = dls or batches(pictures(6, 7, 8, 9), bs, 560)
    return quiet(Learner(dls, model, loss_func=loss(), cbs=[*(cb('all', every=every) for cb in record), *cbs], **kwargs))


def findings(learn): return diagnose(*(cb.recording for cb in learn.cbs if isinstance(cb, ALL)))


class Overflow(Callback):
    "Skips a step whose gradient is infinite, as mixed precision does"
    order = 10
    def before_step(self):
        if self.train_iter not in (3, 4, 30): return
        next(p.grad for p in self.model.parameters() if p.grad is not None).view(-1)[0] = float('inf')
        raise CancelStepException


@pytest.mark.parametrize('fit, kwargs', [
    (lambda l: l.fit(2, 3e-3), dict(model=conv)),
    (lambda l: l.fit_one_cycle(3, 1e-2), dict(model=residual)),
    (lambda l: l.fit_flat_cos(2, 3e-3), dict(model=mlp, opt_func=ranger)),
    (lambda l: l.fit(2, 1e-3), dict(model=Attention)),
    pytest.param(lambda l: l.fit_one_cycle(2, 3e-3), dict(model=xresnet), marks=pytest.mark.slow),
    (lambda l: l.fit(3, 1e-2), dict(model=conv, every=4, opt_func=SGD)),
    (lambda l: l.fit(2, 3e-3), dict(model=conv, cbs=[Overflow])),
    (lambda l: l.fit(3, 3e-3), dict(model=residual, cbs=[partial(GradientAccumulation, 64)], loss=LabelSmoothingCrossEntropyFlat))],
    ids=['bn', 'zero gamma', 'layer norm', 'attention', 'xresnet', 'thinned', 'skipped', 'accumulated'])
def test_healthy(fit, kwargs):
    kwargs = dict(kwargs)
    learn = learner(kwargs.pop('model')(), *(cb() for cb in kwargs.pop('cbs', [])), **kwargs)
    fit(learn)
    assert findings(learn) == []


def test_frozen_phases_and_several_fits():
    learn = learner(residual())
    for freeze in (learn.freeze_body, learn.freeze_non_bn, learn.unfreeze):
        freeze()
        learn.fit_one_cycle(1, 1e-2)
    assert findings(learn) == [] and len(set(learn.weight_hist.recording.fit)) == 3


@pytest.mark.parametrize('bn', [True, False])
def test_a_new_head_whose_loss_falls_steeply(bn):
    model = conv(bn, 6)
    pretrain = learner(model, record=[], dls=batches(pictures(*range(6)), 32, 900))
    pretrain.fit_one_cycle(2, 1e-2)
    model[1] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    nn.init.normal_(model[1][2].weight, std=30) # the first losses are large
    learn = learner(model, splitter=two_groups)
    learn.fit_one_cycle(3, slice(1e-3, 1e-1))
    rec = learn.weight_hist.recording
    assert rec.loss[:3].mean() > 3*rec.loss[-10:].mean() and findings(learn) == []


def diabetes(bs):
    xs, ys = load_diabetes(return_X_y=True)
    xs, ys = torch.tensor(xs/xs.std(0)).float(), torch.tensor((ys-ys.mean())/ys.std()).float()[:, None]
    return batches(list(zip(xs, ys)), bs, 340)


class WrongLabels(Callback):
    order = -5
    def before_batch(self):
        if self.training: self.learn.yb = (torch.where(torch.rand(len(self.y)) < .03, torch.randint(0, 4, self.y.shape), self.y),)


def draw(rng):
    "A learner and its fit, chosen at random among what people do"
    name, bs = rng.choice(['bn', 'no bn', 'residual', 'mlp', 'attention', 'regression']), int(rng.choice([8, 16, 32, 64]))
    opt, lr = [(Adam, 3e-3), (Adam, 3e-3), (partial(SGD, mom=.9), 3e-2), (ranger, 3e-3), (RMSProp, 1e-3)][rng.integers(5)]
    lr, epochs = lr*10**rng.uniform(-.6, .3), int(rng.choice([2, 4, 8] if bs > 16 else [2, 3]))
    record, every = [cb for cb in ALL if rng.random() < .5] or ALL, int(rng.choice([1, 1, 4]))
    extra = [Overflow, partial(GradientAccumulation, 3*bs), *([] if name == 'regression' else [WrongLabels])]
    kwargs = dict(bs=bs, record=record, every=every, opt_func=opt)
    if name == 'regression':
        body = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        model, kwargs = nn.Sequential(body, nn.Linear(32, 1)), dict(kwargs, dls=diabetes(bs), loss=MSELossFlat)
    else:
        model = dict(bn=conv, residual=residual, mlp=mlp, attention=Attention, **{'no bn': partial(conv, False)})[name]()
        kwargs['loss'] = LabelSmoothingCrossEntropyFlat if rng.random() < .3 else CrossEntropyLossFlat
    if name != 'attention': kwargs['splitter'] = two_groups
    learn = learner(model, *(cb() for cb in extra if rng.random() < .2), **kwargs)
    how = rng.choice(['fit', 'fit_one_cycle', 'fit_flat_cos', 'fine_tune'][:3 if name == 'attention' else 4])
    if name in ('bn', 'residual') and rng.random() < .3:
        learn.freeze_non_bn()
        learn.fit(1, lr)
        learn.unfreeze()
    getattr(learn, how)(epochs, lr)
    return learn, f'{name}, batch size {bs}, {how}, {epochs} epochs, learning rate {lr:.2g}'


@pytest.mark.slow
def test_many_healthy_trainings():
    "Findings in 60 trainings whose architecture, optimizer, schedule and data are chosen at random; the notebooks state what came out"
    wrong, losses = {}, 0
    for seed in range(60):
        set_seed(seed)
        learn, what = draw(np.random.default_rng(seed))
        found = findings(learn)
        losses += len(next(iter(found.recs.values())).loss)
        if found: wrong[what] = found
    assert not wrong, f'{losses} minibatches'


@pytest.mark.parametrize('noise', [lambda rng, n: 1+.2*rng.normal(size=n), lambda rng, n: np.exp(.3*rng.normal(size=n)),
                                   lambda rng, n: rng.gamma(4, 1/4, n)])
def test_alarms_about_noise_are_rare(noise):
    rngs = [np.random.default_rng(k) for k in range(60)]
    found = sum(len(find_spikes((1+2*np.exp(-np.arange(400)/100))*noise(rng, 400))) for rng in rngs)
    assert found <= 5 # of 24,000
