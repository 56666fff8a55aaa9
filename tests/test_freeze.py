"""Bit for bit: what each call freezes, what it trains, and where fastai's own freezing drifts"""
from itertools import product
from functools import partial

import pytest
import torch
from conftest import loaders, quiet, tiny_learner, tiny_model
from copy import deepcopy
import warnings

from fastai.basics import Adam, Callback, Learner, OptimWrapper, SGD, load_learner, nn, params, ranger, trainable_params
from fastai.vision.all import xresnet18
from torchvision.models import densenet121, resnet18 as tv_resnet18

from fastai_bnstats.data import digits
from fastai_bnstats.freeze import bn_splitter, count_bn, find_head, remove_bn

two_groups = lambda m: [params(m[0]), params(m[1])]
SPLITTERS = dict(one_group=trainable_params, two_groups=two_groups, bn_splitter=bn_splitter)
CONVS, BNS = ['0.0.weight', '0.3.weight'], ['0.1.weight', '0.1.bias', '0.4.weight', '0.4.bias']
HEAD = ['1.2.weight', '1.2.bias', '1.3.weight', '1.3.bias']
STATS = ['0.1.running_mean', '0.1.running_var', '0.4.running_mean', '0.4.running_var']


def snapshot(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def moved(learn, before): return {k for k, v in learn.model.state_dict().items() if not v.equal(before[k])}


def trained_before(learn, how):
    if 'fit' in how: learn.fit(1)
    if 'lr_find' in how:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            learn.lr_find(num_it=5, show_plot=False)
    if 'interrupt' in how:
        class Stop(Callback):
            def after_backward(self): raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())


@pytest.mark.parametrize('splitter,preset,before,opt', list(product(
    SPLITTERS, ['freeze_non_bn', 'freeze_body'], ['nothing', 'fit', 'fit+lr_find', 'fit+interrupt'], [Adam, partial(SGD, mom=.9), ranger, partial(OptimWrapper, opt=torch.optim.AdamW)])))
def test_frozen_does_not_move_by_one_bit(splitter, preset, before, opt):
    learn = tiny_learner(splitter=SPLITTERS[splitter], opt_func=opt, wd=.1)
    trained_before(learn, before)
    getattr(learn, preset)()
    snap = snapshot(learn)
    learn.fit(2)
    got = moved(learn, snap)
    train = HEAD+(BNS if preset == 'freeze_non_bn' else [])
    assert not got & ({*CONVS, *BNS}-{*train}) and {*train} <= got and {*STATS} <= got # 'update': statistics follow
    learn.unfreeze()
    snap = snapshot(learn)
    learn.fit(1)
    assert {*CONVS, *BNS, *HEAD} <= moved(learn, snap)


@pytest.mark.parametrize('opt', [Adam, SGD])
def test_fastai_drifts_where_ours_does_not(opt):
    "The control: weight decay goes on shrinking what fastai's freeze_to froze, by (1-lr*wd) a step"
    learn = tiny_learner(splitter=two_groups, opt_func=opt, wd=.01, train_bn=False)
    learn.fit(1)
    learn.freeze()
    w = learn.model[0][0].weight.detach().clone()
    learn.fit(2, 1e-2)
    torch.testing.assert_close(learn.model[0][0].weight, w*(1-1e-2*.01)**8, rtol=1e-5, atol=0)
    assert not learn.model[0][0].weight.requires_grad and not learn.model[0][0].weight.equal(w)


def test_parameters_frozen_before_the_optimizer_was_made_come_back():
    learn = tiny_learner()
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    learn.fit(1)
    assert len(learn.opt.all_params()) == 4
    learn.unfreeze()
    snap = snapshot(learn)
    learn.fit(1)
    assert {*CONVS, *BNS, *HEAD} <= moved(learn, snap)


