"""Recorded gradients, updates and outputs agree with copies that the tests make themselves"""
import pickle
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fastai.basics import Callback, CancelStepException, Module, SGD, load_learner, nn, set_seed
from fastai.callback.schedule import * # adds fit_one_cycle to Learner
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip

from helpers import tiny_learner, tiny_model
from fastai_bnstats.record.callback import WeightHistCallback
from fastai_bnstats.measure import DevicePast
from fastai_bnstats.recording import Recording, full_counts
from fastai_bnstats.record.quantities import (ActivationHistCallback, GradHistCallback, OutputGradHistCallback, OutputHook,
                                              UpdateHistCallback, tensors_in)
from fastai_bnstats.record.steps import Fit


CALLBACKS = [WeightHistCallback, GradHistCallback, UpdateHistCallback, ActivationHistCallback, OutputGradHistCallback]
ACCUMULATE, CLIP = (lambda: GradientAccumulation(32)), (lambda: GradientClip(.01))


def same_batches(learn, seed=1):
    for dl in learn.dls.loaders: dl.rng = random.Random(seed)


def freeze_body(learn, frozen=True):
    for p in learn.model[0].parameters(): p.requires_grad_(not frozen)


def tensors_of(model):
    "Names and values of all floating point parameters and buffers, as the callbacks select them with 'all'"
    items = [(n, k, t) for n, m in model.named_modules() for k, t in [*m._parameters.items(), *m._buffers.items()]]
    return {f'{n}.{k}': t.detach().clone() for n, k, t in items if t is not None and t.is_floating_point()}


def check(rec, seen, rtol=1e-5):
    "Every row of `rec` agrees with NumPy on the copies in `seen`, a list of rows of P tensors (None: no data)"
    assert len(rec) == len(seen)
    assert (full_counts(rec).sum(-1) == rec.numel).all()
    for t, row in enumerate(seen):
        for i, x in enumerate(row):
            if x is None:
                assert rec.numel[t, i] == 0 and np.isnan(rec.mean[t, i]) and np.isnan(rec.var[t, i])
                continue
            v, e = x.detach().double().numpy().ravel(), rec.edges[i]
            assert rec.numel[t, i] == v.size
            fin = v[np.isfinite(v)]
            np.testing.assert_array_equal(rec.hist[t, i], np.histogram(fin, e)[0])
            outside = (fin < e[0]).sum(), (fin > e[-1]).sum(), v.size-fin.size
            assert (rec.under[t, i], rec.over[t, i], rec.nonfinite[t, i]) == outside
            if fin.size:
                np.testing.assert_allclose(rec.mean[t, i], fin.mean(), rtol=rtol, atol=1e-6*np.abs(fin).max())
                np.testing.assert_allclose(rec.var[t, i], fin.var(), rtol=rtol, atol=1e-14*np.square(fin).max())


class Grads(Callback):
    "Copies the gradients of weights after every other callback"
    order = 200
    def __init__(self): self.rows = []
    def before_step(self):
        weights = [p for p in self.model.parameters() if p.ndim > 1]
        self.rows.append([p.grad.clone() if p.requires_grad else None for p in weights])


@pytest.mark.parametrize('more', [[], [ACCUMULATE], [CLIP], [ACCUMULATE, CLIP]], ids=['plain', 'accumulated', 'clipped', 'both'])
def test_gradients_are_those_the_optimizer_sees(more):
    log = Grads()
    learn = tiny_learner(cbs=[GradHistCallback(), log, *[m() for m in more]])
    learn.fit(2)
    check(learn.grad_hist.recording, log.rows)
    assert learn.grad_hist.recording.meta['quantity'] == 'gradients' and learn.grad_hist.recording.what == 'gradient'


def test_a_frozen_layer_has_no_gradient_and_gets_edges_when_unfrozen():
    log = Grads()
    learn = tiny_learner(cbs=[GradHistCallback(), log])
    freeze_body(learn)
    learn.fit(1)
    frozen = learn.grad_hist.recording
    assert np.isnan(frozen.edges[:2]).all() and np.isfinite(frozen.edges[2]).all()
    freeze_body(learn, False)
    learn.create_opt()
    learn.fit(1)
    rec = learn.grad_hist.recording
    check(rec, log.rows)
    assert np.isfinite(rec.edges).all() and (rec.edges[2] == frozen.edges[2]).all()
    assert (rec.sel(fit=1)-rec.sel(fit=0)).numel.shape == (4, 3)


