"""Probing does not change a training by one bit: weights, buffers, gradients, optimizer state and random numbers"""
import gc
import random
import warnings

import fastai.callback.schedule # noqa: F401  adds fit_one_cycle to Learner
import numpy as np
import pytest
import torch
from fastai.basics import (SGD, Adam, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper, Tensor, nn, partial,
                           set_seed)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import ActivationStats, hook_output
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import ranger
from helpers import quiet, tiny_learner, tiny_model

from fastai_bnstats.freeze import LedgerCallback
from fastai_bnstats.landscape import LandscapeCallback
from fastai_bnstats.record import GradHistCallback, OutputGradHistCallback, UpdateHistCallback

WAYS = dict(update={}, gradient=dict(lr=.1), distance={})


class Draws(nn.Module):
    "Draws from all random generators in each forward pass, and remembers it outside of buffers"
    past = 0.
    def forward(self, x):
        if not self.training: return x
        self.past = x.detach().mean()*.01+.9*self.past
        return x*(1+.01*random.random()+.01*np.random.rand()+.01*torch.rand(())+self.past)


def model_with(*extra):
    body, head = tiny_model()
    return nn.Sequential(nn.Sequential(*body, *extra), head)


class FakeScaler(MixedPrecision):
    "Mixed precision without a GPU, with an active scaler"
    def before_fit(self):
        super().before_fit()
        self.autocast = torch.autocast('cpu', torch.bfloat16)
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=1024., growth_interval=2)


class Watch(Callback):
    "Everything that a training has, as bytes, after each backward pass and after each step"
    order = 90
    def __init__(self): self.seen = []
    def look(self):
        state = [v for p in self.opt.all_params() for v in self.state_of(p[0]).values()] if self.opt else []
        tensors = [*self.model.state_dict().values(), *(p.grad for p in self.model.parameters() if p.grad is not None), *state]
        scale = getattr(self.learn, 'scaler', None)
        rngs = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
        copies = [t.detach().clone() if isinstance(t, Tensor) else t for t in tensors]
        self.seen.append([*copies, *rngs, scale and scale.get_scale(), self.loss.item()])
    def state_of(self, p):
        opt = self.opt.opt if hasattr(self.opt, 'opt') else self.opt
        return opt.state[p]
    def after_backward(self): self.look()
    def before_step(self): self.look()
    def after_step(self): self.look()
    def after_validate(self): self.look()


def same(a, b):
    if isinstance(a, Tensor): return a.equal(b) or torch.equal(a.nan_to_num(), b.nan_to_num()) and a.isnan().equal(b.isnan())
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b or a != a and b != b


def accumulated(): return tiny_learner(model_with(), cbs=GradientAccumulation(32))
def clipped(): return tiny_learner(model_with(), cbs=GradientClip(.1))


def frozen():
    learn = tiny_learner(model_with(nn.Dropout(.3)), cbs=LedgerCallback())
    learn.fit(1)
    learn.freeze_non_bn()
    return learn


def frozen_in_place():
    "With an old gradient, so that weight decay still moves what does not train"
    learn = tiny_learner(model_with(), wd=.1)
    learn.fit(1)
    learn.model[0][0].weight.requires_grad = False
    return learn


def spectral(): return tiny_learner(nn.Sequential(nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)), nn.ReLU()),
                                                  nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))))


CASES = {
    'Adam': lambda: tiny_learner(model_with()), 'SGD': lambda: tiny_learner(model_with(), opt_func=SGD, moms=(.9, .9, .9)),
    'Adam with L2 decay': lambda: tiny_learner(model_with(), opt_func=partial(Adam, decouple_wd=False), wd=.1),
    'ranger': lambda: tiny_learner(model_with(), opt_func=partial(ranger, k=2)),
    'dropout': lambda: tiny_learner(model_with(nn.Dropout(.5))), 'all generators': lambda: tiny_learner(model_with(Draws())),
    'accumulation': accumulated, 'clipping': clipped, 'frozen': frozen, 'frozen with old gradients': frozen_in_place,
    'scaler': lambda: tiny_learner(model_with(), cbs=FakeScaler()), 'MixUp': lambda: tiny_learner(model_with(), cbs=MixUp()),
    'spectral norm': spectral, 'one-cycle': lambda: tiny_learner(model_with(nn.Dropout(.1))),
}


