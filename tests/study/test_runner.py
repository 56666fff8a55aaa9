"""Parallel runs give the bits of one process, even if workers are killed"""
import inspect
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from test_data import folder

from forks import LIMIT, code, fork, run, script, wait_for
from helpers import process

from fastai_bnstats import commands
from fastai_bnstats.recording import Recording
from fastai_bnstats.study import (ARMS, GRID, POST_ARMS, PRETRAIN, dask, jobs, load_runs, load_study, new_learner, new_model, run_study,
                                  runner, train_arm)
from fastai_bnstats.study.arms import CONTROLS, LR_FACTORS, SWEEP_SEEDS
from fastai_bnstats.study.data import data_maker
from fastai_bnstats.study.images import SkippedImages
from fastai_bnstats.study.readings import READINGS, run_readings
from fastai_bnstats.study.results import QUANTITIES, load_run, run_dir, run_file, run_problem, set_aside, temporary_folder
from fastai_bnstats.study.verdicts import study_table

TINY = dict(epochs='1,1,1,1', bs=4, size=8, arms='naive_bn')
MAIN = """from fastai_bnstats.study import jobs, runner
runner.write_report = lambda out: None # slower than the runs
if __name__ == '__main__': runner.bnstats_study()
"""
KILLED = """import os, signal
from functools import partial
from fastai_bnstats.study import jobs, runner
def killed(arm, model, dls, epochs, key, *args, train_arm=jobs.train_arm, **kwargs):
    if key == (1, 1): os.kill(os.getpid(), signal.SIGKILL) # seed 1 has a folder now, which is not whole
    return train_arm(arm, model, dls, epochs, key, *args, **kwargs)
def work(job):
    jobs.train_arm = killed
    return jobs.run_job(job)
jobs.train_arm, runner.run_jobs = killed, partial(jobs.run_jobs, work=work)
""" # in this process, or in workers


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "No report, because test_report tests it"
    monkeypatch.setattr(runner, 'write_report', lambda out: None)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Eight training images, two steps per epoch"
    root = tmp_path_factory.mktemp('data')
    return dict(TINY, source=folder(root/'src', n=4), target=folder(root/'tgt', n=4))


@pytest.fixture(scope='module')
def plain(tiny, tmp_path_factory):
    "A study in one process: two sources, naive_bn with one seed and another one as control"
    out = tmp_path_factory.mktemp('plain')/'out'
    with pytest.MonkeyPatch.context() as m:
        m.setattr(runner, 'write_report', lambda out: None)
        return run_study(out, sources=2, aa=True, **tiny)


def files(out): return sorted(str(p.relative_to(out)) for p in out.rglob('*') if p.is_file())


def same(a, b, only=''):
    fs = [f for f in files(a) if f.startswith(only)]
    assert fs == [f for f in files(b) if f.startswith(only)] and len(fs) > 4
    for f in fs:
        if f.endswith('.npz'): assert Recording.load(a/f).is_same(Recording.load(b/f)), f
        if f.endswith('result.json'):
            x, y = (json.loads((o/f).read_text()) for o in (a, b))
            assert {**x, 'seconds': 0} == {**y, 'seconds': 0}
        if f.endswith('.pth'):
            s, t = (torch.load(o/f, weights_only=True) for o in (a, b))
            assert all(s[k].equal(t[k]) for k in s)


def study_command(tmp_path, main=MAIN, **kwargs):
    "The command with arguments, without its report, in a process of its own"
    (tmp_path/'main.py').write_text(main)
    return fork(script, tmp_path/'main.py', *(x for k, v in kwargs.items() for x in ((f'--{k}',) if v is True else (f'--{k}', v))))


def is_alive(process): return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def workers(pid): return [c for c in psutil.Process(pid).children(recursive=True) if any('popen_loky' in x for x in c.cmdline())]


def test_sources_and_control(plain):
    about = json.loads((plain/'study.json').read_text())
    assert (about['seeds'], about['sources'], about['aa']) == (1, 2, 1) and 'seeds' not in about['args']
    for k in (0, 1):
        runs = load_runs(plain, k)
        assert {a: list(s) for a, s in runs.items()} == {'pretrained': [0], 'naive_bn': [0, 1]}
        assert {r['source'] for s in runs.values() for r in s.values()} == {k}
    a, b = (Recording.load(plain/f'source{k}/pretrained/weights.npz') for k in (0, 1))
    assert not a.is_same(b)


def test_seeds_of_the_sources(plain, tiny):
    data, epochs = data_maker('', tiny['source'], tiny['target'])(size=8, bs=4), dict(source=1)
    for k in (0, 1):
        with jobs.torch_threads(1): rec = train_arm(PRETRAIN, new_model(2, key=(2, k)), data.source, epochs, (2, k))[0]['weights']
        assert rec.is_same(Recording.load(plain/f'source{k}/pretrained/weights.npz'))


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one(plain, tiny, tmp_path, capsys):
    out = run_study(tmp_path/'out', sources=2, aa=True, jobs=2, **tiny)
    same(plain, out)
    printed = capsys.readouterr().out
    for text in ('pretrained, source 1: accuracy', '[4/4] ', 'naive_bn, seed 1, source 0: accuracy 0.', ' left'): assert text in printed
    assert printed.count('naive_bn, seed 0, source 1 · naive epoch 1/1: smoothed loss ') == 1
    run_study(out, sources=2, aa=True, jobs=2, **tiny)
    assert 'skipped: pretrained (source 0), pretrained (source 1), naive_bn (seed 0, source 0)' in capsys.readouterr().out


