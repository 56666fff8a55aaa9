"""Recordings on disk survive killed processes and full disks, and need little memory and space"""
import contextlib
import io
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from fastai.basics import Callback

import forks
from forks import fork, script, wait_for
from helpers import loaders, tiny_learner, tiny_model
from fastai_bnstats.freeze import bn_splitter
from fastai_bnstats.record.callback import WeightHistCallback
from fastai_bnstats.recording import FORMAT, Recording, full_counts
from fastai_bnstats.record.quantities import GradHistCallback, UpdateHistCallback
from fastai_bnstats.record.writer import Writer

KILLS = '''
import os, random, signal, sys, time
from pathlib import Path
from helpers import tiny_learner
from fastai_bnstats.all import *
rng = random.Random(0)
for k in range(10):
    run = Path(sys.argv[1])/f'run{k}'
    if not (pid := os.fork()):
        tiny_learner(cbs=WeightHistCallback('all', path=run)).fit(100_000)
        os._exit(1)
    while not list(run.glob('chunk-*.npz')): time.sleep(.01)
    time.sleep(rng.random())
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    print(k, len(Recording.load(run)), [f.name for f in run.iterdir() if f.name.startswith('.')], flush=True)
'''


def run_code(text, folder):
    "Run `text` in a process of its own, with `folder` as argument, and return the text that it prints"
    (folder.parent/'script.py').write_text(text)
    p = forks.run(script, folder.parent/'script.py', folder)
    assert p.returncode == 0, p.stderr[-2000:]
    return p.stdout


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    assert len(run_code(KILLS, tmp_path/'runs').splitlines()) == 10
    for run in (tmp_path/'runs').iterdir():
        rec = Recording.load(run)
        assert len(rec) and len(rec)%4 == 0 # whole epochs
        assert rec.step.tolist() == list(range(len(rec))) == rec.loss_step.tolist()
        assert (full_counts(rec).sum(-1) == rec.numel).all() and (rec.numel > 0).all()
    n = len(rec)
    (run/'.chunk-000009.npz.1.tmp').write_bytes(b'half') # as a process leaves it that was killed while writing
    tiny_learner(cbs=WeightHistCallback('all', path=run, resume=True)).fit(1)
    rec = Recording.load(run)
    assert len(rec) == n+4 and rec.step.tolist() == list(range(n+4)) and rec.fit[-1] == 1 and not list(run.glob('.*'))


FULL = '''
import resource, sys, warnings
from helpers import tiny_learner
from fastai_bnstats.all import *
learn = tiny_learner(cbs=WeightHistCallback('all', path=sys.argv[1]))
learn.fit(3)
resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000)) # limits the size of files, as a full disk does
with warnings.catch_warnings(record=True) as ws:
    warnings.simplefilter('always')
    learn.fit(40)
stopped = [str(w.message) for w in ws if 'stopped recording' in str(w.message)]
assert len(stopped) == 1, stopped
assert len(learn.recorder.losses) == 160
print(stopped[0])
print(len(Recording.load(sys.argv[1])), len(learn.weight_hist.recording))
'''


HOLDS = '''
import signal, sys, time
from pathlib import Path
from fastai.basics import Callback
from helpers import tiny_learner
from fastai_bnstats.all import *
run = Path(sys.argv[1])
class Wait(Callback):
    "Between two steps: say that the folder is in use, and wait until somebody has tried to use it"
    order = 60
    def after_batch(self):
        if not self.training or self.iter != 1: return
        print('recording', flush=True)
        while not run.with_name('go on').exists(): time.sleep(.01)
tiny_learner(cbs=[WeightHistCallback(path=run), Wait()]).fit(1)
print('done', flush=True)
signal.pause() # alive, but between two fits
'''


@pytest.fixture
def other_process(tmp_path):
    "A process that records into tmp_path/run and stops in the middle of an epoch until there is a file 'go on'"
    (tmp_path/'script.py').write_text(HOLDS)
    with fork(script, tmp_path/'script.py', tmp_path/'run') as p:
        wait_for(lambda: 'recording' in p.printed(), p)
        yield p


