"""Train a small learner with every optimizer of fastai, torch and timm: `python optimizer_sweep.py` prints the results of plain fastai"""
import hashlib
import inspect
import json
import tempfile
import warnings
from functools import partial

import fastai.optimizer
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, OptimWrapper, nn, noop, params, set_seed

try: import timm.optim as timm_optim
except ImportError: timm_optim = None


def is_fastais(f): return callable(f) and {'params', 'lr'} <= {*inspect.signature(f).parameters}


def found():
    "Name -> `opt_func` of every optimizer"
    res = {f'fastai {n}': f for n in fastai.optimizer.__all__ if is_fastais(f := getattr(fastai.optimizer, n))}
    for name, module in (('torch', torch.optim), ('timm', timm_optim)):
        classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, torch.optim.Optimizer)] if module else []
        res |= {f'{name} {c.__name__}': partial(OptimWrapper, opt=c) for c in classes if c.__module__.startswith(name)}
    return res


OPTIMIZERS = found()


def two_groups(m): return [params(m[0]), params(m[1])]


def learner(name):
    set_seed(4)
    data = list(zip(torch.randn(32, 6), torch.randint(0, 2, (32,)), strict=True))
    body = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8))
    learn = Learner(dls, nn.Sequential(body, nn.Linear(4, 2)), loss_func=CrossEntropyLossFlat(), lr=1e-2, splitter=two_groups,
                    wd=None if name == 'torch Rprop' else .1, opt_func=OPTIMIZERS[name], path=tempfile.mkdtemp())
    learn.logger = noop
    return learn


def fit_save_load(learn):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.fit(1); learn.fit(1)
        learn.save('x'); learn.load('x')
        learn.fit(1)


def train(learn):
    "What plain fastai should be able to do; the hash of the weights"
    fit_save_load(learn)
    learn.freeze_to(1)
    learn.fit(1)
    return weights(learn)


def weights(learn): return hashlib.sha256(b''.join(v.numpy().tobytes() for v in learn.model.state_dict().values())).hexdigest()


def outcome(name):
    try: return train(learner(name))
    except Exception as e: return f'{type(e).__name__}: {e}'


if __name__ == '__main__':
    torch.set_num_threads(1)
    print(json.dumps({name: outcome(name) for name in OPTIMIZERS}))
