import os
import shutil
import sys
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ['PATH'] = os.path.dirname(sys.executable)+os.pathsep+os.environ['PATH'] # the commands of this environment

import pytest
import torch
from fastai.basics import set_seed

from helpers import SMALL

if 'PYTEST_XDIST_WORKER' in os.environ: # else the processes fight for the cores
    torch.set_num_threads(1)
    os.environ['OMP_NUM_THREADS'] = '1'


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


@pytest.fixture(scope='session')
def study(tmp_path_factory):
    "All arms of the post, one seed, one short epoch of everything, with its report; tests must not change it"
    from fastai_bnstats.study import run_study
    return run_study(tmp_path_factory.mktemp('study')/'out', **SMALL)
