"""Scenarios of plain fastai, run with or without this library: `python import_scenarios.py [ours]` prints what each did, as JSON"""
import hashlib
import json
import pickle
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

warnings.simplefilter('ignore')
import torch
from fastai.basics import *
from fastai.callback.schedule import *
from copy import deepcopy # fastai exports another `copy`

if 'ours' in sys.argv: import fastai_bnstats.all # noqa: F401


class Adapter(nn.Module):
    "A frozen layer with a small trainable one beside it, as in LoRA"
    def __init__(self, n):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(n, n), nn.Linear(n, 1, bias=False), nn.Linear(1, n, bias=False)
        self.base.requires_grad_(False)
    def forward(self, x): return self.base(x)+self.up(self.down(x))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))
    def forward(self, x): return (x.to(torch.complex64)@self.w).abs()


def model(): return nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 2))
def groups(m): return [params(m[0]), params(m[1])]
def head_only(m): return [params(m[1])]
def other_groups(m): return [[m[0][3].weight, m[0][0].bias, m[0][1].weight, m[0][1].bias, m[0][3].bias, m[0][0].weight], params(m[1])]
def three(m, at): ps = params(m); return [ps[:at], ps[at:]]


def learner(m=None, path=None, **kwargs):
    set_seed(2)
    data = list(zip(torch.randn(32, 3), torch.randint(0, 2, (32,)), strict=True))
    m = model() if m is None else m
    if path is None: path = tempfile.mkdtemp()
    learn = Learner(DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8)), m, loss_func=CrossEntropyLossFlat(), lr=.01, wd=.1,
                    path=path, **kwargs)
    learn.logger = noop
    return learn


def by_hand(learn, *which):
    for m in which: [p.requires_grad_(False) for p in learn.model.get_submodule(m).parameters()]
    return learn


class Stop(Callback):
    def after_pred(self): raise KeyboardInterrupt


def interrupted(learn):
    try: learn.fit(1, cbs=Stop())
    except KeyboardInterrupt: pass


def loaded(theirs, ours, opt_func):
    path = Path(tempfile.mkdtemp())
    a = learner(path=path, splitter=theirs, opt_func=opt_func); a.fit(2); a.save('a')
    b = learner(path=path, splitter=ours, opt_func=opt_func); b.create_opt(); b.load('a')
    return b


def steps(learn, *calls):
    "Call the methods in turn; a call is a name or (name, arguments). An exception does not stop the rest"
    learn.seen = []
    for name, *args in ([c] if isinstance(c, str) else c for c in calls):
        try: getattr(learn, name)(*args)
        except Exception as e: learn.seen.append(f'{name}: {type(e).__name__}: {e}')
    return learn


FIT = ('fit', 1)
BUILT = lambda m: OptimWrapper(opt=torch.optim.SGD(m[1].parameters(), lr=.1))
TORCH = partial(OptimWrapper, opt=torch.optim.AdamW)


def built_over_a_part(*calls): m = model(); return steps(learner(m, opt_func=BUILT(m)), *calls)
def adapters(**kwargs): return learner(nn.Sequential(Adapter(3), nn.Linear(3, 2)), **kwargs)


