import os
import shutil
import sys
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ['PATH'] = os.path.dirname(sys.executable)+os.pathsep+os.environ['PATH'] # so that tests find the commands of this environment

import pytest
import torch
from fastai.basics import set_seed
from hypothesis import settings

from helpers import SMALL

settings.register_profile('fixed', derandomize=True, deadline=None) # the same examples at each run
settings.load_profile('fixed')

if 'PYTEST_XDIST_WORKER' in os.environ: # otherwise the processes compete for the cores
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
    "A headless Chromium; without one, tests that need it are skipped, or fail on CI"
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
    "A study of all arms of the post with its report: one seed, one short epoch per phase. Tests must not change it"
    from fastai_bnstats.study import run_study
    return run_study(tmp_path_factory.mktemp('study')/'out', **SMALL)