@pytest.mark.slow
def test_probes_of_the_loss_change_no_bit_and_are_kept(plain, tiny, tmp_path):
    from fastai_bnstats.study import load_study
    from fastai_bnstats.study.readings import READINGS
    out = run_study(tmp_path/'out', landscape=1, **{**tiny, 'arms': 'naive_bn,naive_fold'})
    for q in ('weights', 'gradients', 'outputs'):
        assert Recording.load(out/f'source0/seed0/naive_bn/{q}.npz').is_same(Recording.load(plain/f'source0/seed0/naive_bn/{q}.npz'))
    lands, forms = (load_study(out, quantity=q) for q in ('landscape', 'forms'))
    assert {a: len(by[0]) for a, by in lands.items()} == dict(naive_fold=2, naive_bn=2) and {*forms} == {'naive_bn'}
    land, readings = lands['naive_bn'][0], load_runs(out)['naive_bn'][0]['readings']
    for name in ('beta_rel', 'turn'): assert readings[f'land_{name}'] == pytest.approx(np.median(land.measure(name)))
    critical = np.median(land.measure('critical_rel')) # infinite if most steps could have been 64 times as long
    assert readings['land_critical'] == pytest.approx(critical if np.isfinite(critical) else np.nan, nan_ok=True)
    for form in ('batch', 'running', 'folded'):
        assert readings[f'forms_beta_{form}'] == pytest.approx(np.median(forms['naive_bn'][0].sel(phase=form).measure('beta_rel')))
    assert {*readings} == {*READINGS} and np.isnan(load_runs(plain)['naive_bn'][0]['readings']['land_turn'])
    with pytest.raises(ValueError, match='landscape was 1, now 0'): run_study(out, **tiny)
    with pytest.raises(ValueError, match='--landscape must be 0 .off. or the number of steps between two probes. Found -1'):
        run_study(out, landscape=-1, **tiny)
    cut(out/'source0/seed0/naive_bn/landscape.npz')
    assert run_problem(out/'source0/seed0/naive_bn') == 'landscape.npz is damaged' and not run_problem(out/'source0/seed0/naive_fold')
    shutil.copy(out/'source0/seed0/naive_fold/landscape.npz', out/'source0/seed0/naive_bn/landscape.npz')
    from fastai_bnstats.study.report import draw_landscape
    assert draw_landscape(out).exists() and draw_landscape(plain) is None


def test_threads_of_a_process_take_turns(plain, tiny, tmp_path):
    out = run_study(tmp_path/'out', backend='threading', jobs=2, aa=True, **tiny)
    same(plain, out, 'source0')


def check_resumes(plain, tmp_path, skipped, **kwargs):
    "The same command, here in one process, finishes a study in which seed 1 was killed"
    out = kwargs['out']
    assert run_file(run_dir(out, 'pretrained')).exists() and not run_dir(out, 'naive_bn', 1).exists()
    with study_command(tmp_path, jobs=1, **kwargs) as p:
        p.join(LIMIT)
        assert p.exitcode == 0 and f'Already there, skipped: {skipped}' in p.printed() and 'Report: ' in p.printed(), p.printed('stderr')
    same(plain, out, 'source0')
    assert not list(out.rglob('*.partial'))


def test_a_killed_study_resumes_with_the_same_results(plain, tiny, tmp_path):
    args = dict(tiny, out=tmp_path/'out', aa=True)
    with study_command(tmp_path, KILLED+MAIN, jobs=1, **args) as p:
        p.join(LIMIT)
        assert p.exitcode == -signal.SIGKILL, p.printed('stderr')
    assert list(args['out'].rglob('*.partial'))
    check_resumes(plain, tmp_path, 'pretrained, naive_bn (seed 0)', **args)


@pytest.mark.slow
def test_a_killed_worker_ends_the_study_and_the_same_command_finishes_it(plain, tiny, tmp_path):
    args = dict(tiny, out=tmp_path/'out', aa=True)
    with study_command(tmp_path, KILLED+MAIN, jobs=2, **args) as p:
        p.join(LIMIT)
        err = p.printed('stderr')
    assert p.exitcode == 1 and 'Traceback' not in err and 'bnstats-study: A worker was killed during a run' in err
    assert 'FutureWarning' not in err # of fastai, in the workers
    assert f"try fewer --jobs. Finished runs are kept in {args['out']}; repeat the same command for the rest." in err
    assert not list(args['out'].rglob('*.partial')) # the command lives on, and has cleared what its worker left
    check_resumes(plain, tmp_path, 'pretrained', **args)


@contextmanager
def at_work(tmp_path, tiny):
    "A study that pretrains for a long time in two worker processes"
    out = tmp_path/'out'
    with study_command(tmp_path, out=out, jobs=2, sources=2, **{**tiny, 'epochs': '999,1,1,1'}) as p:
        wait_for(lambda: len(list(out.glob('source*/*.partial'))) == 2, p)
        ws = workers(p.pid)
        assert len(ws) == 2
        yield p, ws


@pytest.mark.slow
@pytest.mark.parametrize('to', [os.kill, os.killpg], ids=['the command', 'all its processes, as a terminal does'])
def test_ctrl_c_leaves_no_worker_and_no_temporary_folder(tiny, tmp_path, to):
    out = tmp_path/'out'
    with at_work(tmp_path, tiny) as (p, ws):
        to(p.pid, signal.SIGINT)
        p.join(LIMIT)
        err = p.printed('stderr')
        assert p.exitcode == 130 and f'Interrupted. Finished runs are kept in {out}' in err and 'Traceback' not in err
        wait_for(lambda: not any(map(is_alive, ws)))
    assert not list(out.rglob('*.partial'))


