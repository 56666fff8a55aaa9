"""Every notebook runs from top to bottom, as `nbdev-test` runs it, and keeps its outputs"""
import json
from pathlib import Path

import pytest
from nbdev.test import nbdev_test

from forks import run

NBS = Path(__file__).parent.parent/'nbs'
NOTEBOOKS = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
FAST = ('freeze/', 'measure/', 'record/', 'recording/') # in the other folders, notebooks train longer, or draw much


@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.slow]*(not n.startswith(FAST))) for n in NOTEBOOKS])
def test_a_notebook_runs(name):
    p = run(nbdev_test, str(NBS/name))
    assert p.returncode == 0 and 'Success.' in p.stdout, p.stdout[-4000:]+p.stderr[-4000:]


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_keeps_its_outputs(name):
    outs = [o for c in json.loads((NBS/name).read_text())['cells'] for o in c.get('outputs', [])]
    assert outs, f'{name} has no outputs'
    assert not [o for o in outs if o['output_type'] == 'error' or o.get('name') == 'stderr'], name
