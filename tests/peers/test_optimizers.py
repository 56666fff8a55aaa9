"""Every optimizer of fastai, torch and timm trains as without this library, and moves no frozen parameter"""
import json
from pathlib import Path

import pytest
import torch
from fastai.basics import Callback
from forks import run, script
from optimizer_sweep import OPTIMIZERS, fit_save_load, learner, outcome, train

import fastai_bnstats.all # noqa: F401
from fastai_bnstats.landscape import LandscapeCallback


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


class Steps(Callback):
    "Length of each step"
    order = 80
    def __init__(self): self.lengths = []
    def trained(self): return [p.detach() for p in self.model.parameters() if p.requires_grad]
    def before_step(self): self.was = [p.clone() for p in self.trained()]
    def after_step(self): self.lengths.append(sum((p-w).double().pow(2).sum() for p, w in zip(self.trained(), self.was)).sqrt().item())


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_probe_knows_the_step_and_leaves_no_trace(name, plain):
    if not trains(name, plain): pytest.skip(f'fails in plain fastai: {plain[name]}')
    def fit(*cbs):
        learn = learner(name)
        learn.fit(2, cbs=cbs)
        return [*learn.model.state_dict().values()]
    probe, steps = LandscapeCallback(every=1), Steps()
    assert all(a.equal(b) for a, b in zip(fit(), fit(probe, steps)))
    assert probe.recording.distance[:, 0, 1] == pytest.approx(steps.lengths, rel=1e-5, abs=1e-12)