def test_gradients_of_zero_are_counted_once_there_are_edges():
    "If the last batch norm of a residual block starts with gamma 0, the first gradients of the block are 0"
    class Gate(Callback):
        def after_pred(self): self.learn.pred = self.pred*float(self.learn.train_iter > 1)
    log = Grads()
    learn = tiny_learner(cbs=[GradHistCallback(), log, Gate()])
    learn.fit(1)
    check(learn.grad_hist.recording, log.rows)
    assert (learn.grad_hist.recording.var[:2] == 0).all() and (learn.grad_hist.recording.var[2:] > 0).all()


class Overflow(MixedPrecision):
    "Skips the second step, as a gradient scaler does after an infinite gradient"
    order = 10
    def __init__(self): super().__init__()
    def before_fit(self): self.n = 0
    def before_batch(self): pass
    def after_pred(self): pass
    def after_loss(self): pass
    def before_backward(self): pass
    def before_step(self):
        self.n += 1
        if self.n == 2:
            self.model[0][0].weight.grad[0, 0, 0, 0] = float('inf')
            raise CancelStepException
    def after_step(self): pass
    def after_fit(self): pass


def test_a_skipped_step_is_marked_and_its_gradients_are_recorded():
    learn = tiny_learner(cbs=[GradHistCallback(), UpdateHistCallback(), WeightHistCallback(), Overflow()], opt_func=SGD)
    learn.fit(1)
    g, u, w = learn.grad_hist.recording, learn.update_hist.recording, learn.weight_hist.recording
    for r in (g, u, w): assert r.stepped.tolist() == [True, False, True, True] and r.step.tolist() == [0, 1, 2, 3]
    assert g.nonfinite[:, 0].tolist() == [0, 1, 0, 0]
    assert (u.step_norm[1] == 0).all() and (u.step_norm[[0, 2, 3]] > 0).all() and (w.hist[1] == w.hist[0]).all()


def test_buffers_have_no_gradient():
    learn = tiny_learner(cbs=GradHistCallback('*.running_mean'))
    with pytest.raises(ValueError, match='selects only buffers, which have no gradient'): learn.fit(1)


class States(Callback):
    "Copies all tensors before the first minibatch of each step and after the step"
    order = -50
    def __init__(self): self.before, self.rows, self.after = None, [], []
    def _all(self): return list(tensors_of(self.model).values())
    def before_batch(self):
        if self.training and self.before is None: self.before = self._all()
        if not hasattr(self, 'start'): self.start = self._all()
    def after_step(self):
        self.after.append(self._all())
        self.rows.append([a-b for a, b in zip(self.after[-1], self.before)])
        self.before = None


