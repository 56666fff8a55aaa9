import os
import shutil
import sys
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ['PATH'] = os.path.dirname(sys.executable)+os.pathsep+os.environ['PATH'] # the commands of this environment

import pytest
import torch
from fastai.basics import *
from fastai.callback.progress import ProgressCallback


if 'PYTEST_XDIST_WORKER' in os.environ: # else the processes fight for the cores
    torch.set_num_threads(1)
    os.environ['OMP_NUM_THREADS'] = '1'


def quiet(learn):
    learn.logger = noop
    return learn.remove_cb(ProgressCallback)


@pytest.fixture(autouse=True)
def seeded():
    set_seed(0)
    yield
    import matplotlib.pyplot as plt
    plt.close('all')


@pytest.fixture(scope='session')
def browser():
    "A headless Chromium; where there is none, its tests are skipped, but never on CI"
    exe = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if exe is None: (pytest.fail if os.environ.get('CI') else pytest.skip)('No chromium, chromium-browser or google-chrome on the PATH.')
    from playwright.sync_api import sync_playwright
    quiet = ['--disable-gpu', '--disable-background-networking', '--disable-component-update', '--disable-sync', '--no-first-run']
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=['--headless', '--no-sandbox', *quiet])
        yield b
        b.close()


SMALL = dict(epochs='1,1,1,1', bs=64, size=16) # arguments of a study that takes seconds


@pytest.fixture(scope='session')
def study(tmp_path_factory):
    "All arms of the post, one seed, one short epoch of everything, with its report; tests must not change it"
    from fastai_bnstats.study import run_study
    return run_study(tmp_path_factory.mktemp('study')/'out', **SMALL)


class Items(list):
    def new_empty(self): return Items() # what Learner.export asks of a dataset


def loaders(n=64, bs=16, size=8, classes=2, seed=0):
    "Small random pictures, as fastai DataLoaders"
    g = torch.Generator().manual_seed(seed)
    xs, ys = torch.randn(n, 3, size, size, generator=g), torch.randint(0, classes, (n,), generator=g)
    items = Items(zip(xs, ys))
    return DataLoaders(DataLoader(items, bs=bs, shuffle=True, drop_last=True), DataLoader(Items(items[:n//2]), bs=bs))


def tiny_model(bn=True, classes=2):
    norm = (lambda n: nn.BatchNorm2d(n)) if bn else (lambda n: nn.Identity())
    conv = lambda ni: nn.Conv2d(ni, 4, 3, bias=not bn) # before batch norm a bias has no gradient
    body = nn.Sequential(conv(3), norm(4), nn.ReLU(), conv(4), norm(4), nn.ReLU())
    return nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, classes)))


def tiny_learner(model=None, dls=None, **kwargs):
    set_seed(1)
    kwargs = {'lr': 1e-2, **kwargs}
    return quiet(Learner(dls or loaders(), model if model is not None else tiny_model(), loss_func=CrossEntropyLossFlat(), **kwargs))
