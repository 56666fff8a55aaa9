"""The loops are compiled once, before the first batch, also where nothing can be cached"""
import numpy as np
import pytest
import torch
from fastai.basics import Callback

import forks
from fastai_bnstats.measure import compiled, compile_for
from fastai_bnstats.record import UpdateHistCallback, WeightHistCallback
from forks import code
from helpers import tiny_learner

COUNT = """
import numpy as np
from fastai_bnstats.measure import tensor_stats, uniform_edges
import torch
print(tensor_stats([torch.arange(8.)], [uniform_edges(0, 8, 2)]).hist.tolist())
"""
NO_FOLDER = """
from numba.core import caching
def refuse(self): raise PermissionError('read only')
caching._CacheLocator.ensure_cache_path = refuse
"""
DISK_FULL = """
from numba.core import caching
def refuse(self, path): raise OSError(28, 'No space left on device')
caching.IndexDataCacheFile._open_for_write = refuse
"""


def run(folder, before=''):
    "Count in a new process, whose cache is `folder`; returns what it printed"
    with pytest.MonkeyPatch.context() as m:
        m.setenv('NUMBA_CACHE_DIR', str(folder))
        p = forks.run(code, f"import warnings\nwarnings.simplefilter('error')\n{before}{COUNT}")
    assert p.returncode == 0, p.stderr[-2000:]
    return p.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize('before', [NO_FOLDER, DISK_FULL], ids=['no folder', 'disk full'])
def test_without_a_cache(before, tmp_path):
    assert run(tmp_path, before) == '[[4, 4]]' and not list(tmp_path.rglob('*.nbc'))


@pytest.mark.slow
def test_a_broken_cache_is_not_used(tmp_path):
    assert run(tmp_path) == '[[4, 4]]'
    files = list(tmp_path.rglob('*.nb?'))
    assert {f.suffix for f in files} == {'.nbi', '.nbc'}
    for suffix in ('.nbc', '.nbi'):
        for f in files:
            if f.suffix == suffix: f.write_bytes(f.read_bytes()[:50])
        assert run(tmp_path) == '[[4, 4]]'


class Order(Callback):
    "Notes when the first batch begins"
    order = -100
    def before_batch(self): self.learn.seen.append('batch')


@pytest.mark.parametrize('cls', [WeightHistCallback, UpdateHistCallback])
def test_compiling_comes_before_the_first_batch_and_is_not_charged(cls, monkeypatch):
    learn = tiny_learner(cbs=[cls(), Order()])
    learn.seen, cb = [], learn.cbs[-2] if isinstance(learn.cbs[-2], cls) else learn.cbs[-1]
    def kernel(name, dtype):
        learn.seen.append((name, dtype))
        assert cb.cost.recording == 0 or 'batch' in learn.seen
        return real(name, dtype)
    real = compiled.kernel
    monkeypatch.setattr(compiled, 'kernel', kernel)
    learn.fit(1)
    early = learn.seen[:learn.seen.index('batch')]
    assert set(early) == {(n, np.float32) for n in cls.kernels} >= set(learn.seen)-{'batch'}


def test_training_goes_on_if_nothing_can_be_compiled(monkeypatch):
    def fail(*args): raise ImportError('Numba needs NumPy 2.3 or less')
    monkeypatch.setattr('fastai_bnstats.record.recorder.compile_for', fail)
    learn = tiny_learner(cbs=WeightHistCallback())
    text = "not recorded, because Numba can't compile .ImportError: Numba needs NumPy 2.3 or less.. Training goes on. Check that"
    with pytest.warns(UserWarning, match=text): learn.fit(1)
    assert len(learn.recorder.losses) and not len(learn.weight_hist.recording)


def test_what_is_compiled(monkeypatch):
    seen = []
    monkeypatch.setattr(compiled, 'kernel', lambda *a: seen.append(a))
    class OnCuda: is_cuda, dtype = True, torch.float64
    compile_for([torch.ones(2).half(), torch.ones(2), OnCuda()], ('count', 'renew'))
    assert seen == [('count', np.float32), ('renew', np.float32)]
    compile_for([torch.ones(2).long()])
    assert seen[2:] == [('count', np.float64)]


def test_numba_without_its_compiler(monkeypatch):
    monkeypatch.setenv('NUMBA_DISABLE_JIT', '1')
    p = forks.run(code, COUNT)
    assert 'ImportError: Numba compiles nothing here, because NUMBA_DISABLE_JIT is set: unset it to record.' in p.stderr
