"""Distributed fits on the CPU that are recorded, in a process of `forks.ranks`: each writes what it saw. Needs accelerate"""
import os
import sys
import warnings
from collections import defaultdict
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.simplefilter('ignore')
import torch
from fastai.basics import *
from fastai.callback.training import GradientAccumulation
from fastai.distributed import DistributedTrainer
from helpers import processes_on_cpu, split_loaders, tiny_learner, tiny_model
from torch.nn import functional as F

from fastai_bnstats.landscape import LandscapeCallback
from fastai_bnstats.record import (ActivationHistCallback, GradHistCallback, OutputGradHistCallback, UpdateHistCallback,
                                   WeightHistCallback)

NAMES = 'weight_hist', 'grad_hist', 'update_hist', 'activation_hist', 'output_grad_hist'


class Spy(Callback):
    "What this process sees, read without the callbacks that record"
    order = 54
    def before_fit(self): self.saw = defaultdict(list)
    def tensors(self): return {n.removeprefix('module.'): t.clone() for n, t in self.model.state_dict().items()}
    def before_batch(self):
        if not self.training: return
        self.saw['before'].append(self.tensors())
        alone = deepcopy(self.model.module)
        loss = F.cross_entropy(alone(self.x), self.y)
        names, ps = zip(*alone.named_parameters())
        self.saw['local_grads'].append(dict(zip(names, torch.autograd.grad(loss, ps), strict=True)))
    def after_pred(self):
        if self.training: self.saw['output'].append(self.pred.detach().clone())
    def after_loss(self):
        self.saw['loss' if self.training else 'valid_loss'].append(self.learn.loss.item())
        if not self.training: self.saw['valid_n'].append(len(self.y))
    def before_step(self): self.saw['grads'].append({n: p.grad.clone() for n, p in self.model.module.named_parameters()})
    def after_batch(self):
        if self.training: self.saw['weights'].append(self.tensors())


class NoSync(Callback):
    "Gradients are exchanged only in minibatches with a step: here, in every other one"
    order, context = 12, nullcontext()
    def before_batch(self):
        if not self.training: return
        self.context = self.model.no_sync() if self.iter % 2 == 0 else nullcontext()
        self.context.__enter__()
    def after_backward(self): self.context.__exit__(None, None, None)


class Broken(WeightHistCallback):
    name = 'weight_hist'
    def values(self):
        if self.step.number == 1: raise RuntimeError('out of order')
        return super().values()


def learner(folder=None, bn=True):
    set_seed(0)
    at = lambda name: {} if folder is None else {'path': folder/name}
    return tiny_learner(tiny_model(bn), split_loaders(35), cbs=[WeightHistCallback('all', **at('weights')), GradHistCallback(**at('grads')),
        UpdateHistCallback(**at('updates')), ActivationHistCallback(**at('outputs')), OutputGradHistCallback(**at('output_grads')), Spy()])


def fit(learn, cbs=(), epochs=1):
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        with learn.distrib_ctx(cpu=True, sync_bn=False): learn.fit(epochs, cbs=cbs)
    return [str(w.message) for w in ws if issubclass(w.category, UserWarning)]


def save(learn, folder):
    "All processes save under the same names, rank 0 first"
    said = {}
    for rank in (0, 1):
        if rank == RANK:
            with warnings.catch_warnings(record=True) as ws:
                warnings.simplefilter('always')
                recs = {n: getattr(learn, n).recording for n in NAMES}
            said = dict(warnings=[str(w.message) for w in ws], repr=repr(recs['weight_hist']), rows=[len(r) for r in recs.values()])
            for n, rec in recs.items(): rec.save(folder/n)
        torch.distributed.barrier()
    return said


def main(folder):
    results = {}
    for name in ('memory', 'path'):
        learn = learner(folder/'chunks' if name == 'path' else None)
        probe = LandscapeCallback(every=2)
        fit(learn, [probe] if name == 'path' else [], epochs=2)
        results[name] = dict(saw=dict(learn.spy.saw), said=save(learn, folder/name))
    results['probes'] = [float(row['start']) for row in probe.rows]
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        results['landscape'] = [repr(probe.recording), *(str(w.message) for w in ws)]
    learn = learner(bn=False)
    fit(learn, [GradientAccumulation(16), NoSync()])
    results['accumulation'] = dict(saw=dict(learn.spy.saw), said=save(learn, folder/'accumulation'))
    learn = tiny_learner(dls=split_loaders(35), cbs=Broken())
    results['error'] = dict(warnings=fit(learn), weights=dict(learn.model.state_dict()), rows=len(learn.weight_hist.recording))
    torch.save(results, folder/f'{RANK}.pt')
    tiny_learner(dls=split_loaders(), cbs=WeightHistCallback('fc')).fit(1, cbs=DistributedTrainer(sync_bn=False, cpu=True)) # no such layer


if __name__ == '__main__':
    RANK = int(os.environ['RANK'])
    processes_on_cpu()
    main(Path(sys.argv[1]))
