"""Distributed fits on the CPU, in a process of `forks.ranks`: each process writes what moved. Needs accelerate"""
import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.simplefilter('ignore')
from fastai.basics import *
from freeze_cases import moved, snapshot, two_groups
from helpers import processes_on_cpu, split_loaders, tiny_learner

from fastai_bnstats.freeze import KeepFrozen, LedgerCallback


def fit(call, bn_stats):
    said = []
    learn = tiny_learner(dls=split_loaders(), splitter=two_groups, cbs=LedgerCallback())
    learn.logger = said.append
    if call.startswith('freeze'): getattr(learn, call)(bn_stats=bn_stats)
    learn.logger = noop
    before = snapshot(learn)
    with learn.distrib_ctx(cpu=True, sync_bn=False):
        learn.fit(1, cbs=[] if call.startswith('freeze') else KeepFrozen(call, bn_stats=bn_stats))
        learn.validate()
    t = learn.ledger.table
    return dict(moved=sorted(moved(learn, before)), trainable=[n for n, p in learn.model.named_parameters() if p.requires_grad],
                declared=t.declared.to_dict(), ledger=sorted(t.index[t.found == 'moved']), broken=len(learn.ledger.broken), said=said)


if __name__ == '__main__':
    processes_on_cpu()
    folder, cases = sys.argv[1], sys.argv[2:]
    (Path(folder)/f"{os.environ['RANK']}.json").write_text(json.dumps({case: fit(*case.split()) for case in cases}))
