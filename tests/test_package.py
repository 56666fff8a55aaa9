"""The house: who imports whom, names that clash, notebooks and README that run"""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PKG = ROOT/'fastai_bnstats'
ALLOWED = { # module -> modules of ours that it may import
    'stats': set(), 'device': {'stats'}, 'kernel': {'stats', 'device'}, 'recording': set(), 'timeline': {'recording'}, 'select': {'stats', 'recording'},
    'callback': {'stats', 'device', 'kernel', 'recording', 'timeline', 'select'}, 'siblings': {'device', 'select', 'callback'},
    'norm': set(), 'split': {'norm'}, 'freeze': {'norm', 'split'}, 'audit': {'norm', 'split', 'freeze'},
    'plot': {'recording'}, 'figures': {'plot', 'recording'}, 'heat': {'plot', 'recording'}, 'pairs': {'paired', 'plot'},
    'compare': {'recording'}, 'paired': set(), 'results': {'recording'}, 'claims': {'compare', 'paired', 'plot', 'results'}, 'data': set(),
    'captions': {'claims'}, 'text': {'captions', 'claims', 'figures', 'paired', 'results'},
    'report': {'captions', 'claims', 'figures', 'heat', 'pairs', 'plot', 'results', 'text'},
    'study': {'stats', 'recording', 'select', 'callback', 'siblings', 'norm', 'freeze', 'audit', 'data'},
    'jobs': {'recording', 'data', 'results', 'study'}, 'runner': {'data', 'jobs', 'report', 'results', 'study'}}
FORBIDDEN = { # module -> what it must not import
    **{m: {'fastai', 'torch', 'matplotlib'} for m in ('recording', 'timeline', 'compare', 'paired', 'results')},
    **{m: {'fastai', 'matplotlib'} for m in ('stats', 'device', 'kernel')},
    **{m: {'fastai', 'torch'} for m in ('plot', 'figures', 'heat', 'pairs', 'claims', 'captions', 'text', 'report')}}


def imports(path, top_level=False):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['fastai_bnstats' if node.level else '', node.module]))
            yield from ([f'{base}.{a.name}' for a in node.names] if base == 'fastai_bnstats' else [base])


def modules(): return sorted(p for p in PKG.glob('*.py') if p.stem not in ('__init__', '_modidx', 'all'))


@pytest.mark.parametrize('path', modules(), ids=lambda p: p.stem)
def test_imports_run_one_way(path):
    found = set(imports(path))
    assert {m.split('.')[1] for m in found if m.startswith('fastai_bnstats.')}-{'__version__'} == ALLOWED[path.stem]
    assert not {m.split('.')[0] for m in found} & FORBIDDEN.get(path.stem, set())
    assert not any(m.startswith('fastai.vision') for m in imports(path, top_level=True))


@pytest.mark.parametrize('path', modules(), ids=lambda p: p.stem)
def test_each_module_is_one_notebook_of_moderate_size(path):
    text = path.read_text()
    nb = re.search(r'File to edit: \.\./(nbs/\S+\.ipynb)', text)[1]
    assert (ROOT/nb).exists() and Path(nb).stem.endswith(path.stem)
    assert sum(1 for l in text.splitlines() if l.strip() and not l.strip().startswith('#')) <= 300


def test_star_import_takes_no_name_of_fastai():
    import fastai.vision.all as F

    import fastai_bnstats.all as B
    assert {'WeightHistCallback', 'Recording', 'bn_splitter', 'remove_bn', 'fig9', 'load_study'} <= set(B.__all__)
    assert not [n for n in B.__all__ if hasattr(F, n)]
    assert all(hasattr(F.Learner, m) for m in ('freeze_non_bn', 'freeze_body'))


def test_importing_needs_no_fastai_vision():
    code = "import sys, warnings; warnings.simplefilter('ignore'); import fastai_bnstats.all; print('fastai.vision.all' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == 'False'


def fences(name): return re.findall(r'```python\n(.*?)```', (ROOT/name).read_text(), re.S)


def test_readme_code_runs(tmp_path):
    code = '\n'.join(fences('README.md'))
    assert 'freeze_non_bn' in code and 'WeightHistCallback' in code
    p = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path, env={**__import__('os').environ, 'MPLBACKEND': 'Agg'})
    assert p.returncode == 0, p.stderr[-3000:]
    assert (tmp_path/'run.npz').exists()


def test_readme_commands_exist():
    text = (ROOT/'README.md').read_text()
    assert 'pip install . && bnstats-study' in text and "pip install -e '.[dev]' && pytest" in text
    help_ = subprocess.run(['bnstats-study', '--help'], capture_output=True, text=True, check=True).stdout
    for option in set(re.findall(r'bnstats-study[^`\n]*', text)):
        for o in re.findall(r'--(\w+)', option): assert f'--{o}' in help_


def test_readme_pictures_exist():
    for f in re.findall(r'!\[[^\]]*\]\(([^)]+)\)|<img[^>]+src="([^"]+)"', (ROOT/'README.md').read_text()):
        assert (ROOT/(f[0] or f[1])).exists()


def test_notebooks_run():
    p = subprocess.run(['nbdev-test', '--n-workers', '1'], capture_output=True, text=True, cwd=ROOT)
    assert p.returncode == 0, p.stdout[-4000:]+p.stderr[-4000:]


def test_notebooks_keep_their_outputs():
    import json
    for nb in (ROOT/'nbs').rglob('*.ipynb'):
        outs = [o for c in json.loads(nb.read_text())['cells'] for o in c.get('outputs', [])]
        assert outs, f'{nb.name} has no outputs'
        assert not [o for o in outs if o['output_type'] == 'error' or o.get('name') == 'stderr'], nb.name


def test_notebooks_can_become_pages():
    "All of `nbdev-docs` but the quarto program"
    code = "from nbdev.serve import proc_nbs; proc_nbs(force=True, n_workers=0)"
    p = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert p.returncode == 0, p.stderr[-3000:]
