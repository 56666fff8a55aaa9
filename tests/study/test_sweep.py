"""The sweep of learning rates, from its result files"""
import json
import math

import pytest

from fastai_bnstats.study.sweep import best_rates, epochs_until, is_complete, sweep_epochs, sweep_runs, sweep_scores
from fastai_bnstats.study.arms import LR_FACTORS, SWEEP_SEEDS
from fastai_bnstats.study.results import run_dir, run_file, sweep_dir

ACCURACIES = { # arm -> seed -> validation accuracy after each epoch
    'naive_bn@1': {100: [.2, .3, .4, .5], 101: [.1, .2, .3, .2]}, 'naive_bn@0.1': {100: [.1, .1, .2, .2], 101: [.3, .1, .1, .1]},
    'freeze@3': {100: [.1]*5+[.4, .3], 101: [.1]*5+[.2, .31]}}


@pytest.fixture
def study(tmp_path):
    for arm, seeds in ACCURACIES.items():
        for s, accs in seeds.items():
            epochs = [dict(phase='x', epoch=i, train_loss=1., valid_loss=1., accuracy=a) for i, a in enumerate(accs)]
            content = dict(arm=arm, seed=s, source=s, what='', epochs=epochs, readings={}, diverged='', losses='', data='', body='',
                           args={}, versions={}, threads=1, seconds=1.)
            f = run_file(run_dir(sweep_dir(tmp_path), arm, s, s))
            f.parent.mkdir(parents=True)
            f.write_text(json.dumps(content))
    return tmp_path


def test_runs_of_the_sweep(study):
    assert {a: {f: [*by] for f, by in factors.items()} for a, factors in sweep_runs(study).items()} == {
        'naive_bn': {.1: [100, 101], 1: [100, 101]}, 'freeze': {3: [100, 101]}}
    scores = sweep_scores(sweep_runs(study))
    assert scores == {'naive_bn': {.1: [.2, .1], 1: [.5, .2]}, 'freeze': {3: [.3, .31]}}
    assert best_rates(scores) == dict(naive_bn=1, freeze=3)


def test_epochs_until_the_accuracy_of_the_reference(study):
    "naive_bn has .4 after three epochs with seed 100, and .3 with seed 101"
    assert sweep_epochs(sweep_runs(study)) == {
        'naive_bn': {.1: {100: math.inf, 101: 1}, 1: {100: 3, 101: 3}}, 'freeze': {3: {100: 6, 101: 7}}}
    assert epochs_until(dict(epochs=[dict(accuracy=float('nan')), dict(accuracy=.5)]), .5) == 2


def test_without_the_reference_nobody_is_compared(study, tmp_path):
    for f in study.rglob('naive_bn@1/result.json'): f.unlink()
    assert sweep_epochs(sweep_runs(study)) == sweep_runs(tmp_path/'nothing') == sweep_epochs({}) == {}


def test_a_sweep_is_complete_with_all_rates_and_seeds():
    runs = {a: {f: {s: {} for s in SWEEP_SEEDS} for f in LR_FACTORS} for a in ('freeze', 'naive_bn')}
    assert is_complete(runs)
    del runs['freeze'][.3][101]
    assert not is_complete(runs)
    del runs['freeze'][.3]
    assert not is_complete(runs) and is_complete(dict(naive_bn=runs['naive_bn']))