@pytest.mark.slow
def test_a_second_command_is_refused_until_the_first_ends_even_if_it_is_killed(tiny, tmp_path):
    out = tmp_path/'out'
    who = rf'process %d on {socket.gethostname()}, since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d'
    with at_work(tmp_path, tiny) as (p, ws):
        text = rf'{out} is in use: another bnstats-study works in it \({who%p.pid}\). Wait until .*, stop it, or pass --out with another'
        with pytest.raises(FileExistsError, match=text): run_study(out, **tiny)
        (out/'.lock.json').write_text('[') # as if it were being written
        with pytest.raises(FileExistsError, match='another bnstats-study works in it. Wait'): run_study(out, **tiny)
        p.kill()
        p.join()
        wait_for(lambda: not any(map(is_alive, ws)))
        with pytest.raises(ValueError, match='holds a study with other arguments'): run_study(out, **tiny) # not locked any more
    assert not list(tmp_path.rglob('.lock*'))


def test_the_next_command_clears_what_a_killed_one_has_left(plain, tiny, tmp_path):
    out = copy_of(plain, tmp_path/'copy')
    for d in ('source0/pretrained.12.partial', 'source0/seed7/freeze.34.partial'): (out/d).mkdir(parents=True)
    run_study(out, **tiny)
    assert not list(out.rglob('*.partial'))


def copy_of(folder, to): return Path(shutil.copytree(folder, to))


def cut(file): file.write_bytes(file.read_bytes()[:-90])


def empty(run):
    for f in run.iterdir(): f.unlink()


BREAK = { # what is wrong -> function of the folder of a run, the problem that is named, is it the pretrained one?
    'empty folder': (empty, 'result.json is missing', False),
    'a file is missing': (lambda run: (run/'gradients.npz').unlink(), 'gradients.npz is missing', False),
    'a file is cut off': (lambda run: cut(run/'outputs.npz'), 'outputs.npz is damaged', False),
    'no result.json': (lambda run: run_file(run).unlink(), 'result.json is missing', False),
    'result.json is cut off': (lambda run: cut(run_file(run)), 'result.json is damaged or cut off', False),
    'no epochs': (lambda run: edit(run_file(run), epochs=[]), 'result.json is not what bnstats-study wrote: epochs is empty', False),
    'a file': (lambda run: (shutil.rmtree(run), run.write_text('x')), 'it is not a folder', False),
    'body is cut off': (lambda run: cut(run/'body.pth'), 'body.pth is damaged', True),
    'no edges': (lambda run: (run/'edges_gradients_random.npz').unlink(), 'edges_gradients_random.npz is missing', True)}


def edit(file, **values): file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize('break_it, problem, is_source', BREAK.values(), ids=BREAK)
def test_a_run_that_is_not_whole_is_named_and_trained_again(plain, tiny, tmp_path, capsys, break_it, problem, is_source):
    out = copy_of(plain, tmp_path/'copy')
    run = run_dir(out, 'pretrained' if is_source else 'naive_bn')
    break_it(run)
    run_study(out, sources=2, aa=True, **tiny)
    printed = capsys.readouterr().out
    name = r'pretrained \(source 0\)' if is_source else r'naive_bn \(seed 0, source 0\)'
    found = re.search(rf'Not whole, trained again: {name}: {problem}.*The old folder is now (.*broken)\.', printed)
    aside = Path(found[1])
    assert aside.parent == run.parent and aside.exists()
    shutil.rmtree(aside, ignore_errors=True)
    aside.unlink(missing_ok=True)
    same(plain, out)


def test_runs_that_are_set_aside_are_not_read(plain, tmp_path):
    out = copy_of(plain, tmp_path/'copy')
    set_aside(run_dir(out, 'naive_bn'))
    assert list(load_runs(out)['naive_bn']) == [1]


def test_a_run_that_diverged_is_finished(plain, tiny, tmp_path, capsys):
    out = copy_of(plain, tmp_path/'copy')
    f = run_file(run_dir(out, 'naive_bn'))
    epochs = json.loads(f.read_text())['epochs']
    edit(f, epochs=[{**e, 'accuracy': None, 'train_loss': None} for e in epochs], diverged='the loss of minibatch 1 of 2 is not finite')
    run_study(out, sources=2, aa=True, **tiny)
    assert 'Not whole' not in capsys.readouterr().out and 'not finite' in f.read_text()


BODIES = { # what is in body.pth -> how the error says so
    'other keys': (dict(x=torch.zeros(1)), r'Found 133 tensors differ: 0.0.weight, 0.1.weight, .*, \.\.\.'),
    'a list': ([1], 'Found list'), 'nothing': ({}, 'Found dict'), 'no tensors': ({'0.0.weight': 1}, 'Found 132 tensors differ')}


@pytest.mark.parametrize('body, found', BODIES.values(), ids=BODIES)
def test_weights_of_another_network_are_refused(plain, tiny, tmp_path, body, found):
    out = copy_of(plain, tmp_path/'copy')
    f = out/'source0/pretrained/body.pth'
    torch.save(body, f)
    text = f'{f} does not hold the weights of the body of xresnet18. {found}.*Delete .*pretrained and repeat'
    with pytest.raises(ValueError, match=text):
        run_study(out, **{**tiny, 'arms': 'freeze'})


SCRIPT = """import sys
from fastai_bnstats import commands
print('started', flush=True)
from fastai_bnstats.commands import {name}
sys.exit({name}())
""" # the script that pip makes for a console command, and a line to wait for