@pytest.mark.parametrize('resume', [False, True])
def test_a_folder_that_another_process_records_into_is_refused(other_process, tmp_path, resume):
    text = "in use by another callback or process. Give each recording a folder of its own, such as path='run/weights', or wait"
    with pytest.raises(FileExistsError, match=text): tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run', resume=resume)).fit(1)
    (tmp_path/'go on').touch()
    wait_for(lambda: 'done' in other_process.printed(), other_process)
    rec = Recording.load(tmp_path/'run')
    assert rec.step.tolist() == rec.loss_step.tolist() == [0, 1, 2, 3] # nothing of the first is lost, nothing of the second is there
    tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run', resume=True)).fit(1) # between fits the folder is free
    assert Recording.load(tmp_path/'run').step.tolist() == list(range(8)) and not list((tmp_path/'run').glob('.*'))


def test_the_folder_of_a_process_that_was_killed_is_free(other_process, tmp_path):
    other_process.kill()
    other_process.join()
    tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run')).fit(1) # it had written no chunk yet, and its lock is gone with it
    assert len(Recording.load(tmp_path/'run')) == 4


class Once(Callback):
    "Runs a function once, after a minibatch of an epoch"
    order = 90
    def __init__(self, do, epoch=1): self.do, self.epoch_ = do, epoch
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (self.epoch_, 1): self.do()


@pytest.mark.parametrize('how', ['deleted', 'renamed', 'replaced'])
def test_a_folder_that_vanishes_during_training_is_noticed_at_the_next_chunk(how, tmp_path):
    run = tmp_path/'run'
    def vanish():
        run.rename(tmp_path/'elsewhere') if how != 'deleted' else shutil.rmtree(run)
        if how == 'replaced': run.mkdir()
    learn = tiny_learner(cbs=[WeightHistCallback(path=run), Once(vanish)])
    text = f'{run} was deleted or renamed during the training. This recording keeps the last 8 rows and all later ones, in memory'
    with pytest.warns(UserWarning, match=text) as ws: learn.fit(3)
    assert sum('was deleted or renamed' in str(w.message) for w in ws) == 1 and len(learn.recorder.losses) == 12
    rec = learn.weight_hist.recording # all rows: the chunk that is gone was small, so its rows were kept
    assert rec.step.tolist() == rec.loss_step.tolist() == list(range(12)) and not list(run.glob('*'))
    learn.fit(1)
    assert len(learn.weight_hist.recording) == 16 and Recording.load(learn.weight_hist.recording.save(tmp_path/'saved')).is_same(
        learn.weight_hist.recording)
    if how != 'deleted': assert len(Recording.load(tmp_path/'elsewhere')) == 4


def test_a_folder_deleted_between_two_fits_is_noticed(tmp_path):
    learn = tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run'))
    learn.fit(1)
    shutil.rmtree(tmp_path/'run')
    with pytest.warns(UserWarning, match='was deleted or renamed.*keeps the last 4 rows'): learn.fit(1)
    assert learn.weight_hist.recording.step.tolist() == list(range(8))


@pytest.mark.parametrize('spelling', [lambda run: run.parent/'x'/'..'/'run', lambda run: run.parent/'link', str, lambda run: f'{run}/'],
                         ids=['dots', 'link', 'text', 'slash'])
def test_a_folder_is_the_same_in_all_spellings(spelling, tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'x').mkdir()
    (tmp_path/'link').symlink_to(tmp_path/'run')
    learn = tiny_learner(cbs=[WeightHistCallback(path=tmp_path/'run'), GradHistCallback(path=spelling(tmp_path/'run'))])
    with pytest.raises(FileExistsError, match='in use by another callback or process'): learn.fit(1)
    tiny_learner(cbs=WeightHistCallback(path=spelling(tmp_path/'run'))).fit(1)
    assert len(Recording.load(tmp_path/'run')) == 4


@pytest.mark.parametrize('kw,said', [
    (dict(bins=20), 'begun with bins=40, and this callback has bins=20'),
    (dict(range=(-1, 1)), r"begun with range=None, and this .* range=\(-1, 1\)"),
    (dict(bins=20, range=3), 'begun with bins=40 and range=None, and this callback has bins=20 and range=3')], ids=str)
def test_a_resumed_recording_says_whose_bins_and_edges_it_uses(kw, said, tmp_path):
    tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run')).fit(1)
    old = Recording.load(tmp_path/'run')
    with pytest.warns(UserWarning, match=f'{said}: its bins and edges are used. Choose a new folder to use others'):
        tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run', resume=True, **kw)).fit(1)
    rec = Recording.load(tmp_path/'run')
    assert len(rec) == 8 and np.array_equal(rec.edges, old.edges)


