"""Every notebook runs from top to bottom, as `nbdev-test` runs it, and keeps its outputs"""
import json
from pathlib import Path

import pytest
from nbdev.test import nbdev_test

from forks import run

NBS = Path(__file__).parent.parent/'nbs'
NOTEBOOKS = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
SLOW = {'guides/01_recording.ipynb', 'guides/03_figures.ipynb', 'guides/05_seeds.ipynb', 'guides/06_study.ipynb', 'index.ipynb',
        'study/03_train.ipynb', 'study/04_jobs.ipynb', 'study/05_dask.ipynb', 'study/08_figures.ipynb', 'study/09_report.ipynb',
        'study/10_runner.ipynb', 'testing.ipynb', 'tutorials/01_finetune.ipynb', 'tutorials/02_bn_policy.ipynb'}


@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.slow]*(n in SLOW)) for n in NOTEBOOKS])
def test_a_notebook_runs(name):
    p = run(nbdev_test, str(NBS/name))
    assert p.returncode == 0 and 'Success.' in p.stdout, p.stdout[-4000:]+p.stderr[-4000:]


def test_slow_notebooks_exist(): assert SLOW <= {*NOTEBOOKS}


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_keeps_its_outputs(name):
    outs = [o for c in json.loads((NBS/name).read_text())['cells'] for o in c.get('outputs', [])]
    assert outs, f'{name} has no outputs'
    assert not [o for o in outs if o['output_type'] == 'error' or o.get('name') == 'stderr'], name