@pytest.mark.slow
@pytest.mark.parametrize('name, args', [('bnstats_study', ['--out', 'out']), ('bnstats_report', ['.'])])
@pytest.mark.parametrize('seconds', [.1, .7, 2])
def test_ctrl_c_in_the_first_seconds_prints_one_line(tmp_path, name, args, seconds):
    (tmp_path/'script.py').write_text(SCRIPT.format(name=name))
    (tmp_path/'study.json').write_text('{}')
    with process(sys.executable, '-W', 'ignore', tmp_path/'script.py', *args, cwd=tmp_path) as p:
        assert p.stdout.readline() == 'started\n'
        time.sleep(seconds)
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=60)
    if p.returncode == 1 and name == 'bnstats_report': return # it was faster
    assert p.returncode == 130 and err.count('\n') == 2 and err.startswith('\nInterrupted')


def test_the_console_commands_start_before_the_imports():
    import configparser
    config = configparser.ConfigParser()
    config.read(Path(runner.__file__).parent.parent.parent/'setup.cfg')
    entries = dict(l.split(' = ') for l in config['options.entry_points']['console_scripts'].split('\n') if l)
    for command, target in entries.items():
        module, name = target.split(':')
        assert module == 'fastai_bnstats.commands' and getattr(commands, name).__name__ == command.replace('-', '_')
    with pytest.raises(AttributeError, match="has no attribute 'bnstats'"): commands.bnstats # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['threading', 'loky'])
def test_an_error_in_a_job_is_raised_unchanged(plain, tiny, tmp_path, backend):
    out = copy_of(plain, tmp_path/'copy')
    torch.save([1], out/'source0/pretrained/body.pth')
    with pytest.raises(ValueError, match="body.pth does not hold the weights.*Delete .*pretrained and repeat"):
        run_study(out, jobs=2, seeds=2, backend=backend, **{**tiny, 'arms': 'freeze'})


def test_a_damaged_body_is_refused(plain, tmp_path):
    run = copy_of(run_dir(plain, 'pretrained'), tmp_path/'pretrained')
    cut(run/'body.pth')
    with pytest.raises(ValueError, match="body.pth can't be read.*Delete .*pretrained and repeat"): jobs._load_body(run)


PRELOAD = """import subprocess
from fastai_bnstats.study import dask
class Popen(subprocess.Popen):
    def __init__(self, args, **kwargs): super().__init__([*args[:-1], {!r}+args[-1]], **kwargs)
dask.subprocess = type('patched', (), dict(Popen=Popen, PIPE=subprocess.PIPE))
""" # of a worker: what its subprocesses do before anything else
KILLS = """import os, signal
from pathlib import Path
from fastai_bnstats.study import jobs
def train_arm(arm, model, dls, epochs, key, *args, train_arm=jobs.train_arm, **kwargs):
    if key == (1, 0) and not Path({killed!r}).exists():
        Path({killed!r}).write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGKILL)
    return train_arm(arm, model, dls, epochs, key, *args, **kwargs)
jobs.train_arm = train_arm
"""


@pytest.mark.slow
def test_dask_gives_the_same_bits_although_a_worker_dies(plain, tiny, tmp_path, capsys):
    from distributed import LocalCluster
    out, killed = tmp_path/'out', tmp_path/'killed'
    preload = tmp_path/'preload.py'
    preload.write_text(PRELOAD.format(KILLS.format(killed=str(killed))))
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, preload=str(preload)) as cluster:
        run_study(out, backend='dask', scheduler=cluster.scheduler_address, aa=True, **tiny)
        with suppress(psutil.NoSuchProcess): # the subprocess of the worker that was killed
            subprocess_ = psutil.Process(int(killed.read_text()))
            wait_for(lambda: not is_alive(subprocess_))
    assert '[2/2] ' in capsys.readouterr().out
    same(plain, out, 'source0')
    assert not list(out.rglob('*.partial'))


def test_a_scheduler_that_ends_is_named(monkeypatch):
    "Dask cancels all jobs half a minute after the scheduler was killed"
    from concurrent.futures import CancelledError

    from fastai_bnstats.study import dask
    def cancelled(*args, **kwargs):
        yield 'a finished job'
        raise CancelledError()
    monkeypatch.setattr(dask, 'run_jobs', cancelled)
    jobs = dask.run_dask_jobs([], 1, 'out')
    assert next(jobs) == 'a finished job'
    text = "The Dask scheduler has ended, or can't be reached any more. Finished runs are kept in out; start it and its workers again"
    with pytest.raises(ConnectionError, match=text): next(jobs)


def test_refusals(tmp_path, monkeypatch):
    import distributed
    def no(text, error=ValueError, **kwargs):
        with pytest.raises(error, match=text): run_study(tmp_path/'x', **{**TINY, **kwargs})
        assert not (tmp_path/'x').exists()
    no('--jobs must be at least 1. Found 0', jobs=0)
    no('--threads must be at least 1. Found 0', threads=0)
    no('--sources must be at least 1. Found 0', sources=0)
    no("Unknown backend 'multiprocessing'. Expected one of loky, threading, dask", backend='multiprocessing')
    no('--scheduler goes with --backend dask. Found --backend loky', backend='loky', scheduler='tcp://h:1')
    no('--backend dask needs --scheduler .*dask scheduler.*dask worker tcp://HOST:8786 --nthreads 1', backend='dask')
    no('--aa compares naive_bn with itself.*freeze, freeze_hold, .*Add it to --arms', aa=True, arms='grid')
    def client(address, timeout, client=distributed.Client):
        assert timeout < 15
        return client(address, timeout=.1) # seconds for which Dask would try again
    monkeypatch.setattr(distributed, 'Client', client)
    no('No Dask scheduler answers at tcp://127.0.0.1:9 .*dask scheduler', ConnectionError, backend='dask', scheduler='tcp://127.0.0.1:9')
    monkeypatch.setitem(sys.modules, 'distributed', None)
    no(r"pip install 'fastai_bnstats\[dask\]'", backend='dask', scheduler='tcp://127.0.0.1:9')


