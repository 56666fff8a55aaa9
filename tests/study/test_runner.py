"""Parallel runs give the bits of one process, even if workers are killed"""
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings

import psutil
import pytest
import torch
from fastai.basics import set_seed
from test_data import folder

from fastai_bnstats.recording import Recording
from fastai_bnstats.study import ARMS, GRID, POST_ARMS, PRETRAIN, dask, jobs, load_runs, new_model, run_study, runner, train_arm
from fastai_bnstats.study.data import data_maker
from fastai_bnstats.study.results import run_dir, run_file, temporary_folder

TINY = dict(epochs='1,1,1,1', bs=4, size=8, arms='naive_bn')
MAIN = """if __name__ == '__main__':
    from fastai_bnstats.study import runner
    runner.write_report = lambda out: None # slower than the runs
    runner.bnstats_study()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "One thread, because bits depend on the number of threads; no report, because test_report tests it"
    was = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.setattr(runner, 'write_report', lambda out: None)
    yield
    torch.set_num_threads(was)


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Eight training images, two steps per epoch"
    root = tmp_path_factory.mktemp('data')
    return dict(TINY, source=folder(root/'src', n=4), target=folder(root/'tgt', n=4))


@pytest.fixture(scope='module')
def plain(tiny, tmp_path_factory):
    "A study in one process: two sources, naive_bn with one seed and another one as control"
    out = tmp_path_factory.mktemp('plain')/'out'
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(runner, 'write_report', lambda out: None)
        return run_study(out, sources=2, aa=True, **tiny)


def files(out): return sorted(str(p.relative_to(out)) for p in out.rglob('*') if p.is_file())


def same(a, b, only=''):
    fs = [f for f in files(a) if f.startswith(only)]
    assert fs == [f for f in files(b) if f.startswith(only)] and len(fs) > 4
    for f in fs:
        if f.endswith('.npz'): assert Recording.load(a/f).is_same(Recording.load(b/f)), f
        if f.endswith('run.json'):
            x, y = (json.loads((o/f).read_text()) for o in (a, b))
            assert {**x, 'seconds': 0} == {**y, 'seconds': 0}
        if f.endswith('.pth'):
            s, t = (torch.load(o/f, weights_only=True) for o in (a, b))
            assert all(s[k].equal(t[k]) for k in s)


def command(tmp_path, **kwargs):
    (tmp_path/'main.py').write_text(MAIN)
    args = [str(x) for k, v in kwargs.items() for x in ((f'--{k}',) if v is True else (f'--{k}', v))]
    command = [sys.executable, '-W', 'ignore', str(tmp_path/'main.py'), *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(found, seconds=120):
    end = time.monotonic()+seconds
    while not found() and time.monotonic() < end: time.sleep(.02)
    return found()


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
    "Source 0 has the seeds of a study with one source"
    data, epochs = data_maker('', tiny['source'], tiny['target'])(size=8, bs=4), dict(source=1)
    set_seed(0, reproducible=True)
    rec = train_arm(PRETRAIN, new_model(2), data.source, epochs, (0,))[0]['weights']
    assert rec.is_same(Recording.load(plain/'source0/pretrained/weights.npz'))
    set_seed(1, reproducible=True)
    other = train_arm(PRETRAIN, new_model(2), data.source, epochs, (2, 1))[0]['weights']
    assert other.is_same(Recording.load(plain/'source1/pretrained/weights.npz'))


def test_two_processes_give_the_bits_of_one(plain, tiny, tmp_path, capsys):
    out = run_study(tmp_path/'out', sources=2, aa=True, jobs=2, **tiny)
    same(plain, out)
    printed = capsys.readouterr().out
    for text in ('pretrained, source 1: accuracy', '[4/4] ', 'naive_bn, seed 1, source 0: accuracy 0.', ' left'): assert text in printed
    run_study(out, sources=2, aa=True, jobs=2, **tiny)
    assert 'skipped: pretrained (source 0), pretrained (source 1), naive_bn (seed 0, source 0)' in capsys.readouterr().out


def test_threads_of_a_process_take_turns(plain, tiny, tmp_path):
    out = run_study(tmp_path/'out', backend='threading', jobs=2, aa=True, **tiny)
    same(plain, out, 'source0')


def test_a_killed_worker_ends_the_study_and_the_same_command_finishes_it(plain, tiny, tmp_path, capsys):
    out = tmp_path/'out'
    p = command(tmp_path, out=out, jobs=2, aa=True, **tiny)
    assert wait_for(lambda: list(out.glob('source0/seed0/*.partial')))
    os.kill(workers(p.pid)[0].pid, signal.SIGKILL)
    _, err = p.communicate(timeout=120)
    assert p.returncode == 1 and 'Traceback' not in err and 'bnstats-study: A worker was killed during a run' in err
    assert f'try fewer --jobs. Finished runs are kept in {out}; repeat the same command for the rest.' in err
    assert (out/'source0/pretrained/run.json').exists() and list(out.rglob('*.partial'))
    run_study(out, aa=True, **tiny)
    assert 'Already there, skipped: pretrained' in capsys.readouterr().out
    same(plain, out, 'source0')
    assert not list(out.rglob('*.partial'))


def test_ctrl_c_leaves_no_worker(tiny, tmp_path):
    out = tmp_path/'out'
    p = command(tmp_path, out=out, jobs=2, **{**tiny, 'epochs': '99,1,1,1'})
    assert wait_for(lambda: list(out.glob('source0/*.partial')))
    ws = workers(p.pid)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and f'Interrupted. Finished runs are kept in {out}' in err and 'Traceback' not in err
    assert ws and wait_for(lambda: not any(map(is_alive, ws)), 10)


def test_an_error_in_a_job_is_raised_unchanged(plain, tiny, tmp_path):
    import shutil
    out = tmp_path/'copy'
    shutil.copytree(plain, out)
    f = out/'source0/pretrained/body.pth'
    f.write_bytes(f.read_bytes()[:90])
    with pytest.raises(ValueError, match="body.pth can't be read.*Delete .*pretrained and repeat"):
        run_study(out, jobs=2, **{**tiny, 'arms': 'freeze'})


def test_dask_gives_the_same_bits_although_a_worker_dies(plain, tiny, tmp_path, capsys):
    from distributed import LocalCluster
    out, subprocesses = tmp_path/'out', []
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        def kill():
            if not wait_for(lambda: list(out.glob('source0/seed0/*.partial')), 300): return # imports are slow on a busy machine
            busy = next(w for w in cluster.workers.values() if psutil.Process(w.pid).children())
            subprocesses.extend(psutil.Process(busy.pid).children())
            os.kill(busy.pid, signal.SIGKILL)
        t = threading.Thread(target=kill)
        t.start()
        run_study(out, backend='dask', scheduler=cluster.scheduler_address, aa=True, **tiny)
        t.join()
    assert subprocesses and wait_for(lambda: not any(map(is_alive, subprocesses)), 10)
    assert '[2/2] ' in capsys.readouterr().out
    same(plain, out, 'source0')
    assert not list(out.rglob('*.partial'))


def test_refusals(tmp_path, monkeypatch):
    def no(text, error=ValueError, **kwargs):
        with pytest.raises(error, match=text): run_study(tmp_path/'x', **{**TINY, **kwargs})
        assert not (tmp_path/'x').exists()
    no('--jobs must be at least 1. Found 0', jobs=0)
    no('--sources must be at least 1. Found 0', sources=0)
    no("Unknown backend 'multiprocessing'. Expected one of loky, threading, dask", backend='multiprocessing')
    no('--scheduler goes with --backend dask. Found --backend loky', backend='loky', scheduler='tcp://h:1')
    no('--backend dask needs --scheduler .*dask scheduler.*dask worker tcp://HOST:8786 --nthreads 1', backend='dask')
    no('--aa compares naive_bn with itself.*freeze, freeze_hold, .*Add it to --arms', aa=True, arms='grid')
    start = time.monotonic()
    no('No Dask scheduler answers at tcp://127.0.0.1:9 .*dask scheduler', ConnectionError, backend='dask', scheduler='tcp://127.0.0.1:9')
    assert time.monotonic()-start < 15
    monkeypatch.setitem(sys.modules, 'distributed', None)
    no(r"pip install 'fastai_bnstats\[dask\]'", backend='dask', scheduler='tcp://127.0.0.1:9')


def test_a_scheduler_without_workers(tmp_path):
    from distributed import LocalCluster
    with LocalCluster(n_workers=0, processes=False, dashboard_address=None) as c:
        with pytest.raises(ConnectionError, match='has no workers. Start some.*--nthreads 1'):
            run_study(tmp_path/'x', backend='dask', scheduler=c.scheduler_address, **TINY)


def test_dask_is_imported_only_when_it_is_used(tmp_path):
    code = "import sys, fastai_bnstats.study.runner; print(sorted({'dask', 'distributed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_workers_must_see_the_folder(tmp_path, monkeypatch):
    job = jobs.Job(str(tmp_path/'gone'), 'pretrained', 0, 0, {}, ('digits', None, None), 'x')
    with pytest.raises(FileNotFoundError, match='does not see .*gone. All workers must see .*under the same path'): jobs.run_job(job)
    monkeypatch.setattr(jobs, 'run_job', lambda job, threads=None: (job, {}))
    monkeypatch.setattr(jobs, '_becomes_visible', lambda run, f=jobs._becomes_visible: f(run, patience=.1))
    with pytest.raises(FileNotFoundError, match="has finished .*pretrained, but it can't be seen here. All workers must see"):
        run_study(tmp_path/'x', backend='threading', jobs=2, **TINY)


def test_errors_in_a_subprocess_and_its_death_are_reported(tmp_path, monkeypatch):
    job = jobs.Job(str(tmp_path/'gone'), 'pretrained', 0, 0, {}, ('digits', None, None), 'x')
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


def test_names_of_arms():
    assert runner.parse_arms(None) == list(POST_ARMS) and len(POST_ARMS) == 5
    assert runner.parse_arms('naive_bn, grid') == ['naive_bn', *GRID] and runner.parse_arms('freeze,grid,freeze') == list(GRID)
    assert runner.parse_arms(['grid', 'naive_bn']) == [*GRID, 'naive_bn']
    with pytest.raises(ValueError, match="Unknown arm 'gird'.*grid stands for freeze, freeze_hold"): runner.parse_arms('gird')


def test_threads_of_each_process(monkeypatch):
    monkeypatch.setattr(jobs.joblib, 'cpu_count', lambda: 8)
    monkeypatch.setattr(jobs.torch, 'get_num_threads', lambda: 3)
    assert [jobs.threads_per_job(n) for n in (2, 4, 16)] == [3, 2, 1]


def test_a_worker_does_not_repeat_the_warning_about_broken_images(tmp_path):
    src, tgt = folder(tmp_path/'src', n=8), folder(tmp_path/'tgt', n=8)
    next(src.rglob('*.png')).write_bytes(b'broken')
    job = jobs.Job(str(tmp_path), 'pretrained', 0, 0, dict(size=8, bs=4), ('folders', str(src), str(tgt)), 'call')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        data = jobs.job_data(job)
    assert len(data.about['source']['skipped']) == 1 and jobs.job_data(job) is data
    jobs.DATA_CACHE.clear()


def test_the_command_lists_all_its_options():
    printed = subprocess.run(['bnstats-study', '--help'], capture_output=True, text=True, check=True).stdout
    for o in ('jobs', 'backend', 'scheduler', 'sources', 'aa', 'arms', 'seeds'): assert f'--{o}' in printed
    for w in ('loky', 'threading', 'dask', 'tcp://HOST:8786', 'grid', *ARMS): assert w in printed
