"""Bit for bit: what each call freezes, what it trains, and where fastai's own freezing drifts"""
import random
import warnings
from contextlib import contextmanager
from functools import partial
from itertools import combinations, product

import pytest
import torch
from conftest import loaders, quiet, tiny_learner, tiny_model
from fastai.basics import Adam, Callback, Learner, OptimWrapper, SGD, load_learner, nn, params, ranger, trainable_params
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.vision.all import xresnet18
from torchvision.models import densenet121, resnet18 as tv_resnet18

from fastai_bnstats.freeze.calls import KeepFrozen, bn_splitter, find_head

two_groups = lambda m: [params(m[0]), params(m[1])]
CONVS, BNS = {'0.0.weight', '0.3.weight'}, {'0.1.weight', '0.1.bias', '0.4.weight', '0.4.bias'}
HEAD = {'1.2.weight', '1.2.bias', '1.3.weight', '1.3.bias'}
buffers_of = lambda *bns: {f'{b}.{n}' for b in bns for n in ('running_mean', 'running_var', 'num_batches_tracked')}
STATS, HEAD_STATS = buffers_of('0.1', '0.4'), buffers_of('1.2')


def snapshot(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def moved(learn, before): return {k for k, v in learn.model.state_dict().items() if not v.equal(before[k])}


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # fastai's, of pickled files and of AMP without a GPU
        yield


class Stop(Callback):
    def after_backward(self): raise KeyboardInterrupt


def interrupt(learn):
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())


def lr_find(learn):
    with no_warnings(): learn.lr_find(num_it=5, show_plot=False)


# --- what may have happened before: each leaves its traces in weights, gradients and the optimizer
def fit(learn): learn.fit(1)
def fit_and_interrupt(learn): learn.fit(1); interrupt(learn)
def fastai_freeze(learn): learn.fit(1); learn.freeze(); learn.fit(1); learn.opt.unfreeze()


def other_presets(learn):
    learn.freeze_body(bn_stats='batch'); learn.fit(1)
    learn.freeze_non_bn(bn_stats='hold'); learn.fit(1)
    learn.unfreeze(); learn.fit(1)


BEFORE = {'nothing': lambda learn: None, 'fit': fit, 'lr_find': lr_find, 'interrupted': fit_and_interrupt, "fastai's freeze": fastai_freeze, 'other presets': other_presets}


# --- what may happen after: the frozen must survive it; each returns the learner that trained
def two_fits(learn): learn.fit(1); learn.fit(1, reset_opt=True); return learn
def slices(learn): learn.fit_one_cycle(2, slice(1e-3, 1e-2)); return learn
def find_then_fit(learn): lr_find(learn); learn.fit(2); return learn
def interrupt_then_fit(learn): interrupt(learn); learn.fit(2); return learn
def accumulate_and_clip(learn): learn.fit(2, cbs=[GradientAccumulation(32), GradientClip(1.)]); return learn


def save_and_load(learn):
    learn.fit(1); learn.save('x')
    with no_warnings(): learn.load('x')
    learn.fit(1)
    return learn


def export_and_load(learn):
    learn.export()
    with no_warnings(): back = quiet(load_learner(learn.path/'export.pkl'))
    back.dls = learn.dls
    back.fit(2)
    return back


def mixed(learn, **kwargs):
    with no_warnings(): learn.fit(2, cbs=MixedPrecision(**kwargs))
    return learn


AFTER = {'two fits': two_fits, 'one cycle, slice': slices, 'lr_find': find_then_fit, 'interrupted': interrupt_then_fit, 'accumulated, clipped': accumulate_and_clip, 'save, load': save_and_load,
         'export': export_and_load, 'fp16': mixed, 'bf16': partial(mixed, amp_mode='bf16')}

OPTS = {'Adam': Adam, 'SGD': partial(SGD, mom=.9), 'ranger': ranger, 'torch AdamW': partial(OptimWrapper, opt=torch.optim.AdamW),
        'torch SGD': partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)}