@pytest.mark.slow
def test_a_scheduler_without_workers(tmp_path):
    from distributed import LocalCluster
    with LocalCluster(n_workers=0, processes=False, dashboard_address=None) as c:
        with pytest.raises(ConnectionError, match='has no workers. Start some.*--nthreads 1'):
            run_study(tmp_path/'x', backend='dask', scheduler=c.scheduler_address, **TINY)


def test_dask_is_imported_only_when_it_is_used():
    text = "import sys, fastai_bnstats.study.runner; print(sorted({'dask', 'distributed'} & set(sys.modules)))"
    assert run(code, text).stdout == '[]\n'


def test_workers_must_see_the_folder(tmp_path, monkeypatch):
    job = jobs.Job(str(tmp_path/'gone'), 'pretrained', 0, 0, {}, 'x', ('digits', None, None), 'x')
    with pytest.raises(FileNotFoundError, match='does not see .*gone. All workers must see .*under the same path'): jobs.run_job(job)
    monkeypatch.setattr(jobs, 'run_job', lambda job, threads=None: (job, {}))
    monkeypatch.setattr(jobs, '_becomes_visible', lambda run, f=jobs._becomes_visible: f(run, patience=.1))
    with pytest.raises(FileNotFoundError, match="has finished .*pretrained, but it can't be seen here. All workers must see"):
        run_study(tmp_path/'x', backend='threading', jobs=2, **TINY)


@pytest.mark.slow
def test_errors_in_a_subprocess_and_its_death_are_reported(tmp_path, monkeypatch):
    job = jobs.Job(str(tmp_path/'gone'), 'pretrained', 0, 0, {}, 'x', ('digits', None, None), 'x')
    with pytest.raises(FileNotFoundError, match='does not see .*gone'): dask.run_in_subprocess(job)
    popen = subprocess.Popen
    def killed(*args, **kwargs):
        p = popen(*args, **kwargs)
        p.kill()
        return p
    monkeypatch.setattr(dask.subprocess, 'Popen', killed)
    with pytest.raises(ChildProcessError, match='A worker was killed during a run.*Finished runs are kept in .*gone'):
        dask.run_in_subprocess(job)


def test_an_error_that_can_t_be_pickled_becomes_its_traceback():
    class Local(Exception): pass
    try: raise Local('no pickle')
    except Local as e: ok, error = pickle.loads(dask._pickle_error(e))
    assert not ok and type(error) is RuntimeError and 'Traceback' in str(error) and 'Local: no pickle' in str(error)


def test_if_two_workers_finish_a_run_the_first_result_is_kept(tmp_path):
    run = run_dir(tmp_path, 'freeze')
    (run.parent/'freeze_hold.1234.partial').mkdir(parents=True)
    (run.parent/'freeze.1234.partial').mkdir() # from a killed worker
    with temporary_folder(run) as slow:
        with temporary_folder(run) as fast: run_file(fast).write_text('first')
        (slow.parent/'x').mkdir()
        with pytest.raises(FileNotFoundError): run_file(slow).write_text('second')
        run_file(slow).write_text('second') # the folder of the slower worker
    assert run_file(run).read_text() == 'first'
    assert sorted(p.name for p in run.parent.iterdir()) == ['freeze', 'freeze_hold.1234.partial', 'x']
    with pytest.raises(OSError, match='mine'):
        with temporary_folder(tmp_path/'other'): raise OSError('mine')


def test_a_study_can_grow(tmp_path, monkeypatch):
    jobs_run = []
    monkeypatch.setattr(runner, '_run_missing', lambda pre, fine, *a: jobs_run.append([(j.arm, j.seed, j.source) for j in pre+fine]))
    def call(**kwargs):
        run_study(tmp_path/'x', **{**TINY, 'arms': 'naive_bn', **kwargs})
        about = json.loads((tmp_path/'x/study.json').read_text())
        return about['seeds'], about['sources'], about['aa']
    assert call() == (1, 1, None) and jobs_run[-1] == [('pretrained', 0, 0), ('naive_bn', 0, 0)]
    assert call(seeds=2, sources=2, aa=True) == (2, 2, 2)
    assert jobs_run[-1] == [('pretrained', 0, 0), ('pretrained', 0, 1), *(('naive_bn', s, k) for k in (0, 1) for s in (0, 1, 2, 3))]
    assert call(seeds=1) == (2, 2, 2) and call(seeds=3) == (3, 2, 2) and call(aa=True, seeds=3) == (3, 2, 3)
    assert set(json.loads((tmp_path/'x/study.json').read_text())['arms']) == set(ARMS)


def test_the_design_with_one_source_for_each_seed(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, '_run_missing', lambda pre, fine, *a: seen.append([(j.arm, j.seed, j.source) for j in pre+fine]))
    run_study(tmp_path/'x', seeds=3, paired_sources=True, aa=True, **{**TINY, 'arms': 'naive_bn,freeze'})
    assert seen[-1] == [('pretrained', 0, k) for k in range(3)]+[(a, s, s) for s in range(3) for a in ('naive_bn', 'freeze')]+[
        ('naive_bn', s, s-3) for s in (3, 4, 5)] # the control's seeds start from the same sources
    about = json.loads((tmp_path/'x/study.json').read_text())
    assert about['sources'] == 3 and about['args']['paired_sources'] is True
    with pytest.raises(ValueError, match='paired_sources was True, now False'): run_study(tmp_path/'x', seeds=3, **TINY)
    with pytest.raises(ValueError, match='each seed has its own source, 3 in all. Found --sources 2: leave it out'):
        run_study(tmp_path/'y', seeds=3, sources=2, paired_sources=True, **TINY)


