"""Each call freezes and trains exactly the expected tensors, where fastai's own freezing drifts"""
import pickle
import random
from copy import deepcopy
from functools import partial
from itertools import combinations, product

import pytest
import torch
from helpers import quiet, tiny_learner, tiny_model
from fastai.basics import Adam, Callback, DataLoader, DataLoaders, Learner, MSELossFlat, SGD, load_learner, nn, ranger
import fastai.callback.hook # noqa: F401 (learn.summary)
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from freeze_cases import (BNS, CONVS, HEAD, HEAD_STATS, OPTS, POLICIES, PRESETS, SPLITTERS, STATS, Stop, buffers_of, interrupt, lr_find,
                          moved, no_warnings, snapshot, two_groups)

from fastai_bnstats.freeze import KeepFrozen, bn_splitter


# --- possible histories of a learner; each leaves something in weights, gradients or the optimizer
def fit(learn): learn.fit(1)
def fit_and_interrupt(learn): learn.fit(1); interrupt(learn)
def fastai_freeze(learn): learn.fit(1); learn.freeze(); learn.fit(1); learn.opt.unfreeze()


def other_presets(learn):
    learn.freeze_body(bn_stats='batch'); learn.fit(1)
    learn.freeze_non_bn(bn_stats='hold'); learn.fit(1)
    learn.unfreeze(); learn.fit(1)


BEFORE = {'nothing': lambda learn: None, 'fit': fit, 'lr_find': lr_find, 'interrupted': fit_and_interrupt, "fastai's freeze": fastai_freeze,
          'other presets': other_presets}


# --- later events that must not move frozen tensors; each returns the trained learner
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


AFTER = {'two fits': two_fits, 'one cycle, slice': slices, 'lr_find': find_then_fit, 'interrupted': interrupt_then_fit,
         'accumulated, clipped': accumulate_and_clip, 'save, load': save_and_load, 'export': export_and_load, 'fp16': mixed,
         'bf16': partial(mixed, amp_mode='bf16')}


def matrix():
    "All of optimizer x splitter x preset x policy, twice; the other values are random, but every pair occurs (see the next test)"
    rng = random.Random(3)
    draw = lambda: (rng.choice([True, False]), rng.choice([*BEFORE]), rng.choice([*AFTER])) # train_bn, before, after
    return [(*case, *draw()) for _ in range(2) for case in product(OPTS, SPLITTERS, PRESETS, POLICIES)]


def test_the_matrix_has_every_pair():
    axes = [OPTS, SPLITTERS, PRESETS, POLICIES, [True, False], BEFORE, AFTER]
    for i, j in combinations(range(len(axes)), 2):
        assert {(c[i], c[j]) for c in matrix()} == {*product(axes[i], axes[j])}


@pytest.mark.parametrize('opt,splitter,preset,policy,train_bn,before,after',
                         [pytest.param(*case, marks=[pytest.mark.slow]*(i%5 > 0)) for i, case in enumerate(matrix())])
def test_frozen_tensors_do_not_move_by_a_bit(opt, splitter, preset, policy, train_bn, before, after, tmp_path):
    learn = tiny_learner(splitter=SPLITTERS[splitter], opt_func=OPTS[opt], wd=.1, train_bn=train_bn, path=tmp_path)
    BEFORE[before](learn)
    getattr(learn, preset)(bn_stats=policy)
    snap = snapshot(learn)
    learn = AFTER[after](learn)
    body_stats = STATS if policy == 'update' else set()
    head_stats = HEAD_STATS if policy == 'update' or preset != 'freeze_all' else set()
    assert moved(learn, snap) == PRESETS[preset] | body_stats | head_stats # exactly the expected tensors
    learn.unfreeze() # then everything trains again
    snap = snapshot(learn)
    learn.fit(2)
    assert moved(learn, snap) == {*snap}


@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('splitter', SPLITTERS)
@pytest.mark.parametrize('train_bn', [True, False])
@pytest.mark.parametrize('before', ['nothing', 'fit', 'lr_find', 'interrupted'])
def test_control_frozen_tensors_drift_with_fastai_alone(opt, splitter, train_bn, before, tmp_path):
    learn = tiny_learner(splitter=SPLITTERS[splitter], opt_func=OPTS[opt], wd=.1, train_bn=train_bn, path=tmp_path)
    BEFORE[before](learn)
    learn.freeze()
    snap, frozen = snapshot(learn), {n for n, p in learn.model.named_parameters() if not p.requires_grad}
    assert frozen == (set() if splitter == 'one group' else CONVS if train_bn else CONVS | BNS) # one group: freezes nothing, silently
    learn.fit(2)
    if before == 'interrupted': drift = frozen                          # the optimizer steps with a gradient that was not used yet
    elif before == 'nothing' or opt.startswith('torch'): drift = set()  # no old gradients: torch's zero_grad removes them
    else: drift = frozen & CONVS                                        # weight decay, which fastai does not apply to batch norm
    assert moved(learn, snap) == {*snap}-frozen | drift                 # statistics move, frozen or not