SPLITTERS = {'one group': trainable_params, 'two groups': two_groups, 'bn_splitter': bn_splitter}
PRESETS = {'freeze_body': HEAD, 'freeze_non_bn': HEAD | BNS, 'freeze_non_bias': HEAD | {'0.1.bias', '0.4.bias'}, 'freeze_all': set(), 'unfreeze': HEAD | BNS | CONVS}
POLICIES = ['update', 'hold', 'batch']


def matrix():
    "Optimizer x splitter x preset x policy whole, twice; train_bn, before and after drawn so that every pair of values of any two axes occurs (next test)"
    rng, cases = random.Random(3), []
    for _ in range(2):
        for case in product(OPTS, SPLITTERS, PRESETS, POLICIES): cases.append((*case, rng.choice([True, False]), rng.choice([*BEFORE]), rng.choice([*AFTER])))
    return cases


def test_the_matrix_has_every_pair():
    axes = [OPTS, SPLITTERS, PRESETS, POLICIES, [True, False], BEFORE, AFTER]
    for i, j in combinations(range(len(axes)), 2):
        assert {(c[i], c[j]) for c in matrix()} == {*product(axes[i], axes[j])}


@pytest.mark.parametrize('opt,splitter,preset,policy,train_bn,before,after', matrix())
def test_frozen_does_not_move_by_one_bit(opt, splitter, preset, policy, train_bn, before, after, tmp_path):
    learn = tiny_learner(splitter=SPLITTERS[splitter], opt_func=OPTS[opt], wd=.1, train_bn=train_bn, path=tmp_path)
    BEFORE[before](learn)
    getattr(learn, preset)(bn_stats=policy)
    snap = snapshot(learn)
    learn = AFTER[after](learn)
    want = PRESETS[preset] | (STATS if policy == 'update' else set()) | (HEAD_STATS if policy == 'update' or preset != 'freeze_all' else set())
    assert moved(learn, snap) == want # all that should move, and nothing else
    learn.unfreeze() # and everything comes back
    snap = snapshot(learn)
    learn.fit(2)
    assert moved(learn, snap) == {*snap}


@pytest.mark.parametrize('opt,splitter,train_bn,before', list(product(OPTS, SPLITTERS, [True, False], ['nothing', 'fit', 'lr_find', 'interrupted'])))
def test_control_fastai_freezing_drifts_where_it_is_said_to(opt, splitter, train_bn, before, tmp_path):
    learn = tiny_learner(splitter=SPLITTERS[splitter], opt_func=OPTS[opt], wd=.1, train_bn=train_bn, path=tmp_path)
    BEFORE[before](learn)
    learn.freeze()
    snap, frozen = snapshot(learn), {n for n, p in learn.model.named_parameters() if not p.requires_grad}
    assert frozen == (set() if splitter == 'one group' else CONVS if train_bn else CONVS | BNS) # one group: freezes nothing, silently
    learn.fit(2)
    if before == 'interrupted': drift = frozen                                               # a gradient that was never used is stepped
    elif before == 'nothing' or opt.startswith('torch'): drift = set()                       # no old gradients: torch's zero_grad drops them
    else: drift = frozen & CONVS                                                             # weight decay, which spares batch norm
    assert moved(learn, snap) == {*snap}-frozen | drift                                      # statistics move, frozen or not


@pytest.mark.parametrize('opt', [Adam, SGD])
def test_control_the_drift_is_weight_decay(opt):
    "fastai shrinks what it froze by (1-lr*wd) a step"
    learn = tiny_learner(splitter=two_groups, opt_func=opt, wd=.01, train_bn=False)
    learn.fit(1)
    learn.freeze()
    w = learn.model[0][0].weight.detach().clone()
    learn.fit(2, 1e-2)
    torch.testing.assert_close(learn.model[0][0].weight, w*(1-1e-2*.01)**8, rtol=1e-5, atol=0)
    assert not learn.model[0][0].weight.requires_grad and not learn.model[0][0].weight.equal(w)


@pytest.mark.parametrize('opt', OPTS)
def test_frozen_weights_stay_where_a_checkpoint_put_them(opt, tmp_path):
    "Optimizer state of another time comes with an older checkpoint, slow weights of Lookahead among it"
    learn = tiny_learner(splitter=two_groups, opt_func=OPTS[opt], path=tmp_path, wd=.1)
    learn.fit(2); learn.save('old'); learn.fit(1)
    learn.freeze_non_bn()
    with no_warnings(): learn.load('old')
    snap = snapshot(learn)
    learn.fit(3)
    assert moved(learn, snap) == {*snap}-CONVS
    with no_warnings(): learn.load('old', with_opt=False) # other weights than the optimizer remembers
    snap = snapshot(learn)
    learn.fit(3)
    assert moved(learn, snap) == {*snap}-CONVS


