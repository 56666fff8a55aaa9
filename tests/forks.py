"""Processes for tests, forked from one that has imported fastai, because the import takes seconds"""
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context, set_start_method
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

LIMIT = 600 # seconds; far more than anything takes, also on a busy machine
FORKS = get_context('forkserver')
FORKS.set_forkserver_preload(['fastai.basics', 'torchvision', 'timm', 'nbdev.test']) # not this library, which tests import in the child


def _child(folder, cwd, env, f, args):
    import torch
    os.setsid() # as from a terminal of its own: signals for its group reach neither pytest nor other tests
    for fd, name in ((1, 'stdout'), (2, 'stderr')): os.dup2(os.open(Path(folder)/name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    signal.signal(signal.SIGINT, signal.default_int_handler) # `pytest &` ignores it
    set_start_method(None, force=True) # the one of this platform
    os.environ.clear()
    os.environ.update(env, TMPDIR=folder)
    tempfile.tempdir = None # find it again
    os.chdir(cwd)
    torch.set_num_threads(1) # bits depend on it
    f(*args)


@contextmanager
def fork(f, *args, cwd=None):
    "A process that calls `f`; neither it nor its children outlive the test. `printed()` is what it has printed so far"
    with TemporaryDirectory() as folder:
        for name in ('stdout', 'stderr'): (Path(folder)/name).touch()
        p = FORKS.Process(target=_child, args=(folder, cwd or os.getcwd(), dict(os.environ), f, args))
        p.start()
        p.printed = lambda name='stdout': (Path(folder)/name).read_text()
        try: yield p
        finally:
            with suppress(ProcessLookupError): os.killpg(p.pid, signal.SIGKILL)
            p.kill()
            p.join()


def run(f, *args, cwd=None):
    "Call `f` in a process of its own: exit code and what was printed, as `subprocess.run` returns it"
    with fork(f, *args, cwd=cwd) as p:
        p.join(LIMIT)
        return SimpleNamespace(returncode=p.exitcode, stdout=p.printed(), stderr=p.printed('stderr'))


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def _rank(number, n, port, file, args):
    os.environ.update(RANK=f'{number}', LOCAL_RANK=f'{number}', WORLD_SIZE=f'{n}', MASTER_ADDR='127.0.0.1', MASTER_PORT=f'{port}')
    script(file, *args)


def ranks(file, *args, n=2):
    "Run a Python script in `n` processes, as torchrun does: the result of each"
    port = free_port()
    with ExitStack() as stack:
        ps = [stack.enter_context(fork(_rank, i, n, port, file, args)) for i in range(n)]
        for p in ps: p.join(LIMIT)
        return [SimpleNamespace(returncode=p.exitcode, stdout=p.printed(), stderr=p.printed('stderr')) for p in ps]


def wait_for(found, p=None):
    "Wait until `found()` is true, unless the process `p` ends before"
    end = time.monotonic()+LIMIT
    while True:
        goes_on = (p is None or p.is_alive()) and time.monotonic() < end
        if found(): return
        assert goes_on, p and p.printed('stderr')
        time.sleep(.02)


def code(text): exec(text, {'__name__': '__main__'})


def script(file, *args):
    "Run a Python script"
    sys.argv = [str(file), *map(str, args)]
    runpy.run_path(sys.argv[0], run_name='__main__')


def command(name, *args):
    "Run the script that pip has made for a console command"
    script(shutil.which(name), *args)