SCENARIOS = {
    'fine_tune with frozen parameters': lambda: steps(by_hand(learner(), '0.0'), ('fine_tune', 1)),
    'fine_tune with adapters': lambda: steps(adapters(), ('fine_tune', 1), FIT),
    'unfreeze with adapters': lambda: steps(adapters(), 'unfreeze', FIT),
    'freeze with adapters': lambda: steps(adapters(), 'freeze', 'unfreeze', FIT),
    'unfreeze what an optimizer lacks': lambda: steps(by_hand(learner(), '0.0', '0.3'), FIT, 'unfreeze', FIT),
    'frozen by hand, two groups': lambda: steps(by_hand(learner(splitter=groups), '0.0'), FIT, 'unfreeze', FIT, 'freeze', FIT),
    'everything frozen': lambda: steps(by_hand(learner(), '0', '1'), FIT, 'unfreeze'),
    'splitter over a part': lambda: steps(learner(splitter=head_only), ('fine_tune', 1), 'unfreeze', ('freeze_to', 0), 'freeze', FIT),
    'optimizer over a part': lambda: built_over_a_part(('fine_tune', 1), 'unfreeze', 'freeze', FIT),
    'freeze, one group': lambda: steps(learner(), FIT, 'freeze', FIT, 'unfreeze', FIT),
    'freeze, two groups': lambda: steps(learner(splitter=groups), FIT, 'freeze', FIT, ('freeze_to', 2), 'unfreeze', FIT),
    'train_bn=False': lambda: steps(learner(splitter=groups, train_bn=False), FIT, 'freeze', FIT, ('fine_tune', 1)),
    'freeze and a new optimizer': lambda: steps(learner(), FIT, ('freeze_to', 1), 'create_opt', 'unfreeze', FIT),
    'ranger': lambda: steps(learner(splitter=groups, opt_func=ranger), ('fit', 2), 'freeze', ('fit', 2), 'unfreeze', FIT),
    'torch AdamW': lambda: steps(learner(splitter=groups, opt_func=TORCH), FIT, 'freeze', FIT, ('fine_tune', 1)),
    'an optimizer of another splitter': lambda: steps(loaded(groups, other_groups, Adam), 'freeze', FIT, 'unfreeze', FIT),
    'the same, without freezing': lambda: steps(loaded(groups, other_groups, Adam), FIT, ('fine_tune', 1)),
    'the same, torch': lambda: steps(loaded(groups, other_groups, TORCH), FIT, 'freeze', FIT),
    'other boundaries, ranger': lambda: steps(loaded(partial(three, at=2), partial(three, at=4), ranger), ('fit', 3), 'freeze', FIT),
    'lr_find': lambda: steps(learner(splitter=groups), ('lr_find', 1e-5, 1, 8, True, False), 'freeze', FIT),
    'interrupted': lambda: (learn := learner(splitter=groups), interrupted(learn), steps(learn, 'freeze', FIT))[-1],
    'error in the forward pass': lambda: steps(learner(nn.Sequential(nn.Linear(5, 2))), FIT, ('fine_tune', 1), 'unfreeze'),
    'no parameters': lambda: steps(learner(nn.Flatten()), FIT, 'unfreeze', 'freeze', ('freeze_to', 0)),
    'a single layer': lambda: steps(learner(nn.Linear(3, 2)), FIT, 'unfreeze', 'freeze', FIT),
    'complex parameters': lambda: steps(learner(nn.Sequential(Complex(), nn.Linear(3, 2))), FIT, 'unfreeze', 'freeze', FIT),
    'a copy': lambda: steps(deepcopy(steps(learner(splitter=groups), FIT, 'freeze')), FIT, 'unfreeze', FIT),
    'a pickled learner': lambda: steps(pickle.loads(pickle.dumps(steps(learner(splitter=groups), FIT, 'freeze'))), FIT, 'unfreeze', FIT),
    'a wrong call': lambda: steps(learner(), 'freeze_to', ('freeze_to', 'x'), ('freeze', 1), 'no_such_method'),
}


def bits(t): return hashlib.sha256(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def report(learn):
    hypers = learn.opt and [{k: v for k, v in h.items() if isinstance(v, (int, float, bool))} for h in learn.opt.hypers]
    return dict(weights={k: bits(v) for k, v in learn.model.state_dict().items()},
                trainable={n: p.requires_grad for n, p in learn.model.named_parameters()}, hypers=hypers,
                held=learn.opt and [len(pg) for pg in learn.opt.param_lists], frozen_idx=getattr(learn.opt, 'frozen_idx', None),
                exceptions=learn.seen, attributes=sorted(vars(learn)), splitter=getattr(learn.splitter, '__name__', 'partial'),
                callbacks=[type(cb).__name__ for cb in learn.cbs])


def where(f):
    "Where the function, property or class lies; the value of anything else"
    f = getattr(f, 'fget', None) or getattr(f, '__func__', None) or f
    code = getattr(f, '__code__', None)
    if code: return f'{Path(code.co_filename).name}:{code.co_firstlineno}'
    return f'{f.__module__}.{f.__qualname__}' if isinstance(f, type) else repr(f) if isinstance(f, (int, str, bool, type(None))) else ''


def methods(cls): return {n: where(v) for n, v in vars(cls).items() if n not in ('__doc__', '__module__', '__dict__', '__weakref__')}
def classes():
    import fastai.data.load
    import fastai.learner
    import fastai.optimizer
    found = [Learner, Recorder, Callback, Optimizer, OptimWrapper, DataLoaders, fastai.optimizer.Lookahead, fastai.learner.Metric,
             fastai.data.load.DataLoader, nn.Module, torch.optim.Optimizer, Tensor]
    return {c.__module__+'.'+c.__name__: methods(c) for c in found}


if __name__ == '__main__':
    torch.set_num_threads(1)
    res = {'classes': classes(), 'scenarios': {k: report(f()) for k, f in SCENARIOS.items()}}
    print(json.dumps(res))
