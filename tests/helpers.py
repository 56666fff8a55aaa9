"""Small learners, data and recordings that many tests use"""
import signal
import subprocess
from contextlib import contextmanager

import numpy as np
import torch
from fastai.basics import *
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import * # adds fine_tune, fit_one_cycle and lr_find to Learner

from fastai_bnstats.record import Writer
from fastai_bnstats.recording import FORMAT

SMALL = dict(epochs='1,1,1,1', bs=64, size=16) # arguments of a study that is trained within seconds


def quiet(learn):
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)


class Items(list):
    def new_empty(self): return Items() # Learner.export needs this method of a dataset


def loaders(n=64, bs=16, size=8, classes=2, seed=0):
    "DataLoaders of small random images"
    g = torch.Generator().manual_seed(seed)
    xs, ys = torch.randn(n, 3, size, size, generator=g), torch.randint(0, classes, (n,), generator=g)
    items = Items(zip(xs, ys))
    return DataLoaders(DataLoader(items, bs=bs, shuffle=True, drop_last=True), DataLoader(Items(items[:n//2]), bs=bs))


def tiny_model(bn=True, classes=2):
    norm = (lambda n: nn.BatchNorm2d(n)) if bn else (lambda n: nn.Identity())
    conv = lambda ni: nn.Conv2d(ni, 4, 3, bias=not bn) # a bias before batch norm has no gradient
    body = nn.Sequential(conv(3), norm(4), nn.ReLU(), conv(4), norm(4), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, classes)))


def tiny_learner(model=None, dls=None, **kwargs):
    set_seed(1)
    kwargs = {'lr': 1e-2, **kwargs}
    return quiet(Learner(dls or loaders(), model if model is not None else tiny_model(), loss_func=CrossEntropyLossFlat(), **kwargs))


def processes_on_cpu():
    "Distributed fits of fastai need a GPU for one thing: to send the order of the items from rank 0 to the others"
    from fastai.distributed import DistributedDL # needs accelerate
    def broadcast(self, t, rank):
        t = LongTensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()
    DistributedDL._broadcast = broadcast
    torch.set_num_threads(1)


def split_loaders(n=32, bs=8):
    "DataLoaders of random images, which a distributed fit divides among the processes: training and validation set alike"
    g = torch.Generator().manual_seed(0)
    items = Items((torch.randn(3, 8, 8, generator=g), torch.tensor(i % 2)) for i in range(n))
    return DataLoaders(*[TfmdDL(items, bs=bs, device='cpu', num_workers=0) for _ in range(2)])


@contextmanager
def process(*args, **kwargs):
    "A process with pipes, which Ctrl-C ends even where this one ignores it, and which does not outlive the test"
    was = signal.signal(signal.SIGINT, signal.default_int_handler) # else a child of `pytest &` would ignore SIGINT too
    try: p = subprocess.Popen(list(map(str, args)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)
    finally: signal.signal(signal.SIGINT, was)
    try: yield p
    finally:
        p.kill()
        p.communicate()


def statistics(ws, edges):
    "The fields of a row for the arrays `ws`"
    columns = [dict(hist=np.histogram(w, edges)[0], under=(w < edges[0]).sum(), over=(w > edges[-1]).sum(),
                    nonfinite=0, numel=len(w), mean=w.mean(), var=w.var(), trainable=True) for w in ws]
    return {k: np.array([c[k] for c in columns]) for k in columns[0]}


def make(fits=(('freeze', 2), ('unfreeze', 3)), batches=4, P=2, seed=0, every=1, G=1):
    "A recording of random weights, made with Writer"
    rng, edges, step = np.random.default_rng(seed), np.linspace(-2, 2, 11), 0
    writer = Writer([f'{i}.weight' for i in range(P)], np.stack([edges]*P))
    ws = [rng.normal(size=50*(i+1)) for i in range(P)]
    for f, (phase, epochs) in enumerate(fits):
        for e in range(epochs):
            for b in range(batches):
                ws = [w+rng.normal(size=w.shape)*.05 for w in ws]
                position = dict(step=step, fit=f, epoch=e, batch=b)
                if step%every == 0:
                    writer.add(**statistics(ws, edges), **position, phase=phase, stepped=True, lr=[.1]*(G if f else 1))
                writer.add(loss=float(rng.random()), **{f'loss_{k}': v for k, v in position.items()})
                step += 1
            writer.add(valid_loss=1., valid_step=step-1, valid_fit=f, valid_epoch=e, valid_batch=0, valid_n=8)
    return writer.recording(dict(format=FORMAT, phases=[p for p, _ in fits], every=every))
