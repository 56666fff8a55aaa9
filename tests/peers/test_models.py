"""Models that others wrote: every weight is recorded exactly, recording changes nothing, and no frozen parameter moves"""
import warnings
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision.models as tv
from fastai.basics import Callback, ConvLayer, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, set_seed
from fastai.vision.models.unet import DynamicUnet
from fastai.vision.models.xresnet import xresnet18
from torch import nn
from torch.nn.modules.conv import _ConvNd

from fastai_bnstats.all import (ActivationHistCallback, GradHistCallback, LedgerCallback, OutputGradHistCallback, UpdateHistCallback,
                                WeightHistCallback, count_bn)
from helpers import Items, quiet

RECORDERS = [WeightHistCallback, GradHistCallback, UpdateHistCallback, ActivationHistCallback, OutputGradHistCallback]


def from_timm(name, **kwargs): return partial(timm.create_model, name, num_classes=3, **kwargs)
def from_tv(f, **kwargs): return partial(f, num_classes=3, **kwargs)
def unet():
    return DynamicUnet(nn.Sequential(ConvLayer(3, 8, stride=2), ConvLayer(8, 16, stride=2), ConvLayer(16, 32, stride=2)), 3, (32, 32))


class Pooled(nn.Module):
    "A model of images as a classifier: the mean over the pixels of its output"
    def __init__(self, f):
        super().__init__()
        self.m = f()
    def forward(self, x): return self.m(x).mean((-2, -1))


MODELS = { # name -> (function that makes the model, size of an image); variants are small, so that the tests are fast
    'torchvision resnet': (from_tv(tv.ResNet, block=tv.resnet.BasicBlock, layers=[1, 1, 1, 1], width_per_group=64), 32),
    'torchvision mobilenet_v3': (from_tv(tv.mobilenet_v3_small, width_mult=.25), 32),
    'torchvision shufflenet_v2': (from_tv(tv.ShuffleNetV2, stages_repeats=[2, 2, 2], stages_out_channels=[8, 16, 32, 64, 128]), 32),
    'torchvision squeezenet1_1': (from_tv(tv.squeezenet1_1), 32),
    'torchvision densenet': (from_tv(tv.DenseNet, growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16), 32),
    'torchvision regnet': (from_tv(tv.RegNet, block_params=tv.regnet.BlockParams.from_init_params(
        depth=6, w_0=16, w_a=8., w_m=2., group_width=8, se_ratio=.25)), 32),
    'torchvision convnext': (from_tv(tv.ConvNeXt, block_setting=[tv.convnext.CNBlockConfig(16, 32, 1),
                                                                 tv.convnext.CNBlockConfig(32, None, 1)]), 32),
    'torchvision vit': (from_tv(tv.VisionTransformer, image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32,
                                mlp_dim=64), 32),
    'torchvision swin': (from_tv(tv.SwinTransformer, patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[2, 4],
                                 window_size=[4, 4]), 32),
    'torchvision maxvit': (from_tv(tv.MaxVit, input_size=(64, 64), stem_channels=16, partition_size=2, block_channels=[16, 32],
                                   block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.), 64),
    'timm vit': (from_timm('test_vit'), 160),
    'timm beit': (from_timm('beit_base_patch16_224', img_size=32, depth=2, embed_dim=48, num_heads=4), 32),
    'timm mixer': (partial(timm.models.mlp_mixer.MlpMixer, num_classes=3, img_size=32, patch_size=8, num_blocks=2, embed_dim=32), 32),
    'timm coat': (from_timm('coat_lite_tiny', img_size=32, serial_depths=(1, 1, 1, 1)), 32),
    'timm levit': (from_timm('levit_128s', img_size=64, embed_dim=(32, 48, 64), depth=(1, 1, 1)), 64),
    'timm mobilevit_xxs': (from_timm('mobilevit_xxs'), 64),
    'timm efficientnet': (from_timm('test_efficientnet'), 32),
    'timm byobnet': (from_timm('test_byobnet'), 32),
    'timm convnext': (from_timm('test_convnext'), 32),
    'timm nfnet': (from_timm('test_nfnet'), 32),
    'timm mambaout': (from_timm('test_mambaout'), 32),
    'timm resnetv2': (partial(timm.models.resnetv2.ResNetV2, [1, 1, 1, 1], [128, 128, 128, 128], num_classes=3), 32),
    'fastai xresnet18, self-attention': (partial(xresnet18, n_out=3, sa=True), 32),
    'fastai unet': (partial(Pooled, unet), 32),
}


def is_layer(m): return isinstance(m, (nn.Linear, _ConvNd))


def weights_of(model):
    "Copies of parameters, and of the weights that spectral norm computes from them"
    ps, buffers = {n: p.detach().clone() for n, p in model.named_parameters()}, dict(model.named_buffers())
    computed = {n[:-5]: p/(buffers[n[:-4]+'u'] @ p.flatten(1) @ buffers[n[:-4]+'v']) for n, p in ps.items() if n.endswith('_orig')}
    return ps | computed


