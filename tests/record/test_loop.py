"""`record` in a plain PyTorch loop gives what the callbacks give in fastai"""
import gc
import sys
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import DataLoaders, OptimWrapper, nn, set_seed
from helpers import tiny_learner, tiny_model

from fastai_bnstats.record import GradHistCallback, UpdateHistCallback, WeightHistCallback, record
from fastai_bnstats.recording import Recording

CALLBACKS = dict(weights=WeightHistCallback, gradients=GradHistCallback, updates=UpdateHistCallback)


sgd = partial(torch.optim.SGD, lr=.05, momentum=.9, weight_decay=.01)


def batches(n=4):
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 3, 8, 8, generator=g), torch.randint(0, 2, (16,), generator=g)) for _ in range(n)]


def by_fastai(epochs=2, **kwargs):
    data = batches()
    cbs = [cb(**kwargs) for cb in CALLBACKS.values()]
    learn = tiny_learner(dls=DataLoaders(data, data[:2]), opt_func=partial(OptimWrapper, opt=sgd), lr=.05, cbs=cbs)
    learn.fit(epochs)
    return learn.model, {q: cb.recording for q, cb in zip(CALLBACKS, cbs, strict=True)}


def by_loop(epochs=2, valid=True, model=None, **kwargs):
    set_seed(1)
    model = model or tiny_model()
    opt, loss_func, data = sgd(model.parameters()), nn.CrossEntropyLoss(), batches()
    with record(model, opt, **kwargs) as rec:
        for _ in range(epochs):
            model.train()
            for x, y in data:
                loss = loss_func(model(x), y)
                rec.add_loss(loss)
                loss.backward()
                opt.step()
                opt.zero_grad()
            model.eval()
            with torch.no_grad():
                for x, y in data[:2] if valid else []: rec.add_valid_loss(loss_func(model(x), y), len(x))
            rec.next_epoch()
    return model, rec


@pytest.mark.parametrize('kwargs', [{}, dict(every=3, bins=7), dict(layers='*.weight', range=2.)])
def test_the_same_recordings_as_with_fastai(kwargs):
    (theirs, expected), (model, rec) = by_fastai(**kwargs), by_loop(**kwargs)
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), theirs.state_dict().values(), strict=True))
    for q, e in expected.items():
        got = getattr(rec, q)
        assert got.is_same(e), [n for n in ('hist', 'mean', 'var', 'loss', 'valid_loss', 'step', 'batch', 'lr', 'edges')
                                if not np.array_equal(getattr(got, n), getattr(e, n), equal_nan=getattr(e, n).dtype.kind == 'f')]
        assert got.meta['quantity'] == q and got.meta['phases'] == ['fit0']


def test_recording_changes_no_bit_of_the_training():
    recorded, _ = by_loop()
    set_seed(1)
    model = tiny_model()
    opt = sgd(model.parameters())
    for _ in range(2):
        model.train()
        for x, y in batches():
            nn.CrossEntropyLoss()(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), recorded.state_dict().values(), strict=True))


def test_running_statistics_are_updates_of_their_step():
    "An update is the change from the end of one step to the end of the next, so it includes what the forward pass changes"
    model, rec = by_loop(epochs=1, valid=False, layers='all')
    u, w = rec.updates.sel(layers='0.1.running_mean'), rec.weights.sel(layers='0.1.running_mean')
    assert (u.step_norm > 0).all() and np.allclose(np.diff(w.mean[:, 0]), u.mean[1:, 0], atol=1e-7)


def train(model, opt, steps=3, x=None):
    x = torch.ones(2, 4) if x is None else x
    for _ in range(steps):
        opt.zero_grad()
        model(x).sum().backward()
        opt.step()


def test_without_an_optimizer_those_of_the_model_count_and_others_do_not():
    model, other = nn.Linear(4, 1), nn.Linear(4, 1)
    with record(model) as rec:
        train(model, torch.optim.SGD(model.parameters(), .1))
        train(other, torch.optim.SGD(other.parameters(), .1))
        train(model, torch.optim.Adam(model.parameters(), .2), 2)
    train(model, torch.optim.SGD(model.parameters(), .1)) # after the end
    assert len(rec.weights) == 5 and rec.weights.lr[:, 0].tolist() == [.1]*3+[.2]*2 and rec.weights.batch.tolist() == [*range(5)]
    one, two = (torch.optim.SGD(p, .1) for p in ([model.weight], [model.bias]))
    with record(model, two) as rec:
        train(model, one)
        train(model, two, 1)
    assert len(rec.weights) == 1