# --- which parameters the optimizer holds
def test_parameters_frozen_before_the_optimizer_was_made_come_back():
    learn = tiny_learner()
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    learn.fit(1)
    assert len(learn.opt.all_params()) == 4
    learn.unfreeze()
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == {*snap}


@pytest.mark.parametrize('splitter', [lambda m: [trainable_params(m[0]), trainable_params(m[1])], lambda m: list(m.parameters()), lambda m: [params(m)]])
def test_splitters_of_every_kind(splitter):
    "That look at requires_grad; that give a flat list; that give one group"
    learn = tiny_learner(splitter=splitter)
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    learn.fit(1)
    learn.freeze_non_bn()
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == {*snap}-CONVS


def test_groups_of_torch_dicts():
    groups = lambda m: [{'params': list(m[0].parameters()), 'lr': 1e-3}, {'params': list(m[1].parameters())}]
    learn = tiny_learner(splitter=groups, opt_func=partial(OptimWrapper, opt=torch.optim.SGD, convert_groups=False))
    learn.freeze_body()
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == HEAD | STATS | HEAD_STATS


def test_an_optimizer_built_by_hand_that_lacks_parameters_is_refused():
    m = tiny_model()
    learn = tiny_learner(m, opt_func=OptimWrapper(opt=torch.optim.SGD(m[1].parameters(), lr=.1)))
    with pytest.raises(ValueError, match=r'lacks 6 parameters of the model, such as 0\.0\.weight: its opt_func or splitter leaves them out'): learn.freeze_body()
    learn = tiny_learner(m, opt_func=OptimWrapper(opt=torch.optim.SGD(m.parameters(), lr=.1)))
    learn.freeze_body()
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == HEAD | STATS | HEAD_STATS


@pytest.mark.parametrize('opt', OPTS)
def test_an_optimizer_of_another_splitter_is_refused_at_the_next_fit_or_freeze(opt, tmp_path):
    other = lambda m: [params(m[1][3]), params(m[1][2])+params(m[0][1]), params(m[0][4])+[m[0][0].weight, m[0][3].weight]] # as many groups, as many in each
    theirs = tiny_learner(splitter=bn_splitter, opt_func=OPTS[opt], path=tmp_path)
    theirs.fit(2); theirs.save('theirs')
    learn = tiny_learner(splitter=other, opt_func=OPTS[opt], path=tmp_path)
    with no_warnings(): learn.load('theirs')
    fits = lambda: learn.fit(1), lambda: learn.fine_tune(1)
    for call in (*fits, learn.freeze, learn.unfreeze, learn.freeze_non_bn, learn.freeze_body, learn.freeze_all):
        with pytest.raises(ValueError, match=r"optimizer's state does not fit the model: parameter \S+ has shape .* loaded from a learner with another splitter.*learn.create_opt\(\)"): call()
    learn.create_opt() # the remedy
    learn.freeze_non_bn(head='1')
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == {*snap}-CONVS


def test_state_of_another_shape_is_no_reason_to_refuse():
    "Optimizers keep factored or quantised state"
    learn = tiny_learner(opt_func=partial(OptimWrapper, opt=torch.optim.Adafactor))
    learn.fit(1)
    learn.freeze_non_bn(); learn.fit(1)
    for p in learn.model.parameters(): learn.opt.opt.state[p]['qmap'] = torch.zeros(256)
    learn.fit(1)


def test_a_fit_keeps_the_rates_when_the_optimizer_is_made_anew_in_it():
    learn, seen = tiny_learner(), []
    class Look(Callback):
        def after_step(self): seen.append((self.opt.hypers[0]['lr'], self.opt.hypers[0]['wd']))
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    learn.create_opt()
    learn.fit(1, .123, wd=.045, cbs=[KeepFrozen('nothing'), Look()])
    assert {*seen} == {(.123, .045)} and len(learn.opt.all_params()) == 10


