"""Small learners and data that many tests use"""
import signal
import subprocess
from contextlib import contextmanager

import torch
from fastai.basics import *
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import * # adds fine_tune, fit_one_cycle and lr_find to Learner

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