def test_a_closure_computes_the_gradient_within_the_step():
    model = nn.Linear(4, 1, bias=False)
    opt, seen = torch.optim.SGD(model.parameters(), .1), []
    def closure():
        opt.zero_grad()
        loss = model(torch.ones(2, 4)).pow(2).sum()
        loss.backward()
        seen.append(model.weight.grad.double().mean().item())
        return loss
    with record(model, opt) as rec:
        for _ in range(3): opt.step(closure)
    assert np.allclose(rec.gradients.mean[:, 0], seen, rtol=1e-6)


def test_an_optimizer_that_calls_another_makes_one_row_a_step():
    class Twice(torch.optim.Optimizer):
        def __init__(self, inner): self.inner = inner; super().__init__(inner.param_groups, {})
        def step(self, closure=None): self.inner.step(); self.inner.step()
    model = nn.Linear(4, 1)
    opt = Twice(torch.optim.SGD(model.parameters(), .1))
    with record(model) as rec: train(model, opt)
    assert len(rec.weights) == 3 and np.isclose(rec.updates.step_norm[0, 0], .1*2*2*2) # two steps of .1 times a gradient of 2, 4 weights


def test_after_an_error_in_a_step_recording_goes_on():
    class Fails(torch.optim.SGD):
        broken = False
        def step(self, closure=None):
            if self.broken: raise RuntimeError('no step')
            return super().step(closure)
    model = nn.Linear(4, 1)
    opt = Fails(model.parameters(), .1)
    with record(model) as rec:
        train(model, opt, 1)
        opt.broken = True
        with pytest.raises(RuntimeError, match='no step'): train(model, opt, 1)
        opt.broken = False
        train(model, opt, 1)
    assert len(rec.weights) == 2


def test_an_error_in_recording_warns_once_and_training_goes_on(monkeypatch):
    model = nn.Linear(4, 1)
    opt = torch.optim.SGD(model.parameters(), .1)
    with record(model) as rec:
        train(model, opt, 2)
        monkeypatch.setattr(rec.recorders['weights'], 'values', lambda: 1/0)
        with pytest.warns(UserWarning, match=r'record \(weights\) stopped recording in end_step') as seen: train(model, opt, 4)
    assert len(seen) == 1 and len(rec.weights) == 2 and len(rec.updates) == 6


def test_an_error_in_the_loop_keeps_what_was_recorded(tmp_path):
    model = nn.Linear(4, 1)
    with pytest.raises(KeyboardInterrupt), record(model, path=tmp_path/'run') as rec:
        train(model, torch.optim.SGD(model.parameters(), .1))
        raise KeyboardInterrupt
    assert Recording.load(tmp_path/'run'/'weights').is_same(rec.weights) and len(rec.weights) == 3
    with record(model, path=tmp_path/'run', resume=True, phase='again') as more: train(model, torch.optim.SGD(model.parameters(), .1))
    whole = Recording.load(tmp_path/'run'/'updates')
    assert whole.step.tolist() == [*range(6)] and whole.phase.tolist() == ['fit0']*3+['again']*3 and whole.is_same(more.updates)


def test_copies_of_the_weights_are_gone_after_the_end():
    model = nn.Linear(4, 1)
    with record(model) as rec:
        train(model, torch.optim.SGD(model.parameters(), .1))
        assert rec.recorders['updates'].past is not None
    assert rec.recorders['updates'].past is None and len(rec.updates) == 3


def test_replaced_layers_are_followed():
    model = nn.Sequential(nn.Linear(4, 1))
    with record(model) as rec:
        train(model, torch.optim.SGD(model.parameters(), .1), 1)
        model[0] = nn.Linear(4, 1)
        opt = torch.optim.SGD(model.parameters(), .1)
        with pytest.warns(UserWarning, match=r'replaced during the fit: 0\.weight'): train(model, opt, 1)
    assert np.isclose(rec.weights.mean[-1, 0], model[0].weight.double().mean().item())


def test_wrappers_of_models_and_optimizers():
    from accelerate import Accelerator
    model, seen = nn.Linear(4, 1), []
    acc = Accelerator(cpu=True)
    wrapped, opt = acc.prepare(nn.DataParallel(model), torch.optim.SGD(model.parameters(), .1))
    with record(wrapped, opt) as rec:
        wrapped(torch.ones(2, 4)).sum().backward()
        opt.step()
        seen.append(model.weight.double().mean().item())
    assert rec.weights.names.tolist() == ['weight'] and np.allclose(rec.weights.mean[:, 0], seen)


