"""The calls in a distributed fit: in one process, and with accelerate in two"""
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from fastai.basics import Callback
from forks import ranks
from freeze_cases import BNS, HEAD, HEAD_STATS, POLICIES, STATS, moved, snapshot, two_groups
from helpers import tiny_learner
from torch.nn.parallel import DistributedDataParallel

from fastai_bnstats.freeze import KeepFrozen, LedgerCallback

MOVED = {'freeze_all': set(), 'all': set(), 'freeze_body': HEAD, 'non_bn': HEAD | BNS} # of the parameters


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Wrap(Callback):
    "What fastai's DistributedTrainer does to the model"
    order = 11
    def before_fit(self): self.learn.model = DistributedDataParallel(self.learn.model)
    def after_fit(self): self.learn.model = self.learn.model.module


def fit(learn, call):
    if call.startswith('freeze'): getattr(learn, call)()
    learn.fit(1, cbs=[Wrap()]+([] if call.startswith('freeze') else [KeepFrozen(call)]))
    learn.validate(cbs=Wrap())


@pytest.mark.parametrize('call', MOVED)
def test_a_wrapped_model(call, process_group):
    learn = tiny_learner(splitter=two_groups, cbs=LedgerCallback())
    learn.fit(1)
    before = snapshot(learn)
    fit(learn, call)
    assert moved(learn, before) == MOVED[call] | STATS | HEAD_STATS
    assert {n for n, p in learn.model.named_parameters() if p.requires_grad} == (
        MOVED[call] if call.startswith('freeze') else {n for n, _ in learn.model.named_parameters()})
    declared = learn.ledger.table.declared
    assert {n for n in declared.index if declared[n] == 'trains'} == MOVED[call] # the flag is false again when training starts
    learn.unfreeze()
    before = snapshot(learn)
    learn.fit(1, cbs=Wrap())
    assert moved(learn, before) == {*before}


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec('accelerate'), reason='fastai needs accelerate for a distributed fit')
def test_two_processes(tmp_path):
    cases = [*(f'freeze_body {bn_stats}' for bn_stats in POLICIES), 'non_bn hold', 'non_bn batch', 'freeze_all update', 'freeze_all hold',
             'all update', 'all batch']
    for p in ranks(Path(__file__).parent/'distributed_fit.py', tmp_path, *cases): assert p.returncode == 0, p.stderr[-3000:]
    results = [json.loads((tmp_path/f'{rank}.json').read_text()) for rank in (0, 1)]
    for rank, result in enumerate(results):
        for case, r in result.items():
            call, bn_stats = case.split()
            stats = (STATS if bn_stats == 'update' else set()) | (HEAD_STATS if bn_stats == 'update' or 'all' not in call else set())
            assert {*r['moved']} == {*r['ledger']} == MOVED[call] | stats and not r['broken']
            assert {n for n, d in r['declared'].items() if d == 'trains'} == MOVED[call]
            assert {n for n, d in r['declared'].items() if d == 'held'} == STATS-stats | (HEAD_STATS-stats)
            assert {*r['trainable']} == MOVED[call] or not call.startswith('freeze') and len(r['trainable']) == 10
            assert len(r['said']) == (rank == 0 and call.startswith('freeze')) # one process says it
