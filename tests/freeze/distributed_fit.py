"""Distributed fits on the CPU: `torchrun distributed_fit.py FOLDER CALL ...`; each process writes what moved. Needs accelerate"""
import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.simplefilter('ignore')
import torch
from fastai.basics import *
from fastai.distributed import DistributedDL
from freeze_cases import moved, snapshot, two_groups
from helpers import Items, tiny_learner

from fastai_bnstats.freeze import KeepFrozen, LedgerCallback


def broadcast(self, t, rank): # fastai's needs a GPU
    t = LongTensor(t)
    torch.distributed.broadcast(t, rank)
    return t.tolist()


def fit(call):
    items = Items((torch.randn(3, 8, 8), torch.tensor(i % 2)) for i in range(32))
    dls = DataLoaders(*[TfmdDL(items, bs=8, device='cpu', num_workers=0) for _ in range(2)])
    learn = tiny_learner(dls=dls, splitter=two_groups, cbs=LedgerCallback())
    if call.startswith('freeze'): getattr(learn, call)()
    before = snapshot(learn)
    with learn.distrib_ctx(cpu=True, sync_bn=False):
        learn.fit(1, cbs=[] if call.startswith('freeze') else KeepFrozen(call))
        learn.validate()
    return dict(moved=sorted(moved(learn, before)), trainable=[n for n, p in learn.model.named_parameters() if p.requires_grad],
                declared=learn.ledger.table.declared.to_dict(), broken=len(learn.ledger.broken))


if __name__ == '__main__':
    DistributedDL._broadcast = broadcast
    torch.set_num_threads(1)
    folder, calls = sys.argv[1], sys.argv[2:]
    (Path(folder)/f"{os.environ['RANK']}.json").write_text(json.dumps({call: fit(call) for call in calls}))