def test_the_sweep_uses_other_seeds_and_other_images(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(runner, '_run_missing', lambda pre, fine, *a: seen.extend(pre+fine))
    out = run_study(tmp_path/'x', lr_sweep=True, **{**tiny, 'arms': 'naive_bn,freeze,controls'})
    swept = [j for j in seen if j.out.endswith('sweep')]
    assert {j.seed for j in swept if not j.pretrains} == {j.source for j in swept} == set(SWEEP_SEEDS)
    assert all(j.seed == j.source for j in swept if not j.pretrains)
    assert not {j.seed for j in seen if j not in swept} & set(SWEEP_SEEDS)
    arms = {j.arm for j in swept if not j.pretrains}
    assert arms == {f'{a}@{f:g}' for a in ('naive_bn', 'freeze', 'scratch_bn', 'scratch_nobn') for f in LR_FACTORS}
    data = data_maker('', tiny['source'], tiny['target'])(size=8, bs=4)
    tuning = next(j for j in swept if not j.pretrains).loaders(data)
    sets = dict(train=tuning.train_ds, valid=tuning.valid_ds, all=data.target.train_ds, compared=data.target.valid_ds)
    files = {k: {str(f) for f, _ in ds.items} for k, ds in sets.items()}
    assert files['train'] | files['valid'] == files['all'] and not files['train'] & files['valid'] and not files['all'] & files['compared']
    assert len(files['valid']) == 2 # of 8: one of each class
    with pytest.raises(ValueError, match='--lr-sweep uses the seeds 100 and 101, which the comparison must not use. Found 101 seeds'):
        run_study(out, lr_sweep=True, seeds=101, **tiny)


def test_some_seeds_now_and_the_rest_later(tmp_path, monkeypatch):
    seen = []
    def keep(pre, fine, *a): seen.append({(Path(j.out).name, j.arm, j.seed, j.source) for j in pre+fine})
    monkeypatch.setattr(runner, '_run_missing', keep)
    args = dict(seeds=3, paired_sources=True, aa=True, lr_sweep=True, **{**TINY, 'arms': 'naive_bn,freeze'})
    run_study(tmp_path/'x', **args)
    run_study(tmp_path/'x', only='1', **args)
    assert seen[-1] == {('x', 'pretrained', 0, 1), ('x', 'naive_bn', 1, 1), ('x', 'freeze', 1, 1), ('x', 'naive_bn', 4, 1)}
    for only in (' 0, 2', [100, np.int64(101)]): run_study(tmp_path/'x', only=only, **args)
    assert not seen[2] & seen[3] and seen[1] | seen[2] | seen[3] == seen[0] # each job once
    assert {(out, s) for out, *_, s in seen[3]} == {('sweep', 100), ('sweep', 101)}
    run_study(tmp_path/'y', seeds=2, sources=2, only=1, **TINY)
    assert seen[-1] == {('y', arm, s, k) for arm, s in (('pretrained', 0), ('naive_bn', 1)) for k in (0, 1)}
    for wrong in ('3', '0,x', '', '100', [1.7], [0, 3]):
        with pytest.raises(ValueError, match='--only takes numbers of seeds, separated by commas, among 0, 1, 2. .*with the first. Found'):
            run_study(tmp_path/'z', only=wrong, **{**args, 'lr_sweep': False})
    assert not (tmp_path/'z').exists()


def test_the_command_hands_on_every_option(monkeypatch, capsys):
    got = {}
    monkeypatch.setattr(runner, 'run_study', lambda *args, **kw: got.update(inspect.signature(run_study).bind(*args, **kw).arguments))
    options = {k: f'value of {k}' for k in inspect.signature(runner.bnstats_study).parameters}
    runner.bnstats_study(**options)
    assert got == options == {k: f'value of {k}' for k in inspect.signature(run_study).parameters}


def test_the_design_is_part_of_each_result_and_cannot_change(tiny, tmp_path):
    (design := tmp_path/'design.md').write_text('What is compared, and how')
    out = run_study(tmp_path/'x', design=design, **{**tiny, 'arms': 'naive_bn'})
    digest = sha256(b'What is compared, and how').hexdigest()
    assert {run['args']['design'] for by in load_runs(out).values() for run in by.values()} == {digest}
    run_study(out, design=str(design), **{**tiny, 'arms': 'naive_bn'})
    design.write_text('Something else')
    with pytest.raises(ValueError, match=f'with the text of another --design: its SHA-256 is {digest}, now it is'):
        run_study(out, design=design, **tiny)
    with pytest.raises(ValueError, match='now it is empty. Pass the file with which the study was begun'): run_study(out, **tiny)
    plain = run_study(tmp_path/'plain', **{**tiny, 'arms': 'naive_bn'})
    with pytest.raises(ValueError, match='was begun without --design: its SHA-256 is empty'): run_study(plain, design=design, **tiny)
    with pytest.raises(FileNotFoundError): run_study(tmp_path/'y', design=tmp_path/'missing.md', **tiny)


def test_an_arm_with_another_learning_rate(tiny, tmp_path):
    out = run_study(tmp_path/'x', **{**tiny, 'arms': 'naive_bn'})
    run_study(out, **{**tiny, 'arms': 'naive_bn@0.1,freeze@3'})
    runs, about = load_runs(out), json.loads((out/'study.json').read_text())
    assert [*runs] == ['pretrained', 'naive_bn@0.1', 'naive_bn', 'freeze@3'] and about['names'] == [*runs][1:]
    assert about['arms']['freeze@3']['phases'][0]['lr'] == pytest.approx(3e-2)
    recs = {a: seeds[0] for a, seeds in load_study(out).items()}
    assert recs['naive_bn@0.1'].lr.max() == pytest.approx(.1*recs['naive_bn'].lr.max())
    assert recs['naive_bn@0.1'].loss[0] == recs['naive_bn'].loss[0] # the same start and images
    for wrong in ('naive_bn@', 'naive_bn@x', 'naive_bn@0', 'naive_bn@.1', 'naive_bn@1', 'naive_bn@inf', 'naive_bn@-1', 'freeze_lr_half@3',
                  'naive_bn_lr0@3', 'pretrained', 'naive@3'):
        with pytest.raises(ValueError, match='naive_bn@0.3 is naive_bn with 0.3 times'): run_study(tmp_path/'y', **{**tiny, 'arms': wrong})


@pytest.mark.slow
def test_the_sweep_is_trained_and_scored(tiny, tmp_path):
    from fastai_bnstats.study.sweep import best_rates, is_complete, sweep_runs, sweep_scores
    out = run_study(tmp_path/'x', lr_sweep=True, **tiny)
    runs = sweep_runs(out)
    scores = sweep_scores(runs)
    assert is_complete(runs)
    assert {a: {f: len(v) for f, v in by.items()} for a, by in scores.items()} == dict(naive_bn=dict.fromkeys(LR_FACTORS, 2))
    run = json.loads((out/'sweep/source100/seed100/naive_bn@3/result.json').read_text())
    assert run['epochs'][-1]['accuracy'] in scores['naive_bn'][3] and not list((out/'sweep').rglob('seed*/*/*.npz')) # no recordings
    assert set(best_rates(scores)) == {'naive_bn'}
    assert [len(r) for r in load_runs(out).values()] == [1, 1] # the comparison does not see the sweep
    (out/'sweep/source100/seed100/freeze@3.12.partial').mkdir()
    run_study(out, lr_sweep=True, **tiny)
    assert not list(out.rglob('*.partial'))


def test_what_a_run_that_diverged_would_have_been_read_as_is_kept_for_descriptions(tiny, tmp_path):
    out = run_study(tmp_path/'x', **{**tiny, 'arms': 'naive_bn,naive_bn@1e+30'})
    content = json.loads((out/'source0/seed0/naive_bn@1e+30/result.json').read_text())
    assert content['diverged'] and content['readings']['roughness'] is None and {*content['readings_despite']} == {*READINGS}
    fine = json.loads((out/'source0/seed0/naive_bn/result.json').read_text())
    assert not fine['diverged'] and 'readings_despite' not in fine
    recs = {q: load_run(out, 'naive_bn@1e+30', quantity=q) for q in QUANTITIES}
    want = run_readings(recs, content['epochs'])
    table, despite = ({r['arm']: r for r in study_table(out, d)} for d in (False, True))
    for name in READINGS:
        assert despite['naive_bn@1e+30'][name] == pytest.approx(want[name], nan_ok=True), name
        np.testing.assert_equal(despite['naive_bn'][name], table['naive_bn'][name])
    assert table['naive_bn@1e+30']['final_train'] == np.inf != despite['naive_bn@1e+30']['final_train']


def test_an_arm_that_does_not_learn_has_not_diverged(tiny, tmp_path):
    out = run_study(tmp_path/'x', **{**tiny, 'arms': 'naive_bn_lr0'})
    run = load_runs(out)['naive_bn_lr0'][0]
    assert run['epochs'][-1]['train_loss'] > .6 and run['diverged'] == '' and run['readings']['farthest'] == 0


def test_the_best_rate_has_the_highest_mean_and_the_smaller_factor_at_a_draw():
    from fastai_bnstats.study.sweep import best_rates
    nan = float('nan')
    scores = dict(a={.1: [.9, .7], 1.: [.8, .9], 3.: [.5]}, b={.3: [.9], 1.: [.9]}, c={.1: [nan], 1.: [.2]})
    assert best_rates(scores) == dict(a=1, b=.3, c=1)


def test_a_result_is_small_and_says_what_it_is(plain):
    for f in plain.rglob('result.json'):
        run = json.loads(f.read_text())
        assert f.stat().st_size < 20_000 and run['data'] == json.loads((plain/'study.json').read_text())['about']['digest']
        assert run['threads'] == 1 and run['seconds'] > 0 and run['args']['epochs']['naive'] == 1 and len(run['body']) == 64
        assert len(run['losses'].split()) == 2 and 'NaN' not in f.read_text() and 'Infinity' not in f.read_text()


@pytest.mark.slow
def test_the_losses_of_a_long_run_are_left_out_of_its_result(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, 'MAX_RESULT', 100)
    out = run_study(tmp_path/'x', **tiny)
    assert json.loads((out/'source0/seed0/naive_bn/result.json').read_text())['losses'] == ''


@pytest.mark.slow
def test_other_images_are_refused(tiny, tmp_path):
    root = tmp_path/'data'
    shutil.copytree(tiny['target'], root)
    out = run_study(tmp_path/'out', **{**tiny, 'target': root})
    image = next(root.rglob('*.png'))
    shutil.copy(next(f for f in root.rglob('*.png') if f.read_bytes() != image.read_bytes()), image)
    with pytest.raises(ValueError, match='These are not the images of .*study.json: their digest was .*, now it is .*Pass the folders'):
        run_study(out, **{**tiny, 'target': root})


def test_a_study_can_be_continued_with_moved_images_and_does_not_say_where_they_were(tiny, tmp_path, capsys):
    src = tmp_path/'here/src'
    shutil.copytree(tiny['source'], src)
    next(src.rglob('*.png')).with_suffix('.jpg').write_bytes(b'broken')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', SkippedImages)
        out = run_study(tmp_path/'out', **{**tiny, 'source': src})
        written = ''.join(f.read_text() for f in out.rglob('*.json'))
        assert str(tmp_path) not in written and str(tiny['target']) not in written
        assert '"source": "src"' in written and '"folder": "src"' in written
        moved = src.rename(tmp_path/'there')
        run_study(out, **{**tiny, 'source': moved})
    assert 'Already there, skipped: pretrained, naive_bn (seed 0)' in capsys.readouterr().out


def test_a_run_without_its_recordings_is_finished(plain, tiny, tmp_path, capsys):
    out = copy_of(plain, tmp_path/'copy')
    for f in out.rglob('*.npz'):
        if 'pretrained' not in str(f): f.unlink()
    run_study(out, sources=2, aa=True, **tiny)
    assert 'Not whole' not in capsys.readouterr().out and not list(out.glob('source*/seed*/*/*.npz'))


def test_a_source_without_its_weights_is_trained_again_if_a_run_needs_it(plain, tiny, tmp_path, capsys):
    out = copy_of(plain, tmp_path/'copy')
    for f in (*out.rglob('*.npz'), *out.rglob('*.pth')): f.unlink()
    run_study(out, sources=2, aa=True, **tiny)
    assert 'Not whole' not in capsys.readouterr().out
    shutil.rmtree(run_dir(out, 'naive_bn', 1, 0))
    run_study(out, sources=2, aa=True, **tiny)
    assert 'pretrained (source 0): its weights are missing' in capsys.readouterr().out
    same(copy_of(run_dir(plain, 'naive_bn', 1, 0).parent, tmp_path/'a'), run_dir(out, 'naive_bn', 1, 0).parent)


def test_names_of_arms():
    assert runner.parse_arms(None) == list(POST_ARMS) and len(POST_ARMS) == 5
    assert runner.parse_arms('naive_bn, grid') == ['naive_bn', *GRID] and runner.parse_arms('freeze,grid,freeze') == list(GRID)
    assert runner.parse_arms(['grid', 'naive_bn']) == [*GRID, 'naive_bn']
    assert runner.parse_arms('post,controls') == [*POST_ARMS, *CONTROLS]
    with pytest.raises(ValueError, match="Unknown arm 'gird'.*grid stands for freeze, freeze_hold"): runner.parse_arms('gird')


def test_as_many_jobs_as_cores_but_one_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jobs.joblib, 'cpu_count', lambda: 8)
    assert [jobs.jobs_at_a_time(n) for n in (1, 3, 16)] == [8, 2, 1]
    monkeypatch.setattr(jobs, 'default_device', lambda: torch.device('cuda'))
    assert jobs.jobs_at_a_time(1) == 1