def test_a_resumed_recording_with_the_same_range_says_nothing(tmp_path):
    for kw in (dict(range=(-1, 1), bins=20), dict(range=(-1, 1), bins=20, resume=True), dict(bins=20, resume=True)):
        tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run', **kw)).fit(1) # warnings are errors
    assert len(Recording.load(tmp_path/'run')) == 12


@pytest.mark.parametrize('behind', range(2))
def test_callbacks_that_were_killed_together_number_steps_alike(behind, tmp_path):
    "A process may be killed when only some of its callbacks have saved an epoch"
    def fit(epochs, **kw):
        learn = tiny_learner(cbs=[cls(path=tmp_path/cls.__name__, every=3, **kw) for cls in (WeightHistCallback, GradHistCallback)])
        learn.fit(epochs)
    fit(1)
    folder = tmp_path/(WeightHistCallback, GradHistCallback)[behind].__name__
    shutil.copytree(folder, tmp_path/'saved')
    fit(1, resume=True)
    shutil.rmtree(folder)
    (tmp_path/'saved').rename(folder)
    fit(2, resume=True)
    weights, grads = (Recording.load(tmp_path/cls.__name__) for cls in (WeightHistCallback, GradHistCallback))
    assert weights.step[-3:].tolist() == grads.step[-3:].tolist() == [8, 11, 14]
    assert weights.fit[-3:].tolist() == grads.fit[-3:].tolist() == [2, 2, 2]
    assert weights.meta['phases'] == grads.meta['phases'] == ['fit0', 'fit1', 'fit2']
    assert weights.loss_step[-8:].tolist() == grads.loss_step[-8:].tolist() == list(range(8, 16))


def test_an_update_without_edges_gets_them_after_the_recording_was_resumed(tmp_path):
    "Updates of 0 have no edges yet; a resumed recording must not make some up"
    for lr in (0., 1e-2):
        learn = tiny_learner(cbs=UpdateHistCallback(path=tmp_path/'run', resume=lr > 0), lr=lr, wd=0.)
        learn.fit(1)
    rec = Recording.load(tmp_path/'run')
    width = np.diff(rec.edges[:, [0, -1]])[:, 0]
    assert len(rec) == 8 and (width < .5).all() and (rec.hist[4:] > 0).sum() > 50 # made-up edges would be 2 wide, and hold all in one bin
    assert (full_counts(rec).sum(-1) == rec.numel).all()


@pytest.mark.parametrize('folder', [False, True])
def test_the_recording_knows_how_many_parameters_of_the_model_trained(tmp_path, folder):
    path, total, learn = tmp_path/'run' if folder else None, len([*tiny_model().parameters()]), None
    for k in range(2): # the second learner continues the recording if it is in a folder
        if learn is None or folder: learn = tiny_learner(cbs=WeightHistCallback(path=path, resume=k > 0), splitter=bn_splitter)
        with contextlib.redirect_stdout(io.StringIO()): learn.freeze_non_bn()
        learn.fit(1)
        learn.unfreeze()
        learn.fit(1)
    rec = Recording.load(path) if folder else learn.weight_hist.recording
    frozen = 2*1 # the weights of two convolutions, which have no bias
    assert rec.meta['trained'] == {str(f): [total-(0 if f%2 else frozen), total] for f in range(4)}
    rec.save(tmp_path/'x.npz')
    assert f'fit2: 1 epoch, 4 rows, {total-frozen} of {total} parameters train' in repr(Recording.load(tmp_path/'x.npz'))
    learn.weight_hist.reset()
    assert learn.weight_hist.recording.meta['phases'] == [] and not learn.weight_hist.trained


def test_a_full_disk_stops_the_recording_with_one_warning(tmp_path):
    warning, rows = run_code(FULL, tmp_path/'run').splitlines()
    assert 'WeightHistCallback stopped recording in end_epoch: OSError' in warning
    assert 'Training goes on; what was recorded before is kept' in warning
    on_disk, kept = map(int, rows.split())
    assert 12 <= on_disk < 172 and kept >= on_disk and not list((tmp_path/'run').glob('.*'))


def test_training_continues_if_the_folder_is_not_writable():
    learn = tiny_learner(cbs=[WeightHistCallback(path='/proc/not/writable'), GradHistCallback()])
    warning = "this fit is not recorded, because its folder can't be used.*Training goes on. Pass path= with a folder that can be written"
    with pytest.warns(UserWarning, match=warning) as ws: learn.fit(2)
    assert len([w for w in ws if 'folder' in str(w.message)]) == 1
    assert len(learn.recorder.values) == 2 and len(learn.weight_hist.recording) == 0 and len(learn.grad_hist.recording) == 8