@pytest.mark.parametrize('more', [[], [ACCUMULATE]], ids=['plain', 'accumulated'])
def test_updates_and_norms(more):
    log = States()
    learn = tiny_learner(cbs=[UpdateHistCallback('all'), log, *[m() for m in more]])
    learn.fit(2)
    rec = learn.update_hist.recording
    check(rec, log.rows)
    norm = lambda rows: np.array([[x.double().norm().item() for x in row] for row in rows])
    np.testing.assert_allclose(rec.norm, norm(log.after), rtol=1e-6)
    np.testing.assert_allclose(rec.step_norm, norm(log.rows), rtol=1e-5, atol=1e-9)
    since_start = [[a-s for a, s in zip(row, log.start)] for row in log.after]
    np.testing.assert_allclose(rec.fit_norm, norm(since_start), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(rec.start_norm, np.tile(norm([log.start]), (len(rec), 1)), rtol=1e-6)
    assert set(rec.kind) == {'weight', 'bias', 'gamma', 'beta', 'running_mean', 'running_var'}
    assert (rec.sel(kind='running_mean').step_norm > 0).all()


def test_an_update_of_plain_sgd_is_minus_lr_times_the_gradient():
    learn = tiny_learner(cbs=[UpdateHistCallback(), GradHistCallback()], opt_func=partial(SGD, wd=0.), lr=.25)
    learn.fit(1, wd=0.)
    u, g = learn.update_hist.recording, learn.grad_hist.recording
    np.testing.assert_allclose(u.mean, -.25*g.mean, rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(u.var, .0625*g.var, rtol=1e-4)


def test_thinned_updates_are_of_single_steps():
    every_step, every_third = (tiny_learner(cbs=UpdateHistCallback(every=e, range=(-.1, .1))) for e in (1, 3))
    for l in (every_step, every_third):
        same_batches(l)
        l.fit(2)
    b = every_third.update_hist.recording
    assert b.step.tolist() == [0, 3, 6] and len(b.loss) == 8 and 'thinned: one row per 3 steps' in repr(b)
    a = every_step.update_hist.recording.sel(step=[0, 3, 6])
    losses = {n: v for n, v in vars(a).items() if n.startswith(('loss', 'valid'))} # thinning keeps the losses of all steps
    assert a.is_same(replace(b, **losses))


def test_each_fit_has_its_own_start():
    learn = tiny_learner(cbs=UpdateHistCallback())
    learn.fit(1)
    w = learn.model[0][0].weight.detach().clone()
    learn.fit(1)
    rec = learn.update_hist.recording.sel(fit=1)
    assert rec.start_norm[0, 0] == pytest.approx(w.norm().item(), rel=1e-6)
    assert rec.fit_norm[0, 0] == pytest.approx(rec.step_norm[0, 0], rel=1e-5)


class Net(Module):
    "Calls a convolution twice, and a module that returns a tuple and a dict"
    def __init__(self): self.conv, self.pair, self.lin = nn.Conv2d(3, 3, 3, padding=1), Pair(), nn.Linear(3, 2)
    def forward(self, x):
        d, n = self.pair(self.conv(self.conv(x)))
        return self.lin(d['mean'])+n.float().mean()


class Pair(Module):
    def forward(self, x): return {'mean': x.mean((2, 3)), 'all': [x, None]}, torch.arange(3)


def test_outputs_of_modules_called_twice_tuples_and_dicts():
    net, seen = Net(), {}
    def keep(m, inputs, output, name):
        if m.training: seen.setdefault(name, []).append([t.detach().clone() for t in tensors_in(output)])
    for n, m in net.named_modules(): m.register_forward_hook(partial(keep, name=n))
    learn = tiny_learner(net, cbs=ActivationHistCallback(['conv', 'pair', 'lin']))
    learn.fit(1)
    rec = learn.activation_hist.recording
    flat = lambda outs: torch.cat([t.flatten() for o in outs for t in o])
    check(rec, [[flat(seen['conv'][2*t:2*t+2]), flat(seen['pair'][t:t+1]), flat(seen['lin'][t:t+1])] for t in range(4)])
    assert rec.numel[0].tolist() == [2*16*3*64, 16*3+16*3*64, 32] and set(rec.kind) == {'output'} and rec.what == 'output'


def test_outputs_of_accumulated_minibatches_make_one_row():
    learn = tiny_learner(cbs=[ActivationHistCallback(), GradientAccumulation(32)])
    learn.fit(1)
    rec = learn.activation_hist.recording
    assert len(rec) == 2 and len(rec.loss) == 4 and (rec.numel[:, -1] == 2*16*2).all()


class OutputGrads(Callback):
    "Keeps the gradients of the outputs of two layers, as PyTorch itself retains them, divided by `scale`"
    def __init__(self, layers, scale=1): self.layers, self.scale, self.rows = layers, scale, []
    def before_fit(self):
        def keep(m, inputs, output):
            if m.training and output.requires_grad:
                output.retain_grad()
                self.seen.append(output)
        self.handles = [m.register_forward_hook(keep) for m in self.layers]
    def before_batch(self): self.seen = []
    def after_backward(self): self.rows.append([t.grad.clone()/self.scale for t in self.seen])
    def after_fit(self): [h.remove() for h in self.handles]


def test_gradients_of_outputs_also_if_they_are_changed_in_place():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.ReLU()),
                          nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    oracle = OutputGrads([model[0][0], model[0][3], model[1][2]])
    learn = tiny_learner(model, cbs=[OutputGradHistCallback(), oracle])
    learn.fit(1)
    rec = learn.output_grad_hist.recording
    check(rec, oracle.rows)
    assert rec.names.tolist() == ['0.0', '0.3', '1.2'] and rec.what == 'output gradient'
    freeze_body(learn)
    learn.fit(1)
    later = learn.output_grad_hist.recording.sel(fit=1)
    assert (later.numel[:, :2] == 0).all() and (later.numel[:, 2] == 32).all() # no gradient reaches a frozen body


class Scaled(Callback):
    "Scales the loss as `MixedPrecision` does, but not the gradients back"
    def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    def before_backward(self): self.learn.loss_grad = self.scaler.scale(self.loss_grad)
    def after_fit(self): self.learn.scaler = None


def test_gradients_of_outputs_are_not_scaled():
    model = tiny_model()
    oracle = OutputGrads([m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))], 1024)
    learn = tiny_learner(model, cbs=[OutputGradHistCallback(), oracle, Scaled()])
    learn.fit(1, 1e-6)
    check(learn.output_grad_hist.recording, oracle.rows)


