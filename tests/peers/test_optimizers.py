"""Every optimizer of fastai, torch and timm trains as without this library, and moves no frozen parameter"""
import json
from pathlib import Path

import pytest
import torch
from forks import run, script
from optimizer_sweep import OPTIMIZERS, fit_save_load, learner, outcome, train

import fastai_bnstats.all # noqa: F401


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(scope='module')
def plain():
    "Optimizer -> hash of the weights that plain fastai trains, or the exception"
    return json.loads(run(script, Path(__file__).parent/'optimizer_sweep.py').stdout.splitlines()[-1])


def trains(name, plain): return ':' not in plain[name] # a hash


def test_most_optimizers_train(plain):
    assert sum(trains(n, plain) for n in OPTIMIZERS) >= .8*len(OPTIMIZERS)
    assert {'fastai ranger', 'torch Adafactor'} <= {n for n in OPTIMIZERS if trains(n, plain)}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_the_import_changes_nothing(name, plain):
    assert outcome(name) == plain[name]


def frozen_weights(learn): return {n: p.detach().clone() for n, p in learn.model.named_parameters() if not p.requires_grad}


def check_frozen(learn):
    "Freeze, train, and compare bits"
    learn.freeze_non_bn()
    frozen, head = frozen_weights(learn), learn.model[1].weight.detach().clone()
    assert {*frozen} == {'0.0.weight', '0.0.bias', '0.3.weight', '0.3.bias'}
    fit_save_load(learn)
    now = dict(learn.model.named_parameters())
    assert not [n for n, w in frozen.items() if not w.equal(now[n])]
    assert not head.equal(learn.model[1].weight)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_no_frozen_parameter_moves(name, plain):
    if not trains(name, plain): pytest.skip(f'fails in plain fastai: {plain[name]}')
    learn = learner(name)
    check_frozen(learn)
    learn.unfreeze()
    train(learn)
    check_frozen(learn)
