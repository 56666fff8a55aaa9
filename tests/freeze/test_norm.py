"""Counting, removing and folding batch norm, and recomputing its statistics"""
from copy import deepcopy

import pytest
import torch
from helpers import Items, quiet, tiny_learner, tiny_model
from fastai.basics import DataLoader, DataLoaders, Learner, MSELossFlat, nn
from fastai.vision.all import xresnet18
from torchvision.models import densenet121, resnet18 as tv_resnet18

from fastai_bnstats.freeze import count_bn, is_bn, remove_bn


def warmed(m):
    "A model whose batch norm layers have random scales and statistics that are not 0 and 1"
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
    for lin, bn, x in [(nn.Linear(3, 4), nn.BatchNorm1d(4), torch.randn(5, 3)),
                       (nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4), torch.randn(2, 3, 5, 5)),
                       (nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), torch.randn(2, 3, 6))]:
        m = nn.Sequential(lin, bn); m(x); m.eval()
        y = m(x)
        torch.testing.assert_close(remove_bn(m, fold=True)(x), y)


def test_folding_is_refused_where_it_would_change_the_function():
    with pytest.raises(ValueError, match='must directly follow a convolution or linear layer.*Fold only a part'):
        remove_bn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), fold=True)
    with pytest.raises(ValueError, match='no running statistics'):
        remove_bn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), fold=True)
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
        assert count_bn(m) >0 # nothing was removed
    m = densenet121(weights=None)
    with pytest.raises(ValueError, match='must directly follow'): remove_bn(m, fold=True)
    assert count_bn(m) == 121 # nothing was removed
    assert count_bn(remove_bn(m)) == 0


def test_a_model_that_is_batch_norm(): assert isinstance(remove_bn(nn.BatchNorm2d(3)), nn.Identity)


# --- counting, and recomputing statistics
def test_which_layers_are_batch_norm():
    assert all(is_bn(m) for m in (nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.LazyBatchNorm2d(), nn.SyncBatchNorm(2)))
    assert not any(is_bn(m) for m in (nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.InstanceNorm2d(2)))


def mean_over(batches): # the plain mean over batches, computed independently
    xs = [b.double() for b in batches]
    return torch.stack([x.mean((0, 2, 3)) for x in xs]).mean(0), torch.stack([x.var((0, 2, 3), correction=1) for x in xs]).mean(0)


@pytest.mark.parametrize('k', [None, 1, 2])
def test_recalibrated_statistics_are_means_over_batches(k):
    learn = tiny_learner(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(.5), nn.Linear(192, 2)))
    learn.fit(1)
    learn.model.train(); learn.model[0].eval()
    dl = learn.dls.valid
    params = {n: p.clone() for n, p in learn.model.named_parameters()}
    learn.recalibrate_bn(k, dl)
    mean, var = mean_over([x for x, _ in list(dl)[:k]])
    bn = learn.model[0]
    torch.testing.assert_close(bn.running_mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bn.running_var.double(), var, rtol=1e-4, atol=1e-6)
    assert bn.num_batches_tracked == (k or len(dl)) and bn.momentum == .1 and learn.model.training and not bn.training
    assert all(p.equal(params[n]) and p.requires_grad for n, p in learn.model.named_parameters())


def test_recalibrating_on_the_training_set_with_several_inputs():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.bn, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 1)
        def forward(self, a, b): return self.fc(self.bn(a+b))
    items = [(torch.randn(3), torch.full((3,), 5.), torch.randn(1)) for _ in range(32)]
    learn = quiet(Learner(DataLoaders(DataLoader(items, bs=8), DataLoader(items[:8], bs=8)), Two(), loss_func=MSELossFlat()))
    learn.recalibrate_bn()
    torch.testing.assert_close(learn.model.bn.running_mean, torch.stack([a+b for a, b, _ in items]).mean(0))
    learn.unfreeze(bn_stats='hold')
    learn.recalibrate_bn(2) # 'hold' applies to training only
    assert learn.model.bn.num_batches_tracked == 2


class Broken(Items):
    "The third batch fails"
    def __getitem__(self, i):
        if isinstance(i, int) and i >= 8: raise OSError('the disk is gone')
        return super().__getitem__(i)


def interrupt_third():
    "A hook that interrupts the third call"
    calls = []
    def hook(m, x):
        calls.append(m)
        if len(calls) == 3: raise KeyboardInterrupt
    return hook


@pytest.mark.parametrize('what', [OSError, KeyboardInterrupt, ValueError])
def test_failed_recalibration_changes_nothing(what):
    learn = tiny_learner()
    learn.fit(1)
    learn.model[0].train(); learn.model[1].eval()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    items = learn.dls.valid.dataset
    if what is OSError: dl = DataLoader(Broken(items), bs=4)
    elif what is ValueError: dl = DataLoader(Items(items[:9]), bs=4) # the last batch has one item, which the head's batch norm refuses
    else: dl = DataLoader(items, bs=4); learn.model[1].register_forward_pre_hook(interrupt_third())
    with pytest.raises(what): learn.recalibrate_bn(dl=dl)
    assert all(v.equal(before[k]) for k, v in learn.model.state_dict().items())
    assert all(m.momentum == .1 and m.track_running_stats for m in learn.model.modules() if is_bn(m))
    assert learn.model[0][1].training and not learn.model[1][2].training


def test_recalibrating_layers_with_track_running_stats_switched_off():
    learn = tiny_learner()
    learn.model[0][1].track_running_stats = False
    learn.recalibrate_bn()
    assert learn.model[0][1].running_mean.any() and not learn.model[0][1].track_running_stats


def test_recalibrating_refuses():
    for k in (0, -1, 1.5, 1., True, [1], float('nan')):
        with pytest.raises(ValueError, match='whole number of batches, at least 1, or None for all of them. Found '):
            tiny_learner().recalibrate_bn(k)
    with pytest.raises(ValueError, match='has no batch norm layer'):
        tiny_learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 2))).recalibrate_bn()
    learn = tiny_learner()
    learn.fit(1)
    before = learn.model[0][1].running_mean.clone()
    for dl in (DataLoader(Items()), DataLoader(Items(learn.dls.valid.dataset[:10]), bs=16, drop_last=True)):
        with pytest.raises(ValueError, match='gives no batch.*Pass another one as dl='): learn.recalibrate_bn(dl=dl)
    for dl in ('valid', 3):
        with pytest.raises(ValueError, match='dl must be a DataLoader'): learn.recalibrate_bn(dl=dl)
    assert learn.model[0][1].running_mean.equal(before)