@pytest.mark.parametrize('preset,kw', [('freeze_non_bn', {}), ('freeze_body', {}), ('unfreeze', {})])
@pytest.mark.parametrize('how', ['hold', 'batch'])
def test_statistics_that_do_not_move(preset, kw, how):
    learn = tiny_learner(splitter=two_groups)
    learn.fit(1)
    getattr(learn, preset)(bn_stats=how, **kw)
    snap, seen = snapshot(learn), []
    class Look(Callback):
        order = 99
        def after_pred(self): seen.append((self.training, learn.model[0][1].training, learn.model[1][2].training))
    learn.fit(1); learn.fit(1, cbs=Look())
    got = moved(learn, snap)
    assert not got & {*STATS, '0.1.num_batches_tracked'} and {'1.2.running_mean', '1.3.weight'} <= got # the head's own statistics do move
    assert {s for s in seen if s[0]} == {(True, how == 'batch', True)}
    assert learn.model[0][1].track_running_stats # the model keeps no trace of it, for another learner
    learn.unfreeze()
    learn.fit(1)
    assert {*STATS} <= moved(learn, snap)


@pytest.mark.parametrize('end', [lambda l: l.freeze(), lambda l: l.freeze_to(0), lambda l: l.freeze_body(), lambda l: l.unfreeze()])
def test_the_next_call_ends_a_policy(end):
    learn = tiny_learner(splitter=two_groups)
    learn.freeze_non_bn(bn_stats='hold')
    end(learn)
    snap = snapshot(learn)
    learn.fit(1)
    assert {*STATS} <= moved(learn, snap)


def test_hold_normalises_by_the_running_statistics():
    learn = tiny_learner(splitter=two_groups)
    learn.fit(1)
    learn.freeze_body(bn_stats='hold')
    out = {}
    class Grab(Callback):
        order = 99
        def before_batch(self):
            if self.training and 'x' not in out: out['x'] = self.xb[0].clone()
        def after_pred(self):
            if self.training and 'y' not in out: out['y'] = learn.model[0](out['x']).detach()
    body = deepcopy(learn.model[0]).eval()
    learn.fit(1, cbs=Grab())
    torch.testing.assert_close(out['y'], body(out['x']))


def test_a_policy_goes_with_an_exported_learner(tmp_path):
    dls = digits(bs=64).target
    learn = quiet(Learner(dls, tiny_model(classes=4), splitter=bn_splitter, path=tmp_path))
    learn.freeze_body(bn_stats='hold')
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # load_learner warns of pickle
        back = quiet(load_learner(tmp_path/'export.pkl'))
    back.dls = dls
    snap = snapshot(back)
    back.fit(1)
    assert not moved(back, snap) & {*CONVS, *BNS, *STATS} and {*HEAD} <= moved(back, snap)


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
    with pytest.raises(ValueError, match="'Linear', which is not in this Sequential; it has 0, 1"): find_head(m, nn.Linear(1, 1))
    with pytest.raises(ValueError, match="Found 'fc', which is not in this Sequential"): find_head(m, 'fc')
    for h, n in (([], 'no'), (m, 'every')):
        with pytest.raises(ValueError, match=f'names {n} parameter'): find_head(m, h)
    with pytest.raises(ValueError, match='No head found'): find_head(nn.ReLU())


def test_splitter_groups():
    m = tiny_model()
    names = {id(p): n for n, p in m.named_parameters()}
    assert [[names[id(p)] for p in g] for g in bn_splitter(m)] == [CONVS, BNS, HEAD]
    learn = tiny_learner(splitter=bn_splitter)
    learn.freeze_to(1)
    assert [p.requires_grad for p in learn.model.parameters()] == [n in BNS+HEAD for n, _ in learn.model.named_parameters()]


def test_what_was_taken_is_said():
    learn, said = tiny_learner(splitter=two_groups), []
    learn.logger = said.append
    learn.freeze_non_bn()
    assert said == ["freeze_non_bn: 4 tensors of the head train (head = the splitter's last group), 4 of the body batch norm; 2 of 10 are frozen"]