def scaled(opt_func):
    "Three steps of mixed precision, the second with an infinite gradient"
    model = nn.Linear(4, 1, bias=False)
    opt = opt_func(model.parameters(), lr=.1)
    scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    with record(model, opt) as rec:
        for x in (torch.ones(2, 4), torch.full((2, 4), float('inf')), torch.ones(2, 4)):
            opt.zero_grad()
            scaler.scale(model(x).sum()).backward()
            scaler.step(opt)
            scaler.update()
    return rec


def test_gradient_scaling_records_unscaled_gradients_and_no_skipped_step():
    rec = scaled(torch.optim.SGD)
    assert len(rec.gradients) == 2 and np.allclose(rec.gradients.mean, 2)


@pytest.mark.parametrize('kwargs,error,text', [
    (dict(quantities='outputs'), ValueError, "must have some of weights, gradients, updates. Found 'outputs'"),
    (dict(quantities=()), ValueError, 'quantities is empty'),
    (dict(optimizer='adam'), TypeError, 'must be a torch.optim.Optimizer. Found builtins.str. With a fastai Learner'),
    (dict(path=''), ValueError, 'path must name a folder'), (dict(resume=True), ValueError, 'since resume=True continues'),
    (dict(bins=0), ValueError, 'bins must be'), (dict(every=0), ValueError, 'every must be')])
def test_wrong_arguments(kwargs, error, text):
    with pytest.raises(error, match=text): record(nn.Linear(4, 1), **kwargs)


def test_what_is_no_model():
    with pytest.raises(TypeError, match='model must be a torch.nn.Module. Found generator'): record(nn.Linear(4, 1).parameters())


def test_wrong_layers_raise_at_the_start_and_leave_nothing_behind(tmp_path):
    before = len(sys.modules['torch.optim.optimizer']._global_optimizer_pre_hooks)
    with pytest.raises(ValueError, match='matches no parameter'), record(nn.Linear(4, 1), layers='conv*', path=tmp_path/'a'): pass
    rec = record(nn.Linear(4, 1)).start()
    with pytest.raises(RuntimeError, match='has started already'): rec.start()
    rec.stop()
    rec.stop() # again does no harm
    assert len(sys.modules['torch.optim.optimizer']._global_optimizer_pre_hooks) == before
    with pytest.raises(AttributeError, match=r"has no updates: it was made with quantities=\['weights'\]"):
        _ = record(nn.Linear(4, 1), quantities='weights').updates
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 'Recording of weights: 0 rows' in repr(rec) # without a step


def test_gradients_are_read_before_the_step():
    class Scales(torch.optim.SGD):
        def step(self, closure=None):
            for g in self.param_groups:
                for p in g['params']: p.grad.mul_(.01)
            return super().step(closure)
    model = nn.Linear(4, 1, bias=False)
    opt = Scales(model.parameters(), .1)
    with record(model) as rec:
        train(model, opt)
        opt.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        opt.step(None) # as accelerate calls it
    assert np.allclose(rec.gradients.mean, 2)


@pytest.mark.parametrize('made_before', [False, True])
def test_a_step_that_calls_that_of_its_parent_is_one_row(made_before):
    "torch adds the hooks to a class when its first optimizer is made, so the parent's `step` may call them, too"
    class Parent(torch.optim.SGD):
        def step(self, closure=None): return super().step(closure)
    class Clamped(Parent):
        def step(self, closure=None):
            super().step(closure)
            super().step(closure)
            for g in self.param_groups:
                for p in g['params']: p.data.clamp_(-.01, .01)
    if made_before: Parent([nn.Parameter(torch.zeros(1))], .1)
    model = nn.Linear(4, 1, bias=False)
    with record(model) as rec: train(model, Clamped(model.parameters(), .1))
    assert len(rec.weights) == 3 and np.allclose(rec.weights.mean[-1], -.01)


def test_a_wrapper_with_a_step_of_its_own_is_measured_after_it():
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            super().__init__(optimizer.param_groups, {})
        def step(self, closure=None):
            self.optimizer.step()
            for g in self.param_groups:
                for p in g['params']: p.data.add_(1)
    model = nn.Linear(4, 1, bias=False)
    opt = Lookahead(torch.optim.SGD(model.parameters(), .1))
    with record(model, opt) as given: train(model, opt, 1)
    assert np.isclose(given.weights.mean[0, 0], model.weight.double().mean().item())