def test_gradients_of_outputs_of_accumulated_minibatches_make_one_row():
    learn = tiny_learner(cbs=[OutputGradHistCallback(), GradientAccumulation(32)])
    learn.fit(1)
    rec = learn.output_grad_hist.recording
    assert len(rec) == 2 and len(rec.loss) == 4 and (rec.numel[:, -1] == 2*16*2).all()


def hooks(model): return sum(len(m._forward_hooks) for m in model.modules())


def test_hooks_exist_only_during_recorded_forward_passes():
    n = []
    class Count(Callback):
        order = 56
        def before_batch(self): n.append((self.training, hooks(self.model)))
        def after_batch(self): assert hooks(self.model) == 0
    learn = tiny_learner(cbs=[ActivationHistCallback(every=2), Count()])
    learn.fit(1)
    learn.get_preds()
    learn.validate()
    assert [k for tr, k in n if tr] == [4, 0, 4, 0] and not any(k for tr, k in n if not tr)


@pytest.mark.filterwarnings('ignore:load_learner')
def test_a_learner_works_after_a_failed_forward_pass(tmp_path):
    class Break(Callback):
        order = 80
        def before_batch(self):
            if self.training and self.learn.train_iter == 2: self.learn.xb = (torch.zeros(16, 5, 8, 8),)
    learn = tiny_learner(cbs=ActivationHistCallback())
    with pytest.raises(RuntimeError): learn.fit(1, cbs=Break())
    learn.export(tmp_path/'l.pkl')
    again = load_learner(tmp_path/'l.pkl')
    again.model(torch.zeros(2, 3, 8, 8))
    with pytest.warns(UserWarning, match='is a copy, and its recording stayed'): assert len(again.activation_hist.recording) == 0
    learn.model(torch.zeros(2, 3, 8, 8))
    learn.fit(1)
    rec = learn.activation_hist.recording
    assert hooks(learn.model) == 0 and rec.fit.tolist() == [0]*2+[1]*4 and (rec.numel > 0).all()


def test_a_copied_hook_does_nothing(): assert pickle.loads(pickle.dumps(OutputHook(print))).see is None


def test_an_error_in_a_hook_warns_once(monkeypatch):
    learn = tiny_learner(cbs=ActivationHistCallback())
    monkeypatch.setattr('fastai_bnstats.measure.Meter.row', lambda *a: 1/0)
    stopped = 'ActivationHistCallback stopped recording in see_output: ZeroDivisionError'
    with pytest.warns(UserWarning, match=stopped) as ws: learn.fit(2)
    assert sum('ZeroDivision' in str(w.message) for w in ws) == 1 and len(learn.recorder.values) == 2