# --- running statistics
@pytest.mark.parametrize('preset', ['freeze_non_bn', 'freeze_body', 'unfreeze'])
@pytest.mark.parametrize('how', ['hold', 'batch'])
def test_statistics_that_do_not_move(preset, how):
    learn = tiny_learner(splitter=two_groups)
    learn.fit(1)
    getattr(learn, preset)(bn_stats=how)
    seen = []
    class Look(Callback):
        order = 99
        def after_pred(self): seen.append((self.training, learn.model[0][1].training, learn.model[1][2].training))
    learn.fit(1); learn.fit(1, cbs=Look())
    assert {s for s in seen if s[0]} == {(True, how == 'batch', True)}
    assert learn.model[0][1].track_running_stats # the model keeps no trace of it, for another learner
    assert repr(learn.freeze_policy) == f"{preset}(bn_stats={how!r})"


@pytest.mark.parametrize('end', [lambda l: l.freeze(), lambda l: l.freeze_to(0), lambda l: l.freeze_body(), lambda l: l.unfreeze(), lambda l: l.fine_tune(1)])
def test_the_next_call_ends_a_policy(end):
    learn = tiny_learner(splitter=two_groups)
    learn.freeze_non_bn(bn_stats='hold')
    end(learn)
    snap = snapshot(learn)
    learn.fit(1)
    assert STATS <= moved(learn, snap)


@pytest.mark.parametrize('how', ['hold', 'batch'])
def test_what_normalises(how):
    "hold: the running statistics, as in eval mode; batch: the minibatch, as in training mode"
    learn = tiny_learner(splitter=two_groups)
    learn.fit(1)
    learn.freeze_body(bn_stats=how)
    seen = {}
    class Grab(Callback):
        order = 99
        def before_batch(self):
            if self.training and 'x' not in seen:
                seen['x'] = self.xb[0].clone()
                learn.model[0].register_forward_hook(lambda m, i, o: seen.setdefault('y', o.detach()))
    body = {'hold': tiny_model()[0].eval(), 'batch': tiny_model()[0].train()}[how]
    body.load_state_dict(learn.model[0].state_dict())
    learn.fit(1, cbs=Grab())
    torch.testing.assert_close(seen['y'], body(seen['x']))


def test_a_policy_survives_train_called_by_others():
    learn = tiny_learner(splitter=two_groups)
    learn.freeze_body(bn_stats='hold')
    class Train(Callback):
        order = -9
        def before_batch(self):
            if self.training: self.model.train()
    snap = snapshot(learn)
    learn.fit(1, cbs=Train())
    assert moved(learn, snap) == HEAD | HEAD_STATS


