"""One progress bar follows runs in any process"""
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import warnings

import pytest
from helpers import tiny_learner

from fastai.basics import accuracy
from fastai_bnstats.study import progress
from fastai_bnstats.study.progress import StudyProgress, WriteProgress, read_progress
from fastai_bnstats.study.results import progress_file

LINE = '{} epoch {}/2: smoothed loss 0.5, validation 0.6, accuracy 0.7'


def write(run, text):
    run.mkdir(exist_ok=True)
    progress_file(run).write_text(text)


def test_a_run_writes_a_dot_for_each_step_and_a_line_for_each_epoch(tmp_path):
    learn = tiny_learner(metrics=accuracy)
    for phase in ('freeze', 'unfreeze'): learn.fit(2, cbs=WriteProgress(progress_file(tmp_path), phase))
    train, valid, acc = learn.recorder.values[-1]
    learn.validate()
    steps, epochs = read_progress(tmp_path)
    assert steps == 4*len(learn.dls.train)
    assert [e.split(':')[0] for e in epochs] == ['freeze epoch 1/2', 'freeze epoch 2/2', 'unfreeze epoch 1/2', 'unfreeze epoch 2/2']
    assert epochs[-1].endswith(f': smoothed loss {train:.3f}, validation {valid:.3f}, accuracy {acc:.3f}')


def test_training_goes_on_if_the_file_cannot_be_written(tmp_path):
    learn = tiny_learner(metrics=accuracy)
    learn.fit(1, cbs=WriteProgress(tmp_path/'missing'/'progress.txt', 'x'))
    assert len(learn.recorder.values) == 1 and read_progress(tmp_path) == (0, [])


def test_the_attempt_that_got_farthest_counts(tmp_path):
    run = tmp_path/'naive_bn'
    assert read_progress(run) == (0, [])
    write(tmp_path/'naive_bn.1.partial', '..')
    write(tmp_path/'naive_bn.2.partial', f'... {LINE.format("naive", 1)}\n..')
    write(tmp_path/'naive_bn_lr0.3.partial', '.........')
    assert read_progress(run) == (5, [LINE.format('naive', 1)])
    write(run, f'... {LINE.format("naive", 1)}\n... {LINE.format("naive", 2)}\n')
    assert read_progress(run) == (6, [LINE.format('naive', e) for e in (1, 2)])


def test_each_epoch_is_a_line_in_a_log_once(tmp_path, capsys):
    run = tmp_path/'naive_bn'
    with StudyProgress({run: ('naive_bn, seed 3', 6)}, every=1e6) as p:
        write(tmp_path/'naive_bn.1.partial', f'... {LINE.format("naive", 1)}\n.')
        for _ in range(3): p.look()
        assert p.runs[run].steps == 4
        (tmp_path/'naive_bn.1.partial').rename(run)
        write(run, f'... {LINE.format("naive", 1)}\n... {LINE.format("naive", 2)}\n')
        p.finish(run, '[1/1] naive_bn, seed 3', .7)
    lines = [re.sub(r' · \d+ (s|min) left$', '', l) for l in capsys.readouterr().out.splitlines()]
    assert lines == [*(f'naive_bn, seed 3 · {LINE.format("naive", e)}' for e in (1, 2)), '[1/1] naive_bn, seed 3: accuracy 0.700']


def test_time_left(monkeypatch, tmp_path):
    now = [100.]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    p = StudyProgress({tmp_path/'a': ('a', 30), tmp_path/'b': ('b', 10)})
    now[0] += 20
    write(tmp_path/'a', '.'*5)
    write(tmp_path/'b', '.'*5)
    p.look()
    assert p.left == '60 s left'
    now[0] += 20
    assert p.left == '2 min left'


BAR = """
from pathlib import Path
from fastai_bnstats.study.progress import StudyProgress
from fastai_bnstats.study.results import progress_file
runs = {Path(d): (d, 10) for d in ('naive_bn', 'freeze')}
with StudyProgress(runs, every=1e6) as p:
    for d in runs: d.mkdir(); progress_file(d).write_text('.....')
    p.look()
    p.finish(Path('naive_bn'), '[1/2] naive_bn', .9)
"""


@pytest.mark.slow
def test_a_terminal_has_one_bar_and_no_lines_of_epochs(tmp_path):
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 100, 0, 0))
    with subprocess.Popen([sys.executable, '-W', 'ignore', '-c', BAR], cwd=tmp_path, stdout=its, stderr=its):
        os.close(its)
        shown = b''
        while True:
            try: part = os.read(ours, 10000)
            except OSError: break # the other end is closed
            if not part: break
            shown += part
    os.close(ours)
    shown = shown.decode()
    assert '50%' in shown and '75%' in shown and '10/20' in shown and ', naive_bn, freeze]' in shown and '<' in shown # time left
    assert shown.count('[1/2] naive_bn: accuracy 0.900') == 1 and 'epoch' not in shown


def test_nothing_is_drawn_and_no_thread_stays_for_a_study_that_is_done():
    with warnings.catch_warnings(), StudyProgress({}) as p: warnings.simplefilter('error')
    assert p.bar is None and not p.thread.is_alive()