def test_a_range_for_each_kind_of_layer():
    learn = tiny_learner(cbs=ActivationHistCallback(range=lambda n, m: (-10, 10) if isinstance(m, nn.Linear) else (0, 10)))
    learn.fit(1)
    rec = learn.activation_hist.recording
    np.testing.assert_allclose(rec.edges[:, [0, -1]], [[0, 10], [0, 10], [-10, 10]], atol=1e-6)
    assert (rec.under[:, 0] > 0).all()


def test_constant_outputs_have_edges():
    m = tiny_model()
    nn.init.zeros_(m[1][-1].weight)
    nn.init.constant_(m[1][-1].bias, 3.)
    learn = tiny_learner(m, cbs=ActivationHistCallback(nn.Linear))
    learn.fit(1)
    e = learn.activation_hist.recording.edges[0]
    assert (e[0], e[-1]) == pytest.approx((2, 4))


def test_training_is_bit_identical_with_all_four_callbacks():
    def train(cbs):
        learn = tiny_learner(cbs=cbs)
        set_seed(5)
        same_batches(learn, 5)
        learn.fit_one_cycle(2)
        return learn.model.state_dict(), learn.opt.state_dict()['state']
    (a, oa), (b, ob) = train([]), train([cls('all') for cls in CALLBACKS])
    assert all(a[k].equal(b[k]) for k in a)
    assert all(torch.equal(x[k], y[k]) for x, y in zip(oa, ob) for k in x if torch.is_tensor(x[k]))


@pytest.mark.filterwarnings('ignore:load_learner')
@pytest.mark.parametrize('cls', CALLBACKS[1:])
def test_predictions_and_export_are_not_recorded(cls, tmp_path):
    learn = tiny_learner(cbs=cls())
    name = learn.cbs[-1].name
    learn.fit(1)
    learn.get_preds()
    learn.validate()
    rec = getattr(learn, name).recording
    learn.export(tmp_path/'l.pkl')
    assert len(rec) == 4 and getattr(learn, name).recording.is_same(rec)
    with pytest.warns(UserWarning, match='is a copy, and its recording stayed'):
        assert len(getattr(load_learner(tmp_path/'l.pkl'), name).recording) == 0


@pytest.mark.parametrize('cls', CALLBACKS[1:])
def test_a_folder_keeps_every_quantity(cls, tmp_path):
    def run(**kw):
        learn = tiny_learner(cbs=cls(**kw))
        same_batches(learn)
        learn.fit(2)
        return learn.cbs[-1].recording
    kept, written = run(), run(path=tmp_path/'run')
    assert written.is_same(kept) and Recording.load(tmp_path/'run').is_same(kept)
    other, more = (tiny_learner(cbs=c(path=tmp_path/'run', resume=True)) for c in (WeightHistCallback, cls))
    with pytest.raises(ValueError, match='holds .*, but this callback records weights'): other.fit(1)
    more.fit(1)
    assert len(Recording.load(tmp_path/'run')) == 12 and (more.cbs[-1].recording.edges == kept.edges).all()


@pytest.mark.parametrize('cls', CALLBACKS)
def test_the_code_for_gpus_gives_the_same_recording(cls, monkeypatch):
    "The code path for GPUs, run on tensors of the host"
    def run():
        learn = tiny_learner(cbs=cls())
        same_batches(learn)
        freeze_body(learn)
        learn.fit(1)
        freeze_body(learn, False)
        learn.create_opt()
        learn.fit(1)
        return learn.cbs[-1].recording, learn.cbs[-1].meter._plans
    host, no_plans = run()
    monkeypatch.setattr('fastai_bnstats.measure.meter.on_device', lambda x: True)
    monkeypatch.setattr('fastai_bnstats.record.recorder.past_of', DevicePast)
    gpu, plans = run()
    assert plans and not no_plans
    for n in ('edges', 'hist', 'under', 'over', 'nonfinite', 'numel', 'step', 'trainable', 'loss'):
        np.testing.assert_array_equal(getattr(gpu, n), getattr(host, n))
    for n in ('mean', 'var', 'norm', 'step_norm', 'fit_norm', 'start_norm'):
        np.testing.assert_allclose(getattr(gpu, n), getattr(host, n), rtol=1e-5, atol=1e-12)