def test_after_an_error_in_the_step_of_one_optimizer_others_are_recorded():
    model = nn.Linear(4, 1)
    with record(model) as rec:
        with pytest.raises(ZeroDivisionError): torch.optim.LBFGS(model.parameters()).step(lambda: 1/0)
        train(model, torch.optim.SGD(model.parameters(), .1))
    assert len(rec.weights) == 3


def test_parameters_that_an_optimizer_gets_later():
    model, other = nn.Linear(4, 1), nn.Linear(4, 1)
    opt = torch.optim.SGD(other.parameters(), .1)
    with record(model) as rec:
        train(other, opt, 1)
        opt.add_param_group({'params': model.parameters()})
        train(model, opt)
    assert len(rec.weights) == 3


@pytest.mark.parametrize('defaults', [{}, {'lr': None}])
def test_an_optimizer_without_a_learning_rate(defaults):
    class NoRate(torch.optim.Optimizer):
        def step(self, closure=None):
            for g in self.param_groups:
                for p in g['params']: p.data.sub_(.1*p.grad)
    model = nn.Linear(4, 1)
    with record(model) as rec: train(model, NoRate(model.parameters(), defaults))
    assert len(rec.weights) == 3 and np.isnan(rec.weights.lr).all()


@pytest.mark.parametrize('loss', [1., np.float32(1), torch.ones(2), torch.ones((), requires_grad=True)])
def test_losses_of_all_kinds(loss):
    model = nn.Linear(4, 1)
    with record(model) as rec:
        rec.add_loss(loss)
        train(model, torch.optim.SGD(model.parameters(), .1), 1)
        rec.add_valid_loss(loss, 4)
    assert rec.weights.loss.tolist() == rec.weights.valid_loss.tolist() == [1.]


def test_a_wrong_loss_does_not_spoil_what_is_there(tmp_path):
    model = nn.Linear(4, 1)
    with record(model, path=tmp_path/'run') as rec:
        train(model, torch.optim.SGD(model.parameters(), .1))
        with pytest.warns(UserWarning, match='stopped recording in keep_loss'): rec.add_loss('low')
    assert len(rec.weights) == 3 and Recording.load(tmp_path/'run'/'weights').is_same(rec.weights) # and on disk


def test_two_records_can_not_share_a_folder(tmp_path):
    model = nn.Linear(4, 1)
    opt = torch.optim.SGD(model.parameters(), .1)
    with record(model, path=tmp_path/'run'):
        train(model, opt)
        with pytest.raises(FileExistsError, match='in use by another'): record(model, path=tmp_path/'run', resume=True).start()
        train(model, opt)
    assert Recording.load(tmp_path/'run'/'weights').step.tolist() == [*range(6)]
    with pytest.raises(FileNotFoundError, match='Expected one of those in it: gradients, updates, weights'): Recording.load(tmp_path/'run')


def test_the_update_of_a_replaced_layer_is_its_own():
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    def opt(): return torch.optim.SGD(model.parameters(), .1)
    with record(model) as rec:
        train(model, opt(), 1)
        model[0] = nn.Linear(4, 1, bias=False)
        model[0].weight.data.fill_(100)
        with pytest.warns(UserWarning, match='replaced during the fit'): train(model, opt(), 1)
        train(model, opt(), 1)
    assert np.allclose(rec.updates.step_norm[:, 0], .1*2*2, rtol=1e-4) # a gradient of 2 for each of 4 weights
    assert np.allclose(rec.updates.start_norm[1:, 0], 200)


def test_a_phase_needs_a_record_that_runs():
    rec = record(nn.Linear(4, 1))
    for _ in range(2):
        with pytest.raises(RuntimeError, match='has not started, or has stopped'): rec.next_phase('b')
        rec.start()
        rec.next_phase('a')
        rec.stop()


def test_a_record_without_a_step_warns():
    with pytest.warns(UserWarning, match='record saw no step of a torch.optim.Optimizer'), record(nn.Linear(4, 1)): pass


def test_a_forgotten_record_does_not_keep_the_model():
    model = nn.Linear(4, 1)
    alive, rec = weakref.ref(model), record(model).start()
    del model, rec
    gc.collect()
    assert alive() is None
    train(other := nn.Linear(4, 1), torch.optim.SGD(other.parameters(), .1), 1) # its hooks do no harm


def test_fused_optimizers_that_skip_a_step():
    rec = scaled(partial(torch.optim.Adam, fused=True))
    assert rec.gradients.stepped.tolist() == [True, False, True] and np.allclose(rec.gradients.mean[[0, 2]], 2)
    assert rec.updates.step_norm[1, 0] == 0
