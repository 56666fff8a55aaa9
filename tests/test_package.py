"""Imports run in one direction, no names clash, and the README runs"""
import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from forks import code, command, run

ROOT = Path(__file__).parent.parent
PKG = ROOT/'fastai_bnstats'
ROOMS = { # subpackage, or module at the root -> those that it imports
    'kinds': set(), 'recording': set(),
    'measure': {'kinds'},
    'record': {'kinds', 'measure', 'plot', 'recording'}, # plot when a picture is drawn, not before
    'freeze': {'kinds', 'plot', 'recording'}, # plot when a picture is drawn, not before
    'landscape': {'freeze', 'kinds', 'record', 'recording'},
    'compare': {'recording'},
    'plot': {'compare', 'recording'},
    'export': {'record', 'recording'},
    'commands': set(), # imports the study by name, when a command is used
    'study': {'compare', 'freeze', 'landscape', 'measure', 'plot', 'record', 'recording'}}
MODULES = { # module -> modules of its own subpackage that it imports
    'commands': set(), 'kinds': set(),
    'recording.names': set(), 'recording.file_format': set(), 'recording.checks': set(), 'recording.parts': {'checks', 'names'},
    'recording.methods': set(),
    'recording.recording': {'checks', 'file_format', 'methods', 'names', 'parts'}, 'recording.summary': {'names', 'recording'},
    'recording.landscape': {'checks', 'file_format', 'methods', 'recording'}, 'recording.containers': {'checks', 'recording'},
    'measure.edges': set(), 'measure.rows': set(), 'measure.compiled': set(), 'measure.host': {'compiled', 'edges', 'rows'},
    'measure.device': {'edges', 'host', 'rows'}, 'measure.fused': {'device', 'edges', 'rows'},
    'measure.meter': {'device', 'edges', 'fused', 'host', 'rows'}, 'measure.changes': {'host', 'meter', 'rows'},
    'record.select': set(), 'record.writer': set(), 'record.steps': set(),
    'record.targets': {'select'}, 'record.recorder': {'select', 'steps', 'targets', 'writer'},
    'record.callback': {'recorder', 'steps'}, 'record.quantities': {'callback', 'recorder', 'select', 'steps'},
    'record.loop': {'recorder', 'steps'},
    'freeze.norm': set(), 'freeze.head': {'norm'}, 'freeze.optimizer': {'head'}, 'freeze.calls': {'head', 'norm', 'optimizer'},
    'freeze.ledger': set(), 'freeze.ledger_callback': {'calls', 'ledger'}, 'freeze.drift': {'norm'},
    'freeze.doctor': {'calls', 'drift', 'head', 'norm', 'optimizer'}, 'freeze.phases': {'calls'},
    'freeze.schedule': {'calls', 'head', 'ledger', 'ledger_callback', 'optimizer', 'phases'},
    'landscape.restore': set(), 'landscape.probe': set(), 'landscape.callback': {'probe', 'restore'},
    'landscape.forms': {'callback', 'probe', 'restore'},
    'compare.measures': set(), 'compare.paired': set(), 'compare.spikes': set(), 'compare.diagnose': {'spikes'},
    'plot.style': set(), 'plot.columns': set(), 'plot.heatmaps': {'columns', 'style'}, 'plot.curves': {'style'}, 'plot.forest': {'style'},
    'plot.landscape': {'style'}, 'plot.runs': {'curves', 'heatmaps', 'style'}, 'plot.ratio': {'curves', 'style'}, 'plot.drift': {'style'},
    'plot.findings': {'curves', 'style'}, 'plot.overview': {'curves', 'heatmaps', 'style'}, 'plot.interactive': {'heatmaps', 'style'},
    'plot.page_data': {'interactive', 'style'}, 'plot.page': {'heatmaps', 'interactive', 'page_data', 'style'},
    'export.points': set(), 'export.sinks': {'points'}, 'export.logger': {'points', 'sinks'},
    'study.arms': set(), 'study.images': set(), 'study.data': {'images'}, 'study.train': {'arms', 'data'}, 'study.readings': set(),
    'study.progress': {'results'},
    'study.results': {'arms'}, 'study.merge': {'arms', 'results'}, 'study.lock': {'results'},
    'study.jobs': {'arms', 'data', 'images', 'progress', 'readings', 'results', 'train'}, 'study.dask': {'jobs'},
    'study.claims': {'arms', 'readings'}, 'study.report_landscape': {'claims', 'report_blocks', 'report_tables', 'verdicts'},
    'study.verdicts': {'claims', 'readings', 'results'}, 'study.sweep': {'arms', 'results'}, 'study.report_blocks': {'verdicts'},
    'study.report_words': {'report_blocks'}, 'study.captions': {'claims', 'report_blocks', 'verdicts'},
    'study.figures': {'captions', 'claims', 'readings'},
    'study.sensitivity': {'claims', 'report_blocks', 'report_tables', 'verdicts'},
    'study.report_tables': {'captions', 'claims', 'report_blocks', 'verdicts'},
    'study.report_headline': {'report_blocks', 'report_tables', 'verdicts'},
    'study.report_text': {'arms', 'captions', 'claims', 'figures', 'report_blocks', 'report_headline', 'report_landscape', 'report_tables',
                          'report_words', 'results', 'sweep', 'verdicts'},
    'study.report': {'arms', 'figures', 'merge', 'report_blocks', 'report_tables', 'report_text', 'results', 'sweep', 'verdicts'},
    'study.runner': {'arms', 'dask', 'data', 'jobs', 'lock', 'progress', 'report', 'results', 'train'}}
