"""The calls on vision, segmentation, tabular, text and timm learners"""
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import quiet
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders
from fastai.collab import CollabDataLoaders, collab_learner
from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner
from fastai.text.all import AWD_LSTM, BaseTokenizer, TextDataLoaders, text_classifier_learner
from fastai.vision.all import TensorImage, TensorMask, resnet18, unet_learner, vision_learner, xresnet18
from torchvision.models import densenet121

from fastai_bnstats.freeze import KeepFrozen, LedgerCallback, bn_doctor, is_bn


def vision(arch, classes=2):
    xs, ys = torch.randn(16, 3, 32, 32), torch.randint(0, classes, (16,))
    dls = DataLoaders(*[DataLoader([(TensorImage(x), y) for x, y in zip(xs, ys, strict=True)], bs=8) for _ in range(2)])
    return vision_learner(dls, arch, n_out=classes, normalize=False, pretrained=False, loss_func=CrossEntropyLossFlat())


def unet():
    items = [(TensorImage(torch.randn(3, 32, 32)), TensorMask(torch.randint(0, 2, (32, 32)))) for _ in range(8)]
    dls = DataLoaders(*[DataLoader(items, bs=4) for _ in range(2)])
    return unet_learner(dls, resnet18, n_out=2, normalize=False, pretrained=False, loss_func=CrossEntropyLossFlat(axis=1))


def tabular():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(a=rng.normal(size=64), b=rng.normal(size=64), c=rng.choice(['x', 'y'], 64), y=rng.choice(['n', 'm'], 64)))
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, Normalize], cat_names=['c'], cont_names=['a', 'b'], y_names='y',
                                     valid_idx=range(16), bs=16)
    return tabular_learner(dls, layers=[8, 4], n_out=2)


def text():
    rng, words = np.random.default_rng(0), ['good', 'bad', 'fine', 'poor']
    texts = [' '.join(rng.choice(words, 12)) for _ in range(24)]
    df = pd.DataFrame(dict(text=texts, label=rng.choice(['n', 'm'], 24), is_valid=[False]*16+[True]*8))
    dls = TextDataLoaders.from_df(df, text_col='text', label_col='label', valid_col='is_valid', bs=8, seq_len=12, tok_tfm=BaseTokenizer(),
                                  text_vocab=['xxunk', 'xxpad', 'xxbos', 'xxmaj', *words], num_workers=0)
    dropout = dict(output_p=.1, hidden_p=.1, input_p=.1, embed_p=.1, weight_p=.1)
    config = dict(emb_sz=8, n_hid=8, n_layers=2, pad_token=1, bidir=False, **dropout)
    return text_classifier_learner(dls, AWD_LSTM, pretrained=False, config=config)


def collab(use_nn):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(user=rng.integers(0, 8, 64), item=rng.integers(0, 9, 64), rating=rng.uniform(0, 5, 64)))
    return collab_learner(CollabDataLoaders.from_df(df, bs=16), n_factors=4, use_nn=use_nn, y_range=(0, 5))


LEARNERS = dict(resnet=lambda: vision(resnet18), xresnet=lambda: vision(xresnet18), densenet=lambda: vision(densenet121),
                timm=lambda: vision('resnet10t'), unet=unet, tabular=tabular, text=text)
KINDS = [pytest.param(k, marks=[pytest.mark.slow]*(k in ('densenet', 'unet'))) for k in LEARNERS]
NO_BODY_BN = {'text'} # its batch norm is in the head


def names(model, ps):
    ids = {id(p) for p in ps}
    return {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in ids}


def learner(kind):
    if kind == 'timm': pytest.importorskip('timm')
    return made(LEARNERS[kind])


def made(f, *args):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # from fastai's data blocks and timm
        return quiet(f(*args))