def test_an_interrupt_leaves_no_trace_in_the_model():
    learn = tiny_learner(splitter=two_groups)
    learn.freeze_body(bn_stats='batch')
    learn.model[0].register_forward_hook(lambda m, i, o: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    assert learn.model[0][1].track_running_stats # although it stopped in the forward pass


def test_nothing_trains_with_a_scaler(monkeypatch):
    "AMP's scaler refuses to step without gradients; here it is switched on although there is no GPU"
    import fastai.callback.fp16 as F
    monkeypatch.setattr(F, 'GradScaler', lambda *a, **kw: torch.amp.GradScaler('cpu', **kw))
    learn = tiny_learner(splitter=two_groups)
    learn.freeze_all()
    snap = snapshot(learn)
    with no_warnings(): learn.to_fp16().fit(2)
    assert moved(learn, snap) == STATS | HEAD_STATS
    learn.unfreeze()
    scales = []
    class Look(Callback):
        def after_step(self): scales.append(self.learn.scaler.get_scale())
    with no_warnings(): learn.fit(1, cbs=Look())
    assert min(scales) > 1 # and is back in the next fit


# --- layers of every kind
class Kinds(nn.Module):
    "Weight-only batch norm, one without parameters, a synchronised one, a shared one, a bias of a convolution"
    def __init__(self):
        super().__init__()
        self.conv, self.weight_only, self.bare = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, bias=False), nn.BatchNorm2d(4, affine=False)
        self.sync, self.shared, self.conv2 = nn.SyncBatchNorm(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.norm_then_fc = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
        self.again = self.shared
    def forward(self, x): return self.norm_then_fc(self.again(self.conv2(self.shared(self.sync(self.bare(self.weight_only(self.conv(x))))).relu())))


@pytest.mark.parametrize('preset,extra', [('freeze_body', set()), ('freeze_non_bn', {'weight_only.weight', 'sync.weight', 'sync.bias', 'shared.weight', 'shared.bias'}), ('freeze_non_bias', {'sync.bias', 'shared.bias', 'conv2.bias', 'conv.bias'})])
@pytest.mark.parametrize('how', POLICIES)
def test_batch_norm_of_every_kind(preset, extra, how):
    learn = tiny_learner(Kinds())
    with torch.no_grad():
        for p in learn.model.parameters(): p.add_(torch.rand_like(p)) # gradients of their own for all
    learn.fit(1)
    getattr(learn, preset)(bn_stats=how)
    snap = snapshot(learn)
    learn.fit(2)
    got = {k for k in moved(learn, snap) if not k.startswith('again')}
    body = buffers_of('weight_only', 'bare', 'sync', 'shared') if how == 'update' else set()
    zero_gradient = {'conv.bias', 'conv2.bias'} if how != 'hold' else set() # batch statistics take a bias away: its gradient is rounding noise
    assert got-zero_gradient == ({'norm_then_fc.3.weight', 'norm_then_fc.3.bias'} | extra | body | buffers_of('norm_then_fc.2'))-zero_gradient


@pytest.mark.parametrize('how', POLICIES)
def test_lazy_layers(how):
    m = nn.Sequential(nn.Sequential(nn.LazyConv2d(4, 3, bias=False), nn.LazyBatchNorm2d(), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    learn = tiny_learner(m, splitter=two_groups)
    learn.freeze_body(bn_stats=how)
    learn.fit(1)
    bn = m[0][1]
    assert not m[0][0].weight.requires_grad and not bn.weight.requires_grad and bn.track_running_stats
    if how == 'update': assert bn.running_mean.any() and bn.num_batches_tracked == 4
    else: assert not bn.running_mean.any() and bn.running_var.eq(1).all() and bn.num_batches_tracked == 0
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == {'1.2.weight', '1.2.bias'} | (buffers_of('0.1') if how == 'update' else set())


def test_a_model_that_is_one_batch_norm():
    xs = [(torch.randn(3), torch.randn(3)) for _ in range(32)]
    from fastai.basics import DataLoader, DataLoaders, MSELossFlat
    learn = quiet(Learner(DataLoaders(DataLoader(xs, bs=8), DataLoader(xs, bs=8)), nn.BatchNorm1d(3), loss_func=MSELossFlat(), lr=.1))
    for call, want in [(lambda: learn.unfreeze(bn_stats='hold'), {'weight', 'bias'}), (lambda: learn.freeze_all(), {'running_mean', 'running_var', 'num_batches_tracked'}), (lambda: learn.freeze_all(bn_stats='hold'), set())]:
        call()
        snap = snapshot(learn)
        learn.fit(1)
        assert moved(learn, snap) == want
    with pytest.raises(ValueError, match='No head found in BatchNorm1d'): learn.freeze_body()


def test_other_norms_by_choice():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.LayerNorm([4, 4, 4]), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    norms = {nn.GroupNorm: {'0.1.weight', '0.1.bias'}, nn.LayerNorm: {'0.3.weight', '0.3.bias'}, (nn.GroupNorm, nn.LayerNorm): {'0.1.weight', '0.1.bias', '0.3.weight', '0.3.bias'}, None: {'0.5.weight', '0.5.bias'}}
    learn = tiny_learner(nn.Sequential(body, nn.Sequential(nn.Flatten(), nn.Linear(64, 2))), splitter=two_groups)
    names = {id(p): n for n, p in learn.model.named_parameters()}
    for norm, want in norms.items():
        learn.freeze_non_bn(norm=norm, bn_stats='hold')
        snap = snapshot(learn)
        learn.fit(1)
        assert moved(learn, snap) == want | {'1.1.weight', '1.1.bias'}
        assert {names[id(p)] for p in bn_splitter(learn.model, norm=norm)[1]} == want


class FlatHead(nn.Module):
    "Its head is a batch norm without parameters, a linear layer, and a bare parameter"
    def __init__(self): super().__init__(); self.body, self.bn, self.fc, self.scale = tiny_model()[0], nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2), nn.Parameter(torch.ones(1))
    def forward(self, x): return self.fc(self.bn(self.body(x).mean((2, 3))))*self.scale


@pytest.mark.parametrize('how', ['hold', 'batch'])
def test_a_batch_norm_without_parameters_is_the_heads_if_it_lies_there(how):
    learn = tiny_learner(FlatHead())
    learn.freeze_body(head=['bn', 'fc', 'scale'], bn_stats=how)
    assert repr(learn.freeze_policy) == f"freeze_body(head='bn, fc, scale', bn_stats={how!r})"
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == buffers_of('bn') | {'fc.weight', 'fc.bias', 'scale'}
    flat = nn.Sequential(*tiny_model()[0], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    learn = tiny_learner(flat)
    learn.freeze_body(bn_stats=how) # the last pooling and all behind it
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == buffers_of('8') | {'9.weight', '9.bias'}


# --- fine_tune and other callers that freeze by themselves
@pytest.mark.parametrize('what,train', [('body', HEAD), ('non_bn', HEAD | BNS), ('non_bias', HEAD | {'0.1.bias', '0.4.bias'}), ('all', set()), ('nothing', HEAD | BNS | CONVS)])
@pytest.mark.parametrize('how', ['update', 'hold'])
@pytest.mark.parametrize('opt', [Adam, ranger])
def test_fine_tune_with_a_policy(what, train, how, opt):
    learn = tiny_learner(splitter=two_groups, opt_func=opt)
    learn.fit(1)
    snap = snapshot(learn)
    learn.fine_tune(2, cbs=KeepFrozen(what, bn_stats=how))
    assert moved(learn, snap) == train | (STATS if how == 'update' else set()) | (set() if (what, how) == ('all', 'hold') else HEAD_STATS)
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.freeze_policy is None # as fine_tune leaves it
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == {*snap}


def test_a_policy_that_was_there_comes_back_after_an_interrupt_too():
    for ends in (lambda learn, cb: learn.fit(1, cbs=cb), lambda learn, cb: pytest.raises(KeyboardInterrupt, learn.fit, 1, cbs=[cb, Stop()])):
        learn = tiny_learner(splitter=two_groups)
        learn.freeze_body(bn_stats='hold')
        policy = learn.freeze_policy
        ends(learn, KeepFrozen('nothing'))
        assert learn.freeze_policy is policy and {n for n, p in learn.model.named_parameters() if p.requires_grad} == HEAD
        snap = snapshot(learn)
        learn.fit(2)
        assert moved(learn, snap) == HEAD | HEAD_STATS


@pytest.mark.parametrize('opt', OPTS)
def test_what_was_frozen_by_hand_is_so_again_and_does_not_drift(opt):
    learn = tiny_learner(splitter=two_groups, wd=.1, opt_func=OPTS[opt])
    learn.freeze() # fastai's, on a fresh learner
    learn.fit(1, cbs=KeepFrozen('nothing'))
    assert {n for n, p in learn.model.named_parameters() if not p.requires_grad} == CONVS
    snap = snapshot(learn)
    learn.fit(2)
    assert not moved(learn, snap) & CONVS


def test_a_policy_for_good():
    said = []
    learn = tiny_learner(splitter=two_groups, cbs=KeepFrozen('non_bn', bn_stats='hold'))
    learn.logger = said.append
    snap = snapshot(learn)
    learn.fit(1)
    state = {k: v.clone() for k, v in learn.opt.state[learn.model[1][3].weight].items() if isinstance(v, torch.Tensor)}
    learn.validate(); learn.get_preds() # fire before_fit too, and must not cost the optimizer its memory
    assert all(learn.opt.state[learn.model[1][3].weight][k].equal(v) for k, v in state.items()) and state
    learn.fine_tune(1)
    assert moved(learn, snap) == HEAD | BNS | HEAD_STATS
    assert sum(str(s).startswith('freeze_non_bn:') for s in said) == 1
    learn.remove_cb(KeepFrozen)
    assert all(p.requires_grad for p in learn.model.parameters())


def test_a_policy_for_good_goes_with_an_exported_learner(tmp_path):
    learn = tiny_learner(splitter=bn_splitter, path=tmp_path, cbs=KeepFrozen('body', bn_stats='hold'))
    learn.fit(1)
    snap = snapshot(learn)
    back = export_and_load(learn)
    assert moved(back, snap) == HEAD | HEAD_STATS


def test_two_policies_for_one_fit_are_refused():
    learn = tiny_learner(splitter=two_groups)
    with pytest.raises(ValueError, match=r"Two policies for one fit: KeepFrozen\('non_bn', bn_stats='update'\) and KeepFrozen\('body', bn_stats='update'\)"): learn.fit(1, cbs=[KeepFrozen('body'), KeepFrozen('non_bn')])
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.freeze_policy is None
    learn.fit(1)


def test_the_end_of_a_policy_is_said():
    learn, said = tiny_learner(splitter=two_groups), []
    learn.freeze_body(bn_stats='hold')
    learn.logger = said.append
    learn.fine_tune(1)
    assert said[0] == "freeze_body(bn_stats='hold') ends here: fastai's own freezing follows" and sum('ends here' in str(s) for s in said) == 1


def test_fastais_summary_knows():
    learn = tiny_learner(splitter=two_groups)
    for call, want in (('freeze_body', 'frozen up to parameter group #1'), ('freeze_all', 'frozen up to parameter group #2'), ('unfreeze', 'Model unfrozen')):
        getattr(learn, call)()
        assert want in str(learn.summary())


def test_what_keep_frozen_refuses():
    for what, kw in (('body', 'heads'), ('all', 'head'), ('body', 'norm')):
        with pytest.raises(ValueError, match=rf"KeepFrozen\('{what}'\) takes .*bn_stats.* Found {kw}="): KeepFrozen(what, **{kw: '1'})
    with pytest.raises(ValueError, match=r"what must be one of .* Found \['body'\]"): KeepFrozen(['body'])
    with pytest.raises(ValueError, match="what must be one of non_bn, body, non_bias, all, nothing. Found 'bn'"): KeepFrozen('bn')
    with pytest.raises(ValueError, match="bn_stats must be one of update, hold, batch. Found 'eval'"): KeepFrozen('body', bn_stats='eval')
    learn = tiny_learner(tiny_model(bn=False))
    with pytest.raises(ValueError, match='no batch norm to train'): learn.fit(1, cbs=KeepFrozen('non_bn'))
    assert all(p.requires_grad for p in learn.model.parameters())


# --- where the head is
def test_a_doubtful_head_is_told():
    class Odd(nn.Module): # the last child is a norm
        def __init__(self): super().__init__(); self.head, self.body, self.norm = nn.Linear(4, 2), tiny_model()[0], nn.BatchNorm2d(4)
        def forward(self, x): return self.head(self.norm(self.body(x)).mean((2, 3)))
    class First(nn.Module): # the head comes first
        def __init__(self): super().__init__(); self.fc, self.body = nn.Linear(4, 2), tiny_model()[0]
        def forward(self, x): return self.fc(self.body(x).mean((2, 3)))
    one_each = lambda m: [[p] for p in m.parameters()]
    for model, splitter, doubt in ((Odd(), trainable_params, 'It is a norm layer'), (First(), trainable_params, 'It holds 96% of all parameters, convolutions among them'), (tiny_model(), one_each, 'It is a part of a layer')):
        learn, said = tiny_learner(model, splitter=splitter), []
        learn.logger = said.append
        learn.freeze_body()
        assert f'Is that the head? {doubt}. If it is not, say head=.' in said[0]


def test_names_of_wrapped_models():
    m = tiny_model()
    assert [id(p) for p in find_head(m, 'module.1')[0]] == [id(p) for p in m[1].parameters()]
    c = torch.compile(m, backend='eager')
    assert [id(p) for p in find_head(c, '1')[0]] == [id(p) for p in m[1].parameters()]


@pytest.mark.parametrize('arch,head', [
    (lambda: nn.Sequential(nn.Sequential(*list(xresnet18(n_out=2))[:8]), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 2))), '1'),
    (lambda: xresnet18(n_out=2), '8 '), (lambda: tv_resnet18(weights=None), 'avgpool '), (lambda: densenet121(weights=None), 'classifier'),
    (lambda: nn.Sequential(tiny_model()), '0.1'), (lambda: nn.Sequential(tiny_model()[0], nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)), '3')])