def seen(make, cb, fit='fit'):
    set_seed(3)
    learn = make()
    set_seed(3)
    for dl in learn.dls.loaders: dl.rng = random.Random(0)
    watch = Watch()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # AMP without a GPU
        getattr(learn, fit)(2, 1e-2, cbs=[watch, *([cb] if cb else [])])
    return watch.seen, learn


@pytest.mark.parametrize('along', WAYS)
@pytest.mark.parametrize('case', CASES)
def test_no_bit_of_the_training_changes(case, along):
    fit = 'fit_one_cycle' if case == 'one-cycle' else 'fit'
    want, _ = seen(CASES[case], None, fit)
    cb = LandscapeCallback(every=1, along=along, **WAYS[along])
    got, learn = seen(CASES[case], cb, fit)
    assert len(cb.recording) == len({*cb.recording.step}) >= 3
    assert len(want) == len(got) and all(map(same, want, got))
    assert np.isfinite(cb.recording.loss).all() and (cb.recording.distance[:, 0] > 0).all()


@pytest.mark.filterwarnings('ignore:Exception occured in `ActivationStats`', 'ignore:You are shadowing an attribute .modules.')
def test_other_callbacks_see_the_same():
    def run(*probe):
        set_seed(0)
        learn = tiny_learner(model_with(nn.Dropout(.2)))
        cbs = [ActivationStats(every=1), GradHistCallback(), UpdateHistCallback(), OutputGradHistCallback()]
        for dl in learn.dls.loaders: dl.rng = random.Random(0)
        learn.fit(2, cbs=[*cbs, *probe])
        return cbs
    a, b = run(), run(LandscapeCallback(every=1))
    assert str(a[0].stats) == str(b[0].stats) and len(a[0].stats)
    assert all(x.recording.is_same(y.recording) for x, y in zip(a[1:], b[1:]))


class Trained(Callback):
    "Loss, and length of the gradient, of each training step"
    order = 54
    def __init__(self): self.seen = []
    def before_step(self):
        grad = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.seen.append([self.loss.item(), grad.norm().item()])


@pytest.mark.filterwarnings('ignore::UserWarning') # AMP without a GPU
@pytest.mark.parametrize('other, rel', [(MixUp, 1e-5), (FakeScaler, .05)]) # a probe has the precision of the weights
def test_loss_and_gradient_are_those_of_the_training(other, rel):
    cb, trained = LandscapeCallback(every=1), Trained()
    tiny_learner(cbs=[other(), cb, trained]).fit(1)
    loss, grad = np.array(trained.seen).T
    assert cb.recording.start == pytest.approx(loss, rel=rel)
    assert cb.recording.grad[:, 0] == pytest.approx(grad, rel=rel)


def test_a_loss_function_with_a_state_of_its_own():
    class Counting(nn.Module):
        def __init__(self): super().__init__(); self.calls, self.mean = 0, torch.zeros(())
        def forward(self, pred, y):
            self.calls += 1
            loss = nn.functional.cross_entropy(pred, y)
            self.mean.mul_(.9).add_(loss.detach(), alpha=.1)
            return loss*(1+.01*self.mean)
    def run(*cbs):
        set_seed(0)
        learn = tiny_learner(model_with(), cbs=cbs)
        learn.loss_func = Counting()
        for dl in learn.dls.loaders: dl.rng = random.Random(0)
        learn.fit(2)
        return learn.loss_func.calls, learn.loss_func.mean.item(), [p.sum().item() for p in learn.model.parameters()]
    assert run() == run(LandscapeCallback(every=1))