@pytest.mark.parametrize('preset,how', [('freeze_non_bn', 'hold'), ('freeze_body', 'batch'), ('freeze_non_bias', 'update')])
@pytest.mark.parametrize('kind', KINDS)
def test_frozen_on_learners_of_every_kind(kind, preset, how):
    learn = learner(kind)
    learn.fit(1)
    if kind in NO_BODY_BN and preset == 'freeze_non_bn':
        with pytest.raises(ValueError, match='no batch norm to train'): learn.freeze_non_bn()
        return
    getattr(learn, preset)(bn_stats=how)
    model = learn.model
    # which parameters and buffers belong to what, determined independently
    groups = learn.splitter(model)
    one_group = len(groups) == 1 or not isinstance(groups[-1], (list, tuple))
    head = names(model, model.layers.parameters() if one_group and kind == 'tabular' else groups[-1])
    every = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    mods = {n: m for n, m in model.named_modules(remove_duplicate=False)}
    body_bn = {n for n, m in mods.items() if is_bn(m) and not {f'{n}.{k}' for k, _ in m.named_parameters()} & head}
    gammas_betas = {f'{n}.{k}' for n in body_bn for k, _ in mods[n].named_parameters()}
    biases = {n for n in every if 'bias' in n.split('.')[-1]}
    extra = {'freeze_body': set(), 'freeze_non_bn': gammas_betas, 'freeze_non_bias': biases}[preset]
    held = {f'{n}.{k}' for n in body_bn for k, _ in mods[n].named_buffers()} if how != 'update' else set()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    learn.fit(2, 1e-2)
    moved = {k for k, v in model.state_dict().items() if not v.equal(before[k])}
    assert head and not moved & ((every-head-extra) | held)
    assert {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad} == head | extra
    # some have no gradient: a gamma of 0 blocks that of the layers before it, and batch norm cancels the bias before it
    assert len((head | extra)-moved) <= .2*len(head | extra)
    assert how != 'update' or {f'{n}.num_batches_tracked' for n in body_bn} <= moved


@pytest.mark.parametrize('kind', ['xresnet', pytest.param('unet', marks=pytest.mark.slow)])
def test_fine_tune_with_a_policy(kind):
    learn = learner(kind)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fine_tune(1, cbs=KeepFrozen('non_bn', bn_stats='hold'))
    moved = {k for k, v in learn.model.state_dict().items() if not v.equal(before[k])}
    stem, stem_bn = [{k for k in before if k.startswith(p)} for p in (('0.0', 'layers.0.0'), ('0.0.1', 'layers.0.1'))]
    assert moved and not (moved & stem)-stem_bn
    assert not {k for k in moved if 'running' in k and k.startswith(('0.', 'layers.0.'))}


@pytest.mark.parametrize('kind', KINDS)
def test_doctor_and_ledger_on_learners_of_every_kind(kind):
    learn = learner(kind)
    d = bn_doctor(learn)
    expected = {'small batches', 'one group'} if kind == 'tabular' else {'small batches'} # a new learner has no other problem
    assert set(d.warnings) <= expected
    assert len(d.layers) == sum(map(is_bn, learn.model.modules()))
    learn.add_cb(LedgerCallback())
    learn.freeze_body(bn_stats='hold')
    learn.fit(1)
    t = learn.ledger.table
    frozen = {n for n, p in learn.model.named_parameters() if not p.requires_grad}
    assert {*t.index[t.declared == 'frozen']} == frozen and (t.found[t.declared.isin(['frozen', 'held'])] == 'identical').all()
    d = bn_doctor(learn)
    assert set(d.warnings) <= {'small batches'} and (d.layers[d.layers.part == 'body'].statistics == 'held').all()


def test_a_model_of_embeddings_has_no_head():
    learn = made(collab, False)
    learn.fit(1)
    error = (r"No head found in EmbeddingDotBias: its last layer with parameters, i_bias, is an embedding.* Pass head=.* the children are "
             r"u_weight, i_weight, u_bias, i_bias")
    for call in (learn.freeze_body, learn.freeze_non_bias):
        with pytest.raises(ValueError, match=error): call()
    assert all(p.requires_grad for p in learn.model.parameters()) and learn.freeze_policy is None
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.freeze_body(head=['u_bias', 'i_bias']) # the remedy
    learn.fit(1)
    assert {k for k, v in learn.model.state_dict().items() if not v.equal(before[k])} == {'u_bias.weight', 'i_bias.weight'}
    learn.unfreeze(bn_stats='hold'); learn.freeze_all()
    assert 'head = none found' in bn_doctor(learn).title


def test_embeddings_with_layers_have_a_head():
    learn = made(collab, True)
    learn.freeze_body()
    assert learn.freeze_policy.head == 'layers'
    assert {n for n, p in learn.model.named_parameters() if p.requires_grad} == {n for n, _ in learn.model.named_parameters()
                                                                                if n.startswith('layers.')}