@pytest.mark.parametrize('opt', [Adam, SGD])
def test_control_the_cause_of_the_drift_is_weight_decay(opt):
    "fastai shrinks frozen weights by a factor 1-lr*wd in each step"
    learn = tiny_learner(splitter=two_groups, opt_func=opt, wd=.01, train_bn=False)
    learn.fit(1)
    learn.freeze()
    w = learn.model[0][0].weight.detach().clone()
    learn.fit(2, 1e-2)
    torch.testing.assert_close(learn.model[0][0].weight, w*(1-1e-2*.01)**8, rtol=1e-5, atol=0)
    assert not learn.model[0][0].weight.requires_grad and not learn.model[0][0].weight.equal(w)


@pytest.mark.parametrize('opt', OPTS)
def test_frozen_weights_stay_where_a_checkpoint_put_them(opt, tmp_path):
    "An older checkpoint brings older optimizer state, including the slow weights of Lookahead"
    learn = tiny_learner(splitter=two_groups, opt_func=OPTS[opt], path=tmp_path, wd=.1)
    learn.fit(2); learn.save('old'); learn.fit(1)
    learn.freeze_non_bn()
    with no_warnings(): learn.load('old')
    snap = snapshot(learn)
    learn.fit(3)
    assert moved(learn, snap) == {*snap}-CONVS
    with no_warnings(): learn.load('old', with_opt=False) # weights that differ from the optimizer's slow weights
    snap = snapshot(learn)
    learn.fit(3)
    assert moved(learn, snap) == {*snap}-CONVS


# --- running statistics
@pytest.mark.parametrize('preset', ['freeze_non_bn', 'freeze_body', 'unfreeze'])
@pytest.mark.parametrize('how', ['hold', 'batch'])
def test_the_mode_of_batch_norm_follows_the_policy(preset, how):
    learn = tiny_learner(splitter=two_groups)
    learn.fit(1)
    getattr(learn, preset)(bn_stats=how)
    seen = []
    class Look(Callback):
        order = 99
        def after_pred(self): seen.append((self.training, learn.model[0][1].training, learn.model[1][2].training))
    learn.fit(1); learn.fit(1, cbs=Look())
    assert {s for s in seen if s[0]} == {(True, how == 'batch', True)}
    assert learn.model[0][1].track_running_stats # the flag is reset, because another learner may use the model
    assert repr(learn.freeze_policy) == f"{preset}(bn_stats={how!r})"


@pytest.mark.parametrize('call,args', [('freeze', ()), ('freeze_to', (0,)), ('freeze_body', ()), ('unfreeze', ()), ('fine_tune', (1,))])
def test_the_next_call_ends_a_policy(call, args):
    learn = tiny_learner(splitter=two_groups)
    learn.freeze_non_bn(bn_stats='hold')
    getattr(learn, call)(*args)
    snap = snapshot(learn)
    learn.fit(1)
    assert STATS <= moved(learn, snap)


@pytest.mark.parametrize('how', ['hold', 'batch'])
def test_normalisation_uses_the_expected_statistics(how):
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
    "AMP's scaler raises an error without gradients; here it is switched on although there is no GPU"
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
    assert min(scales) > 1 # the next fit has an active scaler again


