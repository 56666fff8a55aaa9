"""Importing the library changes nothing in fastai"""
import json
from pathlib import Path

import pytest
from forks import code, run, script
from import_scenarios import SCENARIOS

HERE = Path(__file__).parent
PATCHED = {'freeze_to', 'unfreeze'} # they also end a policy of this library; without one, they call fastai's at once


@pytest.fixture(scope='module')
def runs():
    "What each scenario did in fastai alone, and with this library imported"
    return [json.loads(run(script, HERE/'import_scenarios.py', *args).stdout.splitlines()[-1]) for args in ([], ['ours'])]


@pytest.mark.parametrize('name', SCENARIOS)
def test_fastai_does_the_same_with_and_without_the_library(name, runs):
    plain, ours = (r['scenarios'][name] for r in runs)
    for what in plain: assert ours[what] == plain[what], what


def test_the_scenarios_raise_and_train(runs):
    "Otherwise the comparison above would compare little"
    plain = runs[0]['scenarios']
    assert sum(bool(r['exceptions']) for r in plain.values()) >= 7
    trainable = plain['fine_tune with adapters']['trainable']
    assert not trainable['0.base.weight'] and trainable['0.up.weight']


@pytest.mark.parametrize('ours', ['all', 'freeze', 'record', 'study'])
def test_a_new_learner_gets_the_callbacks_of_fastai(ours):
    "fastai.callback.progress, and modules that import it, give every new Learner a progress bar"
    text = f"""
import warnings; warnings.simplefilter('ignore')
from fastai.basics import *
before = [*defaults.callbacks]
import fastai_bnstats.{ours}
print(before == defaults.callbacks, defaults.callbacks)"""
    p = run(code, text)
    assert p.stdout.startswith('True'), p


def test_only_names_are_added_to_the_classes_of_fastai(runs):
    plain, ours = (r['classes'] for r in runs)
    for cls, names in plain.items():
        changed = {n for n, place in names.items() if ours[cls].get(n) != place}
        assert changed == (PATCHED if cls == 'fastai.learner.Learner' else set()), cls
    added = {n for n in ours['fastai.learner.Learner'] if n not in plain['fastai.learner.Learner']}
    calls = {'freeze_policy', 'freeze_body', 'freeze_non_bn', 'freeze_non_bias', 'freeze_except', 'freeze_all', 'recalibrate_bn',
             'fit_schedule'}
    assert added == calls | {'_orig_unfreeze'} # fastcore's `patch` keeps fastai's method there
    assert not {n for cls in plain for n in ours[cls] if n not in plain[cls]}-added