def test_errors():
    with pytest.raises(ValueError, match=r'0 batch norm layers.*freeze_body\(\)'): tiny_learner(tiny_model(bn=False)).freeze_non_bn()
    learn = tiny_learner()
    for call in (learn.freeze_non_bn, learn.freeze_body, learn.unfreeze):
        with pytest.raises(ValueError, match="one of update, hold, batch. Found 'frozen'"): call(bn_stats='frozen')
    assert all(p.requires_grad for p in learn.model.parameters()) # a refused call changes nothing


# --- removing batch norm
def warmed(m):
    "A model whose batch norm layers have statistics and scales of their own"
    for b in m.modules():
        if isinstance(b, nn.BatchNorm2d): nn.init.uniform_(b.weight, .5, 1.5); nn.init.normal_(b.bias)
    m.train()
    with torch.no_grad(): m(torch.randn(8, 3, 64, 64))
    return m.eval()


@pytest.mark.parametrize('arch,n', [(lambda: xresnet18(n_out=5), 22), (lambda: tv_resnet18(weights=None, num_classes=5), 20)])
def test_no_batch_norm_is_left(arch, n):
    m = warmed(arch())
    x, before = torch.randn(4, 3, 64, 64), {k: v.clone() for k, v in m.named_parameters()}
    y = m(x).detach()
    assert count_bn(m) == n
    folded = remove_bn(deepcopy(m), fold=True)
    assert count_bn(folded) == 0
    torch.testing.assert_close(folded(x), y, rtol=1e-3, atol=1e-3*y.abs().max().item())
    deleted = remove_bn(m)
    assert deleted is m and count_bn(m) == 0 and not torch.allclose(m(x), y)
    left = dict(m.named_parameters())
    assert all(left[k].equal(v) for k, v in before.items() if k in left)
    assert sum(k.endswith('bias') and not v.any() for k, v in left.items()) >= n and all(v.requires_grad for v in left.values())


def test_folding_keeps_modes_and_frozen_flags():
    m = warmed(tiny_model()[0])
    m.train(); m[0].weight.requires_grad_(False)
    remove_bn(m, fold=True)
    assert m[0].training and not m[0].bias.requires_grad and m[3].bias.requires_grad


def test_folding_linear_transposed_and_one_dimensional():
    for lin, bn, x in [(nn.Linear(3, 4), nn.BatchNorm1d(4), torch.randn(5, 3)), (nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), torch.randn(2, 3, 5, 5)),
                       (nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), torch.randn(2, 3, 6))]:
        m = nn.Sequential(lin, bn); m(x); m.eval()
        y = m(x)
        torch.testing.assert_close(remove_bn(m, fold=True)(x), y)


def test_folding_is_refused_where_it_would_change_the_function():
    with pytest.raises(ValueError, match='was not found to follow, alone and directly'): remove_bn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), fold=True)
    with pytest.raises(ValueError, match='no running statistics'): remove_bn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), fold=True)
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        def forward(self, x): y = self.conv(x); return self.bn(y)+y
    with pytest.raises(ValueError, match='layer bn can.t be folded'): remove_bn(Twice(), fold=True)
    class Shared(nn.Module): # one convolution, two batch norms: detection heads do this
        def __init__(self): super().__init__(); self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        def forward(self, x): return self.a(self.conv(x))+self.b(self.conv(x))
    class Peek(nn.Module):
        def __init__(self): super().__init__(); self.s = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        def forward(self, x): return self.s[0](x)+self.s(x)
    conv, bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
    for m in (Shared(), Peek(), nn.Sequential(conv, bn, conv, bn), nn.Sequential(nn.ConvTranspose2d(3, 9, 2, groups=3), nn.BatchNorm2d(9))):
        with pytest.raises(ValueError, match='called once'): remove_bn(m, fold=True)
        assert count_bn(m) > 0 # refused whole
    m = densenet121(weights=None)
    with pytest.raises(ValueError, match='was not found to follow, alone and directly'): remove_bn(m, fold=True)
    assert count_bn(m) == 121 # refused whole, not half done
    assert count_bn(remove_bn(m)) == 0


def test_a_model_that_is_batch_norm(): assert isinstance(remove_bn(nn.BatchNorm2d(3)), nn.Identity)
