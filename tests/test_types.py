"""mypy and pyright understand the public names, and the methods that `@patch` adds are declared as they are"""
import ast
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fastai_bnstats.all
from fastai_bnstats.recording import Landscape, Recording, RecordingDiff

ROOT = Path(__file__).parent.parent
USE = ROOT/'tests'/'typing'/'typical_use.py'
METHODS = ROOT/'fastai_bnstats'/'recording'/'methods.py'
CLASSES = {'RecordingMethods': Recording, 'DiffMethods': RecordingDiff, 'LandscapeMethods': Landscape}


def arguments(source):
    "Names, types and defaults of the arguments of a method, without the first"
    a = ast.parse(textwrap.dedent(source)).body[0].args
    named = [*a.posonlyargs, *a.args][1:]
    def text(x): return ast.unparse(x.annotation).replace("'RecordingMethods'", 'Recording').replace("'LandscapeMethods'", 'Landscape')
    types = [text(x) if x.annotation else '' for x in [*named, *filter(None, [a.vararg])]]
    return [x.arg for x in named], types, [ast.unparse(d) for d in a.defaults], a.vararg and a.vararg.arg, a.kwarg and a.kwarg.arg


def patched(cls):
    "Methods that are not in the body of the class: name -> method"
    body = ast.parse(inspect.getsource(cls)).body[0].body
    own = {n.name for n in body if isinstance(n, ast.FunctionDef)} | {'__init__', '__repr__', '_repr_html_'}
    def is_method(n, m): return (inspect.isfunction(m) or hasattr(m, 'f')) and n not in own and not n.startswith('_')
    return {n: m for n, m in vars(cls).items() if is_method(n, m)}


@pytest.mark.parametrize('name', CLASSES)
def test_patched_methods_are_declared_as_they_are(name):
    tree = ast.parse(METHODS.read_text())
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    declared = {f.name: ast.unparse(f) for b in cls.body if isinstance(b, ast.If) for f in b.body}
    real = patched(CLASSES[name])
    assert {*declared} == {*real}
    for n, m in real.items():
        f = getattr(m, 'f', m) # of fastcore's class method
        assert arguments(declared[n]) == arguments(inspect.getsource(inspect.unwrap(f))), n
        assert declared[n].startswith('@classmethod') == (f is not m), n


def check(tool, path, *args):
    env = {**os.environ, 'PYTHONPATH': str(ROOT)}
    return subprocess.run([sys.executable, '-m', tool, *args, str(path)], capture_output=True, text=True, cwd=ROOT, env=env)


TOOLS = {'mypy': ('mypy', ['--no-error-summary']), 'pyright': ('pyright', [])}


@pytest.mark.slow
@pytest.mark.parametrize('tool', TOOLS)
def test_type_checkers_accept_typical_use_and_find_mistakes(tool, tmp_path):
    module, args = TOOLS[tool]
    good = check(module, USE, *args)
    assert good.returncode == 0, good.stdout+good.stderr
    mistakes = ["rec.sel(phases='a')", "rec.save()", "WeightHistCallback(bins='many')", "plot_losses(3)", "record(3)",
                "rec.moved().nothing", "Recording.load('a').to_frame(1)", "Ledger(model, on_move=3)"]
    lines = USE.read_text().rstrip()+'\n\n\ndef wrong(rec: Recording, model: nn.Module) -> None:\n'+''.join(f'    {m}\n' for m in mistakes)
    bad = tmp_path/'wrong_use.py'
    bad.write_text(lines)
    out = check(module, bad, *args).stdout
    first = len(lines.splitlines())-len(mistakes)+1
    missed = [m for i, m in enumerate(mistakes, first) if f'wrong_use.py:{i}:' not in out]
    assert not missed, out


def test_the_package_says_that_it_is_typed(): assert (ROOT/'fastai_bnstats'/'py.typed').exists()


def test_public_functions_have_annotations():
    "Each argument of a public function has a type or a default, but for a few that take many things"
    def bare(f):
        s = inspect.signature(f)
        return [p.name for p in s.parameters.values() if p.annotation is p.empty and p.default is p.empty
                and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in ('self', 'cls')]
    known = {n: bare(o) for n in fastai_bnstats.all.__all__ if inspect.isfunction(o := getattr(fastai_bnstats.all, n))}
    accepts_anything = {'path', 'layer', 'where', 'rec', 'dl', 'html', 'layers', 'run'}
    assert {n: b for n, b in known.items() if set(b)-accepts_anything} == {}