ALL = {'fastai', 'torch', 'matplotlib'}
FORBIDDEN = { # subpackage, or module at the root -> packages that it must not import
    'commands': ALL, 'recording': ALL, 'compare': ALL,
    'plot': {'fastai', 'torch'}, 'measure': {'fastai', 'matplotlib', 'numba'}, 'kinds': {'fastai', 'matplotlib'},
    'record': {'matplotlib', 'numba'}, 'freeze': {'matplotlib', 'numba'}, 'landscape': {'matplotlib', 'numba'},
    'export': {'matplotlib', 'numba', 'tensorboard', 'wandb', 'trackio'}}


def imports(path, top_level=False):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            base = '.'.join(filter(None, ['fastai_bnstats' if node.level else '', node.module]))
            yield from ([f'{base}.{a.name}' for a in node.names] if base == 'fastai_bnstats' else [base])


def modules(): return sorted(p for p in PKG.rglob('*.py') if p.stem not in ('__init__', '_modidx', 'all'))


def dotted(path): return '.'.join(path.relative_to(PKG).with_suffix('').parts)


def names_imported(path):
    "Modules of this package that a file imports, as absolute names"
    room = path.relative_to(PKG).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom): continue
        if (node.module or '').startswith('fastai_bnstats.'): # inside of a function
            parts = node.module.split('.')[1:]
            yield from ('.'.join([*parts, a.name] if PKG.joinpath(*parts, f'{a.name}.py').exists() else parts) for a in node.names)
        if not node.level: continue
        base = room[:len(room)-node.level+1]
        yield from (['.'.join([*base, node.module])] if node.module else ['.'.join([*base, a.name]) for a in node.names])


def output(text, after_fastai=False):
    "Run Python code in a new process, which has imported fastai.basics or nothing, and return what it prints"
    text = f'import sys\n{text}'
    p = run(code, text) if after_fastai else subprocess.run([sys.executable, '-c', text], capture_output=True, text=True)
    assert not p.returncode, p.stderr
    return p.stdout.strip()


@pytest.mark.parametrize('path', modules(), ids=dotted)
def test_imports_run_one_way(path):
    me, found = dotted(path), set(names_imported(path))-{'__version__'}
    room = me.partition('.')[0]
    inside = {m.partition('.')[2] for m in found if '.' in m and m.partition('.')[0] == room}
    assert inside == MODULES[me]
    outside = {m for m in found if m.partition('.')[0] != room}
    assert outside <= ROOMS[room], 'import another subpackage by its own name, not by that of one of its modules'
    assert not {m.split('.')[0] for m in imports(path)} & (FORBIDDEN.get(room, set())-({'numba'} if me == 'measure.compiled' else set()))
    assert not any(m.startswith('fastai.vision') for m in imports(path, top_level=True))


def test_every_allowed_import_is_used():
    found = {room: set() for room in ROOMS}
    for path in modules():
        room = dotted(path).partition('.')[0]
        found[room] |= {m.partition('.')[0] for m in names_imported(path)}
    assert {room: ms-{room, '__version__'} for room, ms in found.items()} == ROOMS