def test_layers_that_are_never_called_warn_once():
    class HalfUsed(Module):
        def __init__(self): self.used, self.idle = nn.Linear(192, 2), nn.Linear(192, 2)
        def forward(self, x): return self.used(x.flatten(1))
    learn = tiny_learner(HalfUsed(), cbs=ActivationHistCallback('idle'))
    no_output = 'saw no output: none of idle was called.*Select other layers. A scripted model runs without hooks'
    with pytest.warns(UserWarning, match=no_output) as ws: learn.fit(2)
    assert sum('saw no output' in str(w.message) for w in ws) == 1 and (learn.activation_hist.recording.numel == 0).all()


def test_all_hooks_are_removed_if_one_module_refuses_its_hook():
    learn = tiny_learner(cbs=ActivationHistCallback())
    learn.model[1][-1].register_forward_hook = lambda *a: 1/0
    with pytest.warns(UserWarning, match='stopped recording in before_batch'): learn.fit(1)
    assert hooks(learn.model) == 0


def test_updates_of_a_model_that_was_lazy():
    m = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    learn = tiny_learner(m, cbs=UpdateHistCallback(), opt_func=SGD)
    learn.fit(1)
    rec = learn.update_hist.recording
    assert len(rec) == 4 and rec.numel.tolist() == [[0, 0]]+[[768, 8]]*3 and (rec.step_norm[1:] > 0).all()


def test_updates_of_a_model_in_float64_are_exact():
    log = States()
    class Wide(Callback):
        def before_batch(self): self.learn.xb = (self.x.double(),)
    learn = tiny_learner(tiny_model().double(), cbs=[UpdateHistCallback('*weight'), log, Wide()], opt_func=SGD)
    learn.fit(1, 1e-9, wd=0)
    start, rec = dict(zip(tensors_of(learn.model), log.start)), learn.update_hist.recording
    moved = [(p-start[n]).norm().item() for n, p in learn.model.named_parameters() if n.endswith('weight')]
    assert rec.fit_norm[-1].tolist() == pytest.approx(moved, rel=1e-9) and (rec.fit_norm[-1] > 0).all()


def test_the_row_of_an_unused_layer_is_on_the_device_of_the_others():
    from torch._subclasses import FakeTensorMode
    cb = tiny_learner(cbs=ActivationHistCallback()).activation_hist
    cb.targets = [None]*2
    with FakeTensorMode(allow_non_fake_inputs=True):
        cb.fits = [Fit(state={'calls': {0: [torch.zeros(1, 46, dtype=torch.float64, device='cuda')]}})]
        row, = cb.measure()
    assert row.shape == (2, 46) and row.device.type == 'cuda'


def test_rows_of_the_host_can_follow_rows_of_a_device():
    class OtherDevice(Callback):
        "Moves the buffer to another device after its rows were collected"
        order = 54
        def after_step(self):
            cb = self.learn.activation_hist
            if self.iter != 2: return
            cb._collect()
            cb.meter.rows._buf = torch.empty(256, 3, 46, device='meta')
    learn = tiny_learner(cbs=[ActivationHistCallback(), OtherDevice()])
    learn.fit(1)
    rec = learn.activation_hist.recording
    assert rec.step.tolist() == [0, 1, 2, 3] and (rec.numel > 0).all()


def test_frozen_weights_on_a_gpu_are_not_copied_to_the_host(monkeypatch):
    "Their updates are 0 and so have no edges; run on tensors of the host"
    monkeypatch.setattr('fastai_bnstats.measure.meter.on_device', lambda x: True)
    monkeypatch.setattr('fastai_bnstats.record.recorder.past_of', DevicePast)
    monkeypatch.setattr('fastai_bnstats.measure.host.HostPlan.__call__', lambda *a: pytest.fail('copied'))
    learn = tiny_learner(cbs=UpdateHistCallback('*weight'))
    freeze_body(learn)
    learn.fit(1)
    rec, chosen = learn.update_hist.recording, learn.update_hist.meter.chosen
    still = ~rec.trainable[0]
    assert still.any() and not still.all() and [e is None for e in chosen] == still.tolist()
    assert (rec.mean[:, still] == 0).all() and (rec.numel[:, still] > 0).all() and (rec.mean[:, ~still] != 0).all()