class Truth(Callback):
    "Gradients, and weights before and after the last step, and the outputs of layers in its forward pass with their gradients"
    order = 1000
    def before_batch(self):
        if not self.training: return
        self.before, self.outputs = weights_of(self.model), {n: [] for n, m in self.model.named_modules() if is_layer(m)}
        self.output_grads = {n: [] for n in self.outputs}
        def see(n, module, args, output):
            self.outputs[n].append(output.detach().clone())
            if output.requires_grad: output.register_hook(lambda g: self.output_grads[n].append(g.detach().clone()))
        self.hooks = [self.model.get_submodule(n).register_forward_hook(partial(see, n)) for n in self.outputs]
    def after_pred(self):
        while self.training and self.hooks: self.hooks.pop().remove()
    def before_step(self): self.grads = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
    def after_step(self): self.after = weights_of(self.model)


def learner(name, cbs=()):
    make, size = MODELS[name]
    set_seed(3)
    model = make()
    items = Items(zip(torch.randn(8, 3, size, size), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), strict=True))
    dls = DataLoaders(DataLoader(items, bs=4), DataLoader(items[:4], bs=4))
    return quiet(Learner(dls, model, loss_func=CrossEntropyLossFlat(), lr=1e-3, cbs=cbs))


def fit(learn):
    set_seed(5) # dropout
    learn.fit(1)
    return {n: t.clone() for n, t in learn.model.state_dict().items()}


def same_bits(a, b): return a.shape == b.shape and a.view(-1).view(torch.uint8).equal(b.view(-1).view(torch.uint8))


def layer_weights(model):
    "Names of the matrices that layers use"
    layers = [n for n, m in model.named_modules() if is_layer(m)]
    attention = [n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return {f'{n}.weight' for n in layers} | {f'{n}.in_proj_weight' for n in attention}


def check_row(rec, name, x):
    "The last row against NumPy in float64"
    i, x = rec.names.tolist().index(name), x.detach().double().numpy().ravel()
    edges = rec.edges[i]
    assert rec.hist[-1, i].tolist() == np.histogram(x, edges)[0].tolist()
    assert (rec.under[-1, i], rec.over[-1, i]) == ((x < edges[0]).sum(), (x > edges[-1]).sum())
    size = np.abs(x).max()
    assert rec.mean[-1, i] == pytest.approx(x.mean(), rel=1e-5, abs=1e-6*size)
    assert rec.var[-1, i] == pytest.approx(x.var(), rel=1e-4, abs=1e-10*size**2)


@pytest.mark.parametrize('name', MODELS)
def test_recording_is_complete_and_exact_and_changes_nothing(name):
    plain = fit(learner(name))
    learn = learner(name)
    recorders, truth = [cls() for cls in RECORDERS], Truth()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        learn.add_cbs([*recorders, truth])
        now = fit(learn)
    assert not [n for n in plain if not same_bits(plain[n], now[n])], 'training differs'
    weights, grads, updates, outputs, output_grads = (cb.recording for cb in recorders)
    ps = dict(learn.model.named_parameters())
    assert {*weights.names.tolist()} == layer_weights(learn.model)
    assert weights.names.tolist() == updates.names.tolist()
    assert grads.names.tolist() == [n if n in ps else n+'_orig' for n in weights.names.tolist()] # spectral norm computes some

    left = {n for n, p in ps.items() if sum(s > 1 for s in p.shape) > 1} - {*weights.names.tolist(), *grads.names.tolist()}
    texts = {str(w.message) for w in heard if issubclass(w.category, UserWarning) and str(w.message).startswith('Not recorded')}
    assert len(texts) == bool(left) and all(f'({len(left)} in all)' in t for t in texts)
    assert not [w for w in heard if 'stopped recording' in str(w.message)]

    for rec in (weights, grads, updates, outputs, output_grads):
        assert len(rec) == len(rec.loss) == 2 and len(rec.valid_loss) == 1
        assert (rec.hist.sum(-1)+rec.under+rec.over+rec.nonfinite == rec.numel).all()
    for n in weights.names.tolist():
        check_row(weights, n, truth.after[n])
        check_row(updates, n, truth.after[n]-truth.before[n])
    for n in truth.grads.keys() & {*grads.names.tolist()}: check_row(grads, n, truth.grads[n])
    for rec, seen in ((outputs, truth.outputs), (output_grads, truth.output_grads)):
        assert {*rec.names.tolist()} == {*seen}
        for n, calls in seen.items():
            if calls: check_row(rec, n, torch.cat([x.flatten() for x in calls]))
            else: assert rec.numel[-1, rec.names.tolist().index(n)] == 0


@pytest.mark.parametrize('name', MODELS)
def test_no_frozen_parameter_moves(name):
    learn = learner(name, LedgerCallback())
    fit(learn) # so that gradients and optimizer state exist
    body_bn = count_bn(learn.model)
    if not body_bn:
        with pytest.raises(ValueError, match='The body has no batch norm to train.*Call learn.freeze_body'): learn.freeze_non_bn()
        learn.freeze_body()
    else: learn.freeze_non_bn()
    frozen = {n: p.detach().clone() for n, p in learn.model.named_parameters() if not p.requires_grad}
    free = {n: p.detach().clone() for n, p in learn.model.named_parameters() if p.requires_grad}
    assert frozen and free
    fit(learn)
    now = dict(learn.model.named_parameters())
    assert not [n for n, p in frozen.items() if not same_bits(p, now[n].detach())]
    assert [n for n, p in free.items() if not same_bits(p, now[n].detach())]