def test_scripted_modules_and_hooks_on_gradients():
    def run(*cbs):
        set_seed(0)
        model = nn.Sequential(nn.Sequential(torch.jit.script(nn.ReLU6()), nn.Conv2d(3, 4, 3)), tiny_model()[1])
        learn, norms = tiny_learner(model, cbs=cbs), []
        for dl in learn.dls.loaders: dl.rng = random.Random(0)
        with hook_output(model[0][1], grad=True) as hook:
            class Keep(Callback):
                order = 90
                def after_step(self): norms.append(hook.stored[0].norm().item())
            learn.fit(1, cbs=Keep())
            hooks = len(model[0][1]._backward_hooks)
        return norms, hooks
    cb = LandscapeCallback(every=1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # torch.jit.script, and torch's own advice about this kind of hook
        assert run() == run(cb)
    assert len(cb.recording) == 4


def test_sparse_gradients():
    x, y = torch.randint(0, 9, (16,)), torch.randint(0, 2, (16,))
    dls = DataLoaders(*[DataLoader(list(zip(x, y)), bs=8)]*2)
    cb = LandscapeCallback(every=1)
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2))
    quiet(Learner(dls, model, loss_func=CrossEntropyLossFlat(), opt_func=partial(OptimWrapper, opt=torch.optim.SGD), cbs=cb)).fit(1, .1)
    assert len(cb.recording) == 2 and np.isfinite(cb.recording.change).all()


def test_a_language_model_keeps_its_memory():
    from fastai.callback.rnn import ModelResetter, RNNCallback
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import LinearDecoder, SequentialRNN
    xs = torch.randint(0, 20, (24, 8), generator=torch.Generator().manual_seed(0))
    def run(*probe):
        set_seed(1)
        enc = AWD_LSTM(20, 8, 12, 2)
        model = SequentialRNN(enc, LinearDecoder(20, 8, .1, tie_encoder=enc.encoder))
        dls = DataLoaders(*[DataLoader([(x[:-1], x[1:]) for x in xs], bs=4)]*2)
        learn = quiet(Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=[ModelResetter(), RNNCallback(), *probe]))
        learn.fit(1, 1e-2)
        return model
    cb = LandscapeCallback(every=2)
    a, b = run(), run(cb)
    assert len(cb.recording) == 3 and np.isfinite(cb.recording.loss).all()
    assert all(v.equal(b.state_dict()[k]) for k, v in a.state_dict().items())
    assert all(x.equal(y) for s, t in zip(a[0].hidden, b[0].hidden) for x, y in zip(s, t))


class Counts(nn.Module):
    "Counts the tensors of one shape that live in each forward pass"
    def __init__(self, n=37):
        super().__init__()
        self.shape, self.seen = (n, n), []
        self.layer = nn.Linear(n, n)
        self.scale = nn.Linear(1, 1)
    def forward(self, x):
        self.seen.append(sum(issubclass(type(o), Tensor) and o.shape == self.shape for o in gc.get_objects()))
        return self.layer(x)*self.scale(x[:, :1])


@pytest.mark.parametrize('along, copies', [('update', 3), ('gradient', 2), ('distance', 2)])
def test_copies_of_the_weights(along, copies):
    x, y = torch.randn(8, 37), torch.randint(0, 37, (8,))
    model = Counts()
    dls = DataLoaders(*[DataLoader([(x, y)]*4, bs=None)]*2)
    cb = LandscapeCallback(every=2, along=along, **WAYS[along])
    learn = quiet(Learner(dls, nn.Sequential(model), loss_func=CrossEntropyLossFlat(), cbs=cb))
    gc.collect()
    learn.fit(1)
    assert len(cb.recording) == 2 and max(model.seen) == copies+4 # the weights, their gradient, and two averages of Adam


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_everything_is_set_back_after_an_error(error):
    class Fails(nn.Module):
        calls = 0
        def forward(self, x):
            Fails.calls += self.training
            if Fails.calls == 4: raise error('in the middle of a probe')
            return x
    learn = tiny_learner(model_with(Fails(), nn.Dropout(.3)), cbs=LandscapeCallback(every=1))
    before = {n: t.clone() for n, t in learn.model.state_dict().items() if 'running' not in n and 'tracked' not in n}
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt): learn.fit(1, 1e-2)
        assert all(v.equal(learn.model.state_dict()[k]) for k, v in before.items())
    else:
        text = 'LandscapeCallback stopped recording in before_step: RuntimeError: in the middle of a probe. Training goes on'
        with pytest.warns(UserWarning, match=text): learn.fit(1, 1e-2)
        assert not all(v.equal(learn.model.state_dict()[k]) for k, v in before.items()) # training went on
        assert len(learn.landscape.recording) == 0


