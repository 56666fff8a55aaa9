"""Learners, names and splitters that several tests of freezing share"""
import warnings
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from helpers import tiny_learner
from fastai.basics import Adam, Callback, OptimWrapper, SGD, params, ranger, trainable_params

from fastai_bnstats.freeze import bn_splitter


def two_groups(m): return [params(m[0]), params(m[1])]
def buffers_of(*bns): return {f'{b}.{n}' for b in bns for n in ('running_mean', 'running_var', 'num_batches_tracked')}


CONVS, BNS = {'0.0.weight', '0.3.weight'}, {'0.1.weight', '0.1.bias', '0.4.weight', '0.4.bias'}
HEAD = {'1.2.weight', '1.2.bias', '1.3.weight', '1.3.bias'}
STATS, HEAD_STATS = buffers_of('0.1', '0.4'), buffers_of('1.2')
OPTS = {'Adam': Adam, 'SGD': partial(SGD, mom=.9), 'ranger': ranger, 'torch AdamW': partial(OptimWrapper, opt=torch.optim.AdamW),
        'torch SGD': partial(OptimWrapper, opt=torch.optim.SGD, momentum=.9)}
SPLITTERS = {'one group': trainable_params, 'two groups': two_groups, 'bn_splitter': bn_splitter}
PRESETS = {'freeze_body': HEAD, 'freeze_non_bn': HEAD | BNS, 'freeze_non_bias': HEAD | {'0.1.bias', '0.4.bias'}, 'freeze_all': set(),
           'unfreeze': HEAD | BNS | CONVS}
POLICIES = ['update', 'hold', 'batch']


def snapshot(learn): return {k: v.clone() for k, v in learn.model.state_dict().items()}
def moved(learn, before): return {k for k, v in learn.model.state_dict().items() if not v.equal(before[k])}


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # fastai's about pickled files and about AMP without a GPU
        yield


class Stop(Callback):
    def after_backward(self): raise KeyboardInterrupt


def interrupt(learn):
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())


def lr_find(learn):
    with no_warnings(): learn.lr_find(num_it=5, show_plot=False)


def slow_weights(cbs=()):
    "Frozen by hand, while Lookahead keeps slow weights that differ"
    learn = tiny_learner(cbs=cbs, splitter=two_groups, opt_func=ranger)
    learn.fit(1)
    for p in learn.model[0].parameters(): p.requires_grad_(False); p.grad = None
    return learn
