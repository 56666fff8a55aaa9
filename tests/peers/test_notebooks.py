"""What passes in fastai's own notebooks passes with this library too; set FASTAI_NBS to the folder nbs/ of fastai's repository"""
import os
from pathlib import Path

import pytest
from fastai_notebooks import EXPLAINED, NOTEBOOKS, WARNED, cells, new_failures, results

FOLDER = Path(os.environ.get('FASTAI_NBS', 'nowhere'))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="FASTAI_NBS names no folder with fastai's notebooks")


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_cells_that_pass_without_this_library_pass_with_it(name):
    if not (FOLDER/f'{name}.ipynb').exists(): pytest.skip('this version of fastai has no such notebook')
    res = results(FOLDER/f'{name}.ipynb')
    assert not new_failures(res, 'import')
    assert not [(source, error) for source, error, why in new_failures(res, 'record') if why is None]
    assert bool([w for w in res['record']['warnings'] if 'stopped recording' in w]) == (name in WARNED)


@pytest.mark.parametrize('text', EXPLAINED)
def test_every_explanation_is_needed(text):
    assert any(text in source for f in FOLDER.glob('*.ipynb') for source, _ in cells(f))