# --- layers of every kind
class Kinds(nn.Module):
    "Weight-only batch norm, one without parameters, a synchronised one, a shared one, a bias of a convolution"
    def __init__(self):
        super().__init__()
        self.conv, self.weight_only, self.bare = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, bias=False), nn.BatchNorm2d(4, affine=False)
        self.sync, self.shared, self.conv2 = nn.SyncBatchNorm(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.norm_then_fc = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
        self.again = self.shared
    def forward(self, x):
        x = self.shared(self.sync(self.bare(self.weight_only(self.conv(x)))))
        return self.norm_then_fc(self.again(self.conv2(x.relu())))


@pytest.mark.parametrize('preset,extra', [
    ('freeze_body', set()), ('freeze_non_bn', {'weight_only.weight', 'sync.weight', 'sync.bias', 'shared.weight', 'shared.bias'}),
    ('freeze_non_bias', {'sync.bias', 'shared.bias', 'conv2.bias', 'conv.bias'})])
@pytest.mark.parametrize('how', POLICIES)
def test_batch_norm_of_every_kind(preset, extra, how):
    learn = tiny_learner(Kinds())
    with torch.no_grad():
        for p in learn.model.parameters(): p.add_(torch.rand_like(p)) # so that every gradient is nonzero
    learn.fit(1)
    getattr(learn, preset)(bn_stats=how)
    snap = snapshot(learn)
    learn.fit(2)
    got = {k for k in moved(learn, snap) if not k.startswith('again')}
    body = buffers_of('weight_only', 'bare', 'sync', 'shared') if how == 'update' else set()
    head = {'norm_then_fc.3.weight', 'norm_then_fc.3.bias'} | buffers_of('norm_then_fc.2')
    zero_gradient = {'conv.bias', 'conv2.bias'} if how != 'hold' else set() # batch statistics cancel a bias: its gradient is rounding noise
    assert got-zero_gradient == (head | extra | body)-zero_gradient


@pytest.mark.parametrize('how', POLICIES)
def test_lazy_layers(how):
    body = nn.Sequential(nn.LazyConv2d(4, 3, bias=False), nn.LazyBatchNorm2d(), nn.ReLU())
    m = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
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
    learn = quiet(Learner(DataLoaders(DataLoader(xs, bs=8), DataLoader(xs, bs=8)), nn.BatchNorm1d(3), loss_func=MSELossFlat(), lr=.1))
    stats = {'running_mean', 'running_var', 'num_batches_tracked'}
    for call, how, want in [('unfreeze', 'hold', {'weight', 'bias'}), ('freeze_all', 'update', stats), ('freeze_all', 'hold', set())]:
        getattr(learn, call)(bn_stats=how)
        snap = snapshot(learn)
        learn.fit(1)
        assert moved(learn, snap) == want
    with pytest.raises(ValueError, match='No head found in BatchNorm1d'): learn.freeze_body()


def test_other_norms_by_choice():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.LayerNorm([4, 4, 4]),
                         nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    group, layer = {'0.1.weight', '0.1.bias'}, {'0.3.weight', '0.3.bias'}
    norms = {nn.GroupNorm: group, nn.LayerNorm: layer, (nn.GroupNorm, nn.LayerNorm): group | layer, None: {'0.5.weight', '0.5.bias'}}
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
    def __init__(self):
        super().__init__()
        self.body, self.bn, self.fc = tiny_model()[0], nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(1))
    def forward(self, x): return self.fc(self.bn(self.body(x).mean((2, 3))))*self.scale