def test_places_and_phases():
    learn = tiny_learner(cbs=LandscapeCallback(every=3))
    learn.landscape.phase = 'first'
    learn.fit(2)
    learn.landscape.phase = None
    learn.fit(1)
    land = learn.landscape.recording
    assert land.step.tolist() == [0, 3, 6, 8, 11] and land.phase.tolist() == ['first']*3+['fit1']*2
    assert land.epoch.tolist() == [0, 0, 1, 0, 0] and land.batch.tolist() == [0, 3, 2, 0, 3]
    assert land.meta['every'] == 3 and 0 < land.meta['overhead']['share'] < 1
    learn.validate(); learn.get_preds()
    assert learn.landscape.recording.is_same(land)
    learn.landscape.reset()
    assert len(learn.landscape.recording) == 0


@pytest.mark.parametrize('kwargs, text', [
    (dict(along='up'), "along must be 'update', 'gradient' or 'distance'. Found 'up'"),
    (dict(every=0), 'every must be a whole number of at least 1. Found 0'),
    (dict(along='gradient'), "along='gradient' needs lr="),
    (dict(lr=.1), "the other ways don't take it. Found along='update' and lr=0.1"),
    (dict(points=()), r'points must be positive numbers, such as \(0.5, 1, 2, 4\). Found \(\)'),
    (dict(points=(1, -1)), 'points must be positive numbers'), (dict(points='ab'), 'points must be positive numbers'),
    (dict(along=['update']), "along must be 'update'"), (dict(along='gradient', lr='1e-2'), "lr must be a positive number. Found '1e-2'")])
def test_wrong_arguments(kwargs, text):
    with pytest.raises(ValueError, match=text): LandscapeCallback(**kwargs)


def test_a_wrong_head_raises_before_training_and_no_head_is_no_obstacle():
    with pytest.raises(ValueError, match="head= must be a module or parameter of the model, or its name. Found 'tail'"):
        tiny_learner(cbs=LandscapeCallback(head='tail')).fit(1)
    cb = LandscapeCallback(every=1)
    tiny_learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), cbs=cb).fit(1)
    land = cb.recording
    assert len(land) == 4 and np.isfinite(land.measure('beta')).all()


@pytest.mark.parametrize('lr', [0., -.1, float('nan')])
def test_a_learning_rate_that_is_no_step(lr):
    with pytest.raises(ValueError, match='lr must be a positive number. Found'): LandscapeCallback(along='gradient', lr=lr)


def test_a_callback_belongs_to_one_model():
    cb = LandscapeCallback(every=1)
    tiny_learner(cbs=cb).fit(1)
    learn = tiny_learner(cbs=cb)
    text = 'has the probes of another model. Give each learner its own callback, or call learn.landscape.reset'
    with pytest.raises(ValueError, match=text): learn.fit(1)
    cb.reset()
    learn.fit(1)
    assert len(cb.recording) == 4


def test_points_as_an_array_or_a_number():
    assert LandscapeCallback(points=np.array([1, 2])).points == (1, 2) and LandscapeCallback(points=2).points == (2,)
