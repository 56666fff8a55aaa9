import os
import shutil
import sys
import tempfile
os.environ.setdefault('MPLBACKEND', 'Agg')
os.environ['PATH'] = os.path.dirname(sys.executable)+os.pathsep+os.environ['PATH'] # so that tests find the commands of this environment
if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.update(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE') # else they compete for the cores

import pytest
from filelock import FileLock
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

settings.register_profile('fixed', derandomize=True, deadline=None) # the same examples at each run
settings.load_profile('fixed')


@pytest.fixture(autouse=True)
def seeded():
    from fastai.basics import set_seed # not above, since pytest's main process needs no fastai
    set_seed(0)
    yield
    import matplotlib.pyplot as plt
    plt.close('all')


@pytest.fixture(scope='session', autouse=True)
def temporary(tmp_path_factory):
    "Folders that tests make with `tempfile` lie among those that pytest removes"
    tempfile.tempdir = str(tmp_path_factory.mktemp('tempfile'))


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
    from helpers import SMALL
    root = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: root = root.parent # of all processes: the first that needs the study trains it
    with FileLock(root/'study.lock'):
        if not (root/'study/report.html').exists(): run_study(root/'study', **SMALL)
    return root/'study'


class Scheduler(LoadFileScheduling):
    "A file of tests runs in one process, but each notebook may run in another"
    def _split_scope(self, nodeid): return nodeid if 'test_a_notebook_runs' in nodeid else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config, log): return Scheduler(config, log) if config.getoption('dist') == 'loadfile' else None


@pytest.hookimpl(tryfirst=True) # before `-m "not slow"` chooses
def pytest_collection_modifyitems(items):
    "Slow files come first, so that at the end neither process waits long; before all, the one that trains the study for others"
    for i in items:
        if {'study', 'plain', 'grid', 'browser', 'site'} & {*i.fixturenames} or 'peers' in i.path.parts: i.add_marker('slow')
    slow = {i.path for i in items if i.get_closest_marker('slow')}
    items.sort(key=lambda i: (i.path.name != 'test_report.py', i.path not in slow))
