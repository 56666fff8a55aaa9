"""The wheel and the sdist are complete, and the installed wheel works without the source folder"""
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
FOLDERS = ('fastai_bnstats', 'nbs', 'docs', 'tests', 'benchmarks')
SKIP = ('__pycache__', '_proc', '.ipynb_checkpoints') # made by running, not part of the source
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1] # setuptools changes sys.argv
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""
USE = """
import importlib, pkgutil, sys, warnings
from pathlib import Path
warnings.simplefilter('ignore')
import fastai_bnstats
target, study = map(Path, sys.argv[1:])
assert Path(fastai_bnstats.__file__).parent == target/'fastai_bnstats', fastai_bnstats.__file__
names = [m.name for m in pkgutil.walk_packages(fastai_bnstats.__path__, 'fastai_bnstats.')]
for name in names:
    m = importlib.import_module(name)
    assert Path(m.__file__).is_relative_to(target), m.__file__
from fastai_bnstats.all import HeatMap
from fastai_bnstats.study import load_study, write_report
html = HeatMap(load_study(study)['naive_bn'][0], 0)._repr_html_()
assert '.bnheat-list' in html and 'const unpack' in html and 'const paint' in html and 'const start' in html
report = write_report(study)
assert report.read_text(encoding='utf-8').count('class="bnheat"')
print(len(names))
"""


def run(*args, cwd, path=None):
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    if path: env['PYTHONPATH'] = str(path)
    p = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=cwd, env=env)
    assert p.returncode == 0, p.stdout[-2000:]+p.stderr[-4000:]
    return p.stdout


def build(source, out):
    "The wheel and the sdist of a source folder, each with the names of its members"
    run('-c', BUILD, out, cwd=source)
    wheel, sdist = next(out.glob('*.whl')), next(out.glob('*.tar.gz'))
    with zipfile.ZipFile(wheel) as z, tarfile.open(sdist) as t: return wheel, set(z.namelist()), sdist, set(t.getnames())


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "Wheel and sdist of a copy of the source folder, since a build reads and writes other files there"
    tmp = tmp_path_factory.mktemp('build')
    for name in ('source', 'out'): (tmp/name).mkdir()
    for folder in FOLDERS: shutil.copytree(ROOT/folder, tmp/'source'/folder, ignore=shutil.ignore_patterns(*SKIP))
    for p in ROOT.iterdir():
        if p.is_file(): shutil.copy2(p, tmp/'source')
    return tmp, *build(tmp/'source', tmp/'out')


def files(folder):
    return {p.relative_to(ROOT).as_posix() for p in (ROOT/folder).rglob('*') if p.is_file() and not {*SKIP} & {*p.parts}}


def test_the_wheel_contains_only_the_package(built):
    _, _, members, _, _ = built
    inside = {m for m in members if '.dist-info/' not in m}
    assert inside == files('fastai_bnstats')
    assert {Path(m).suffix for m in inside} >= {'.py', '.css', '.js'}


def test_the_sdist_contains_notebooks_docs_tests_benchmarks_and_changelog(built):
    _, _, _, sdist, members = built
    top = sdist.name.removesuffix('.tar.gz')
    want = {'CHANGELOG.md', 'CONTRIBUTING.md', 'LICENSE', 'README.md', 'setup.cfg', 'pyproject.toml'}
    for folder in FOLDERS: want |= files(folder)
    assert not {f'{top}/{f}' for f in want}-members


def test_a_wheel_from_the_sdist_is_the_same(built):
    tmp, _, members, sdist, _ = built
    with tarfile.open(sdist) as t: t.extractall(tmp/'unpacked', filter='data')
    (tmp/'again').mkdir()
    assert build(tmp/'unpacked'/sdist.name.removesuffix('.tar.gz'), tmp/'again')[1] == members


def test_the_installed_wheel_works_by_itself(built, study, tmp_path):
    tmp, wheel, members, _, _ = built
    run('-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--no-compile', '--target', tmp/'target', wheel, cwd=tmp)
    others = ('naive_nobn', 'naive_fold', 'freeze', 'freeze_non_bn') # one arm is enough here
    folder = shutil.copytree(study, tmp_path/'study', ignore=shutil.ignore_patterns('report.*', '*.png', *others))
    n = run('-c', USE, tmp/'target', folder, cwd=tmp_path, path=tmp/'target')
    modules = [m for m in members if m.endswith('.py') and m != 'fastai_bnstats/__init__.py']
    assert int(n.split()[-1]) == len(modules)
