"""Fits of a model that FSDP has split, on the CPU in a process of `forks.ranks`: each process writes what it saw"""
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.simplefilter('ignore')
import torch
from fastai.basics import *
from helpers import loaders, tiny_learner, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastai_bnstats.freeze import LedgerCallback
from fastai_bnstats.landscape import LandscapeCallback
from fastai_bnstats.record import (ActivationHistCallback, GradHistCallback, OutputGradHistCallback, UpdateHistCallback,
                                   WeightHistCallback)


class Spy(Callback):
    "The parts that this process holds"
    order = 54
    def before_fit(self): self.weights, self.grads = [], []
    def parts(self, of=noop): return {n: of(p).detach().to_local().clone() for n, p in self.model.named_parameters() if of(p) is not None}
    def before_step(self): self.grads.append(self.parts(lambda p: p.grad if p.requires_grad else None))
    def after_batch(self):
        if self.training: self.weights.append(self.parts())


class Touch(Callback):
    "In one of the processes, something changes its part of a frozen weight"
    def after_step(self):
        if RANK == 1: self.model[0][3].weight.detach().to_local()[0] += 1


def learner(*cbs, **kwargs):
    set_seed(0)
    mesh, model = init_device_mesh('cpu', (2,)), tiny_model()
    fully_shard(model[1], mesh=mesh)
    fully_shard(model, mesh=mesh, **kwargs)
    return tiny_learner(model, loaders(n=32, seed=RANK), cbs=cbs)


def error(f):
    try: f()
    except ValueError as e: return str(e)


def main(folder):
    res = {}
    learn = learner(WeightHistCallback('all'), GradHistCallback('*weight'), UpdateHistCallback('*weight'), ActivationHistCallback(),
                    OutputGradHistCallback(), Spy(), LedgerCallback(), reshard_after_forward=True)
    start = {n: p.detach().to_local().clone() for n, p in learn.model.named_parameters()}
    learn.freeze_body(bn_stats='hold')
    learn.fit(2)
    res['learner'] = dict(start=start, weights=learn.spy.weights, grads=learn.spy.grads, ledger=learn.ledger.table.to_dict())
    if RANK == 0:
        for n in ('weight_hist', 'grad_hist', 'update_hist', 'activation_hist', 'output_grad_hist'):
            getattr(learn, n).recording.save(folder/n)
        res['repr'] = repr(learn.weight_hist.recording)
    learn = learner(LedgerCallback('warn'), reshard_after_forward=True)
    learn.freeze_body()
    learn.fit(1, cbs=Touch())
    res['touched'] = learn.ledger.broken.to_dict()
    learn = learner(LedgerCallback(), WeightHistCallback()) # after a validation, the parameters of this one stay gathered
    learn.fit(1)
    res['rows'], res['moved'] = len(learn.weight_hist.recording), len(learn.ledger.table[learn.ledger.table.found == 'moved'])
    res['errors'] = [error(f) for f in (learn.freeze_body, lambda: learn.weight_hist.tensors(learn.model))]
    learn.fit(1) # fastai's `model.to(device)` splits them again
    res['rows again'] = len(learn.weight_hist.recording)
    learn.model.reshard()
    learn.freeze_body()
    learn.add_cb(LandscapeCallback())
    if RANK == 0: res['landscape'] = error(lambda: learn.fit(1))
    torch.save(res, folder/f'{RANK}.pt')
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    RANK = int(os.environ['RANK'])
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo')
    main(Path(sys.argv[1]))