@pytest.mark.parametrize('threads', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_has_its_threads_whatever_the_process_has(plain, tiny, tmp_path, threads):
    was = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        out = run_study(tmp_path/'out', threads=threads, **tiny)
        assert torch.get_num_threads() == 3
    finally: torch.set_num_threads(was)
    assert {json.loads(f.read_text())['threads'] for f in out.rglob('result.json')} == {threads}
    if threads == 1: same(run_dir(plain, 'naive_bn').parent, run_dir(out, 'naive_bn').parent)


def test_a_study_from_before_the_option_has_one_thread(plain, tiny, tmp_path):
    out = copy_of(plain, tmp_path/'copy')
    for f in (out/'study.json', *out.rglob('result.json')):
        content = json.loads(f.read_text())
        del content['args']['threads']
        f.write_text(json.dumps(content))
    run_study(out, **{**tiny, 'arms': 'freeze'})
    assert list(load_runs(out)) == ['pretrained', 'naive_bn', 'freeze']
    with pytest.raises(ValueError, match='threads was 1, now 2'): run_study(out, threads=2, **tiny)


def test_a_worker_does_not_repeat_the_warning_about_broken_images(tmp_path):
    src, tgt = folder(tmp_path/'src', n=8), folder(tmp_path/'tgt', n=8)
    next(src.rglob('*.png')).write_bytes(b'broken')
    job = jobs.Job(str(tmp_path), 'pretrained', 0, 0, dict(size=8, bs=4), 'x', ('folders', str(src), str(tgt)), 'call')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data = jobs.job_data(job)
    assert len(data.about['source']['skipped']) == 1 and jobs.job_data(job) is data
    jobs.DATA_CACHE.clear()


@pytest.mark.slow
def test_the_command_lists_all_its_options():
    printed = subprocess.run(['bnstats-study', '--help'], capture_output=True, text=True, check=True).stdout
    for o in ('jobs', 'backend', 'scheduler', 'sources', 'aa', 'arms', 'seeds', 'paired-sources', 'lr-sweep'): assert f'--{o}' in printed
    for w in ('loky', 'threading', 'dask', 'tcp://HOST:8786', 'post', 'grid', 'controls', *POST_ARMS, *GRID, *CONTROLS): assert w in printed


def test_an_arm_is_trained_by_its_optimizer(tiny, tmp_path):
    out = run_study(tmp_path/'x', **{**tiny, 'arms': 'naive_bn,naive_bn_sgd'})
    recs = {a: seeds[0] for a, seeds in load_study(out).items()}
    adam, sgd = recs['naive_bn'], recs['naive_bn_sgd']
    assert sgd.loss[0] == adam.loss[0] and sgd.loss[1] != adam.loss[1]
    assert sgd.lr.max() == pytest.approx(10*adam.lr.max())
    learn = [new_learner(data_maker('', tiny['source'], tiny['target'])(size=8, bs=4).target, new_model(2), opt=o) for o in ('adam', 'sgd')]
    steps = [l.opt_func([nn.Parameter(torch.ones(2))], lr=1).cbs for l in learn]
    assert [s[-1].__name__ for s in steps] == ['adam_step', 'momentum_step']