def test_where_the_head_is(arch, head):
    m = arch()
    ps, found = find_head(m)
    assert found.startswith(head) and 0 < len(ps) < len(list(m.parameters()))


def test_head_by_name_module_and_list():
    m = tiny_model()
    for h in ('1.3', m[1][3], [m[1][3]]): assert [id(p) for p in find_head(m, h)[0]] == [id(p) for p in m[1][3].parameters()]
    with pytest.raises(ValueError, match="Found Linear, which is not in this Sequential; it has 0, 1"): find_head(m, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Found 'fc', which is not in this Sequential"): find_head(m, 'fc')
    for h, n in (([], 'no'), (m, 'every')):
        with pytest.raises(ValueError, match=f'names {n} parameter'): find_head(m, h)
    with pytest.raises(ValueError, match='No head found'): find_head(nn.ReLU())


def test_the_head_named_for_statistics():
    learn = tiny_learner()
    learn.unfreeze(bn_stats='hold', head='1.3') # so the batch norm at 1.2 is body
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == HEAD | BNS | CONVS
    with pytest.raises(ValueError, match="Found 'fc', which is not in"): learn.unfreeze(head='fc')


def test_splitter_groups():
    m = tiny_model()
    names = {id(p): n for n, p in m.named_parameters()}
    assert [{names[id(p)] for p in g} for g in bn_splitter(m)] == [CONVS, BNS, HEAD]
    learn = tiny_learner(splitter=bn_splitter)
    learn.freeze_to(1)
    assert [p.requires_grad for p in learn.model.parameters()] == [n in BNS | HEAD for n, _ in learn.model.named_parameters()]


def test_what_was_taken_is_said():
    learn, said = tiny_learner(splitter=two_groups), []
    learn.logger = said.append
    learn.freeze_non_bn(); learn.freeze_body(); learn.freeze_all()
    assert said == ["freeze_non_bn: 4 tensors of the head train (head = 1 (the splitter's last group)), 4 of the body batch norm; 2 of 10 are frozen.",
                    "freeze_body: 4 tensors of the head train (head = 1 (the splitter's last group)); 6 of 10 are frozen.", "freeze_all: no parameter trains, 10 are frozen"]


def test_errors():
    bare = tiny_learner(tiny_model(bn=False))
    with pytest.raises(ValueError, match=r'no batch norm to train: 0 layers.*freeze_body\(\)'): bare.freeze_non_bn()
    with pytest.raises(ValueError, match=r'no LayerNorm to train'): bare.freeze_non_bn(norm=nn.LayerNorm)
    learn = tiny_learner(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 2)))
    with pytest.raises(ValueError, match=r'The model has GroupNorm: learn.freeze_non_bn\(norm=nn.GroupNorm\) trains these'): learn.freeze_non_bn()
    for norm in ('LayerNorm', nn.LayerNorm(3), 3, [nn.LayerNorm, 'x']):
        with pytest.raises(ValueError, match='norm must be a type of module, such as nn.LayerNorm, or a tuple of types. Found'): learn.freeze_non_bn(norm=norm)
    learn = tiny_learner()
    with pytest.raises(ValueError, match="Found 'hold', which is not in .* Did you mean bn_stats='hold'"): learn.freeze_body('hold')
    for call in (learn.freeze_non_bn, learn.freeze_body, learn.freeze_non_bias, learn.freeze_all, learn.unfreeze):
        with pytest.raises(ValueError, match="one of update, hold, batch. Found 'frozen'"): call(bn_stats='frozen')
    assert all(p.requires_grad for p in learn.model.parameters()) # a refused call changes nothing
    with pytest.raises(ValueError, match='This Flatten has no parameters: there is nothing to train or to freeze'): tiny_learner(nn.Flatten()).freeze_all()