@pytest.mark.parametrize('room', sorted(FORBIDDEN))
def test_importing_a_room_loads_nothing_forbidden(room):
    allowed = {room, *ROOMS[room], *(deeper for other in ROOMS[room] for deeper in ROOMS[other])}
    forbidden = FORBIDDEN[room] | {f'fastai_bnstats.{r}' for r in ROOMS if r not in allowed}
    assert output(f"""
before = set(sys.modules)
import fastai_bnstats.{room}
print(sorted({forbidden!r} & (set(sys.modules)-before)))
""", after_fastai=room in ('record', 'freeze', 'landscape', 'export')) == '[]' # fastai itself loads matplotlib


@pytest.mark.parametrize('path', modules(), ids=dotted)
def test_each_module_has_a_notebook_and_at_most_300_lines(path):
    text = path.read_text()
    nb = re.search(r'File to edit: (?:\.\./)+(nbs/\S+\.ipynb)', text)[1]
    assert (ROOT/nb).exists() and re.sub(r'^\d+[a-z]?_', '', Path(nb).stem) == path.stem
    assert Path(nb).parts[1:-1] == path.relative_to(PKG).parts[:-1]
    assert sum(1 for l in text.splitlines() if l.strip() and not l.strip().startswith('#')) <= 300


def test_star_import_hides_no_name_of_fastai():
    import fastai.vision.all as F

    import fastai_bnstats.all as B
    assert {'WeightHistCallback', 'Recording', 'bn_splitter', 'remove_bn', 'fig9', 'digits'} <= set(B.__all__)
    assert not [n for n in B.__all__ if hasattr(F, n)]
    assert all(hasattr(F.Learner, m) for m in ('freeze_non_bn', 'freeze_body'))


def test_importing_needs_no_fastai_vision():
    assert output("import fastai_bnstats.all; print('fastai.vision.all' in sys.modules)", after_fastai=True) == 'False'


DISTRIBUTIONS = { # import name -> name on PyPI
    'PIL': 'pillow', 'sklearn': 'scikit-learn', 'markdown_it': 'markdown-it-py', 'yaml': 'pyyaml'}
OPTIONAL = {'triton',  # installed with torch on some platforms; measure.fused works without it
            'IPython'} # imported only when a notebook shows a figure, so it is there
INDIRECT = {'torchvision'} # imported only by fastai.vision


def requirements(lines): return {re.match(r'[\w.-]+', l)[0].lower() for l in lines.split('\n') if l}


def test_imported_packages_are_declared():
    config = configparser.ConfigParser()
    config.read(ROOT/'setup.cfg')
    needed = requirements(config['options']['install_requires'])
    extras = set().union(*(requirements(config['options.extras_require'][k]) for k in ('dask', 'xarray')))
    found = {m.split('.')[0] for p in modules() for m in imports(p)}-{*sys.stdlib_module_names, 'fastai_bnstats', *OPTIONAL}
    found = {DISTRIBUTIONS.get(m, m) for m in found}
    assert found-extras-needed == set(), 'imported, but not in setup.cfg'
    assert needed-found == INDIRECT, 'in install_requires of setup.cfg, but not imported'


def fences(name): return re.findall(r'```python\n(.*?)```', (ROOT/name).read_text(), re.S)


@pytest.mark.slow
def test_readme_code_runs(tmp_path):
    text = '\n'.join(fences('README.md'))
    assert 'freeze_non_bn' in text and 'WeightHistCallback' in text
    p = run(code, text, cwd=tmp_path)
    assert p.returncode == 0, p.stderr[-3000:]
    assert (tmp_path/'run.npz').exists()


def test_readme_commands_exist():
    text = (ROOT/'README.md').read_text()
    assert 'pip install . && bnstats-study' in text and "pip install -e '.[dev]' && pytest" in text
    help_ = run(command, 'bnstats-study', '--help').stdout
    for option in set(re.findall(r'bnstats-study[^`\n]*', text)):
        for o in re.findall(r'--(\w+)', option): assert f'--{o}' in help_


def test_readme_pictures_have_absolute_urls():
    "PyPI shows the README too, where relative links do not work; tests/test_links.py checks that the files exist"
    pictures = re.findall(r'!\[[^\]]*\]\(([^)]+)\)', (ROOT/'README.md').read_text())
    assert pictures and all(p.startswith('https://raw.githubusercontent.com/') for p in pictures)
    assert all((ROOT/p.partition('/main/')[2]).is_file() for p in pictures)