def test_steps_that_were_not_recorded_are_counted(monkeypatch):
    class Fail(Callback):
        order = 54
        def before_batch(self):
            if self.epoch == 1 and self.training and self.iter == 2: self.learn.weight_hist.measure = lambda: 1/0
        def after_fit(self): self.learn.weight_hist.__dict__.pop('measure', None)
    learn = tiny_learner(cbs=WeightHistCallback())
    with pytest.warns(UserWarning, match='ZeroDivisionError'): learn.fit(3, cbs=Fail())
    learn.fit(1)
    rec = learn.weight_hist.recording
    assert rec.step.tolist() == [*range(6), *range(12, 16)] and np.isnan(rec.delta_var()[5]).all()


@pytest.mark.slow
def test_memory_is_bounded_within_one_long_epoch(tmp_path):
    most = [0]
    class CountRows(Callback):
        order = 56
        def after_batch(self):
            rows = self.learn.weight_hist.writer._columns
            most[0] = max(most[0], len(rows['step']), len(rows['loss_step']))
    learn = tiny_learner(dls=loaders(n=2*600, bs=2, size=5), cbs=[WeightHistCallback(path=tmp_path/'run'), CountRows()])
    learn.fit(1)
    assert most[0] <= 256 and len(list((tmp_path/'run').glob('chunk-*'))) >= 2
    rec = Recording.load(tmp_path/'run')
    assert rec.step.tolist() == list(range(600)) and len(rec.loss) == 600 and len(rec.valid_loss) == 300


@pytest.mark.slow
def test_many_short_epochs_leave_few_files(tmp_path):
    tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run')).fit(70)
    assert len(list((tmp_path/'run').iterdir())) == 2 and len(Recording.load(tmp_path/'run')) == 280


def wide(rows, seed=0):
    "23 tensors of 40 bins and up to 2.4 million weights; at each step, up to 5 % of a bin move to each neighbour"
    rng = np.random.default_rng(seed)
    e = np.linspace(-5, 5, 41)
    p = np.diff([0.5*(1+math.erf(x/2**.5)) for x in e])
    p /= p.sum()
    sizes = np.geomspace(800, 2_400_000, 23).astype(int)
    h = np.stack([rng.multinomial(n, p) for n in sizes])
    writer = Writer([f'{i}.weight' for i in range(23)], np.tile(e, (23, 1)))
    z = np.zeros(23, int)
    for t in range(rows):
        pos = dict(step=t, fit=0, epoch=t//100, batch=t%100)
        up = rng.binomial(h, .05)*(rng.random(h.shape) < .5)
        up[:, -1] = 0
        down = rng.binomial(h-up, .05)*(rng.random(h.shape) < .5)
        down[:, 0] = 0
        h = h-up-down+np.roll(up, 1, 1)+np.roll(down, -1, 1)
        moments = dict(mean=rng.normal(size=23), var=rng.normal(size=23)**2)
        writer.add(hist=h, under=z, over=z, nonfinite=z, numel=sizes, **moments, **pos,
                   phase='fit0', stepped=True, trainable=z == 0, lr=[.1])
        writer.add(loss=rng.normal(), **{f'loss_{k}': v for k, v in pos.items()})
    return writer.recording(dict(format=FORMAT))


def test_a_thousand_rows_take_less_than_two_megabytes(tmp_path):
    assert wide(256).save(tmp_path/'r').stat().st_size*1000/256 <= 2e6


def test_a_file_of_format_1_still_loads(tmp_path):
    rec = wide(5)
    f = rec.save(tmp_path/'new')
    new = {'kind', 'norm', 'step_norm', 'fit_norm', 'start_norm', 'meta'}
    with np.load(f) as z: old = {k: z[k] for k in z.files if k not in new}
    np.savez_compressed(tmp_path/'old.npz', **old, meta=np.array('{"format": 1, "phases": ["fit0"], "every": 1}'))
    back = Recording.load(tmp_path/'old.npz')
    assert back.is_same(rec) and set(back.kind) == {'weight'} and back.what == 'weight'


def test_files_need_only_numpy(tmp_path):
    f = wide(3).save(tmp_path/'r')
    code = f"""
import sys
import numpy as np
z = np.load({str(f)!r}, allow_pickle=False)
assert z['hist'].shape == (3, 23, 40)
assert 'torch' not in sys.modules and 'fastai_bnstats' not in sys.modules
"""
    subprocess.run([sys.executable, '-c', code], check=True)