@pytest.mark.parametrize('how', ['hold', 'batch'])
def test_a_batch_norm_without_parameters_inside_the_head_belongs_to_it(how):
    learn = tiny_learner(FlatHead())
    learn.freeze_body(head=['bn', 'fc', 'scale'], bn_stats=how)
    assert repr(learn.freeze_policy) == f"freeze_body(head='bn, fc, scale', bn_stats={how!r})"
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == buffers_of('bn') | {'fc.weight', 'fc.bias', 'scale'}
    flat = nn.Sequential(*tiny_model()[0], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    learn = tiny_learner(flat)
    learn.freeze_body(bn_stats=how) # the head is the last pooling layer and all layers after it
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == buffers_of('8') | {'9.weight', '9.bias'}


# --- copies of a learner
def pickled(learn): return pickle.loads(pickle.dumps(learn))


@pytest.mark.parametrize('copy', [deepcopy, pickled])
@pytest.mark.parametrize('how', POLICIES)
@pytest.mark.parametrize('preset', ['freeze_body', 'freeze_all'])
def test_a_copy_has_the_policy_and_leaves_the_original_alone(preset, how, copy):
    learn = tiny_learner(splitter=two_groups)
    learn.fit(1)
    getattr(learn, preset)(bn_stats=how)
    back, original = copy(learn), snapshot(learn)
    assert back.freeze_policy.learn is back and back.freeze_policy is not learn.freeze_policy
    before = snapshot(back)
    back.fit(1)
    stats = STATS | HEAD_STATS if how == 'update' else HEAD_STATS if preset == 'freeze_body' else set()
    assert moved(back, before) == PRESETS[preset] | stats
    back.unfreeze()
    before = snapshot(back)
    back.fit(1)
    assert moved(back, before) == {*before} and not moved(learn, original) and learn.freeze_policy is not None


# --- fine_tune, which freezes and unfreezes itself
@pytest.mark.parametrize('what,train', [('body', HEAD), ('non_bn', HEAD | BNS), ('non_bias', HEAD | {'0.1.bias', '0.4.bias'}),
                                        ('all', set()), ('nothing', HEAD | BNS | CONVS)])
@pytest.mark.parametrize('how', ['update', 'hold'])
@pytest.mark.parametrize('opt', [Adam, ranger])
def test_fine_tune_with_a_policy(what, train, how, opt):
    learn = tiny_learner(splitter=two_groups, opt_func=opt)
    learn.fit(1)
    snap = snapshot(learn)
    learn.fine_tune(2, cbs=KeepFrozen(what, bn_stats=how))
    body_stats, head_stats = STATS if how == 'update' else set(), set() if (what, how) == ('all', 'hold') else HEAD_STATS
    assert moved(learn, snap) == train | body_stats | head_stats
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.freeze_policy is None # as after fine_tune without the callback
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == {*snap}


def test_the_previous_policy_is_restored_after_an_interrupt_too():
    for stop in (False, True):
        learn = tiny_learner(splitter=two_groups)
        learn.freeze_body(bn_stats='hold')
        policy = learn.freeze_policy
        if stop: pytest.raises(KeyboardInterrupt, learn.fit, 1, cbs=[KeepFrozen('nothing'), Stop()])
        else: learn.fit(1, cbs=KeepFrozen('nothing'))
        assert learn.freeze_policy is policy and {n for n, p in learn.model.named_parameters() if p.requires_grad} == HEAD
        snap = snapshot(learn)
        learn.fit(2)
        assert moved(learn, snap) == HEAD | HEAD_STATS


@pytest.mark.parametrize('opt', OPTS)
def test_parameters_frozen_by_hand_are_frozen_again_and_do_not_drift(opt):
    learn = tiny_learner(splitter=two_groups, wd=.1, opt_func=OPTS[opt])
    learn.freeze() # fastai's, on a fresh learner
    learn.fit(1, cbs=KeepFrozen('nothing'))
    assert {n for n, p in learn.model.named_parameters() if not p.requires_grad} == CONVS
    snap = snapshot(learn)
    learn.fit(2)
    assert not moved(learn, snap) & CONVS


def test_a_policy_for_every_fit():
    log = []
    learn = tiny_learner(splitter=two_groups, cbs=KeepFrozen('non_bn', bn_stats='hold'))
    learn.logger = log.append
    snap = snapshot(learn)
    learn.fit(1)
    state = {k: v.clone() for k, v in learn.opt.state[learn.model[1][3].weight].items() if isinstance(v, torch.Tensor)}
    learn.validate(); learn.get_preds() # they call before_fit too, which must not clear the optimizer's state
    assert all(learn.opt.state[learn.model[1][3].weight][k].equal(v) for k, v in state.items()) and state
    learn.fine_tune(1)
    assert moved(learn, snap) == HEAD | BNS | HEAD_STATS
    assert sum(str(s).startswith('freeze_non_bn:') for s in log) == 1
    learn.remove_cb(KeepFrozen)
    assert all(p.requires_grad for p in learn.model.parameters())


def test_a_policy_for_every_fit_is_exported_with_the_learner(tmp_path):
    learn = tiny_learner(splitter=bn_splitter, path=tmp_path, cbs=KeepFrozen('body', bn_stats='hold'))
    learn.fit(1)
    snap = snapshot(learn)
    back = export_and_load(learn)
    assert moved(back, snap) == HEAD | HEAD_STATS


def test_two_policies_for_one_fit_are_refused():
    learn = tiny_learner(splitter=two_groups)
    error = (r"A fit can have only one KeepFrozen. Found KeepFrozen\('non_bn', bn_stats='update'\) and "
             r"KeepFrozen\('body', bn_stats='update'\). learn.remove_cb\(KeepFrozen\) removes")
    with pytest.raises(ValueError, match=error): learn.fit(1, cbs=[KeepFrozen('body'), KeepFrozen('non_bn')])
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.freeze_policy is None
    learn.fit(1)


def test_the_end_of_a_policy_is_logged():
    learn, log = tiny_learner(splitter=two_groups), []
    learn.freeze_body(bn_stats='hold')
    learn.logger = log.append
    learn.fine_tune(1)
    assert log[0] == "freeze_body(bn_stats='hold') is no longer in force: fastai's own freezing replaces it."
    assert sum('no longer in force' in str(s) for s in log) == 1


def test_fastais_summary_shows_the_frozen_groups():
    learn = tiny_learner(splitter=two_groups)
    up_to = 'frozen up to parameter group #'
    for call, want in (('freeze_body', up_to+'1'), ('freeze_all', up_to+'2'), ('unfreeze', 'Model unfrozen')):
        getattr(learn, call)()
        assert want in str(learn.summary())


def test_keep_frozen_refuses():
    for what, kw in (('body', 'heads'), ('all', 'head'), ('body', 'norm')):
        with pytest.raises(ValueError, match=rf"KeepFrozen\('{what}'\) accepts .*bn_stats.* Found {kw}="): KeepFrozen(what, **{kw: '1'})
    with pytest.raises(ValueError, match=r"what must be one of .* Found \['body'\]"): KeepFrozen(['body'])
    with pytest.raises(ValueError, match="what must be one of non_bn, body, non_bias, all, nothing. Found 'bn'"): KeepFrozen('bn')
    with pytest.raises(ValueError, match="bn_stats must be one of update, hold, batch. Found 'eval'"): KeepFrozen('body', bn_stats='eval')
    learn = tiny_learner(tiny_model(bn=False))
    with pytest.raises(ValueError, match='no batch norm to train'): learn.fit(1, cbs=KeepFrozen('non_bn'))
    assert all(p.requires_grad for p in learn.model.parameters())


def test_the_head_named_for_statistics():
    learn = tiny_learner()
    learn.unfreeze(bn_stats='hold', head='1.3') # so the batch norm at 1.2 is body
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == HEAD | BNS | CONVS
    with pytest.raises(ValueError, match="Found 'fc', which is not in"): learn.unfreeze(head='fc')


def test_each_call_logs_what_trains():
    learn, log = tiny_learner(splitter=two_groups), []
    learn.logger = log.append
    learn.freeze_non_bn(); learn.freeze_body(); learn.freeze_all()
    head = "training 4 tensors of the head (head = 1 (the splitter's last group))"
    assert log == [f"freeze_non_bn: {head} and 4 of the body (batch norm); 2 of 10 tensors are frozen.",
                   f"freeze_body: {head}; 6 of 10 tensors are frozen.", "freeze_all: no parameter trains; all 10 tensors are frozen."]


def test_errors():
    bare = tiny_learner(tiny_model(bn=False))
    with pytest.raises(ValueError, match=r'no batch norm to train: found 0 layers.*freeze_body\(\)'): bare.freeze_non_bn()
    with pytest.raises(ValueError, match=r'no LayerNorm to train'): bare.freeze_non_bn(norm=nn.LayerNorm)
    learn = tiny_learner(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 2)))
    with pytest.raises(ValueError, match=r'The model has GroupNorm; learn.freeze_non_bn\(norm=nn.GroupNorm\) trains these'):
        learn.freeze_non_bn()
    for norm in ('LayerNorm', nn.LayerNorm(3), 3, [nn.LayerNorm, 'x']):
        with pytest.raises(ValueError, match='norm must be a type of module, such as nn.LayerNorm, or a tuple of types. Found'):
            learn.freeze_non_bn(norm=norm)
    learn = tiny_learner()
    with pytest.raises(ValueError, match="Found 'hold', which is not in .* Did you mean bn_stats='hold'"): learn.freeze_body('hold')
    for call in (learn.freeze_non_bn, learn.freeze_body, learn.freeze_non_bias, learn.freeze_all, learn.unfreeze):
        with pytest.raises(ValueError, match="one of update, hold, batch. Found 'frozen'"): call(bn_stats='frozen')
    assert all(p.requires_grad for p in learn.model.parameters()) # a call that raises an error changes nothing
    with pytest.raises(ValueError, match='This Flatten has no parameters, so there is nothing to train or to freeze. Give the learner'):
        tiny_learner(nn.Flatten()).freeze_all()


@pytest.mark.parametrize('call', ['freeze_body', 'freeze_non_bn', 'freeze_all', 'freeze_except'])
def test_of_several_processes_one_speaks(call, monkeypatch):
    learn, said = tiny_learner(), []
    learn.logger = said.append
    for rank in (0, 1):
        monkeypatch.setattr('fastai_bnstats.freeze.calls.rank_distrib', lambda r=rank: r)
        getattr(learn, call)(*['1.*'] if call == 'freeze_except' else [])
        assert len([t for t in said if t.startswith(call)]) == 1
