"""Results without recordings can be copied, and those of two machines merged"""
import json
import shutil

import pytest
from forks import command, run

from fastai_bnstats.study.merge import copy_results
from fastai_bnstats.study.results import load_runs, run_dir, run_file, study_about, study_file, write_json
from fastai_bnstats.study.verdicts import judge_study, missing_runs, study_table

EPOCHS = dict(source=1, naive=1, freeze=1, unfreeze=1)
ARGS = dict(data='digits', source=None, target=None, epochs=EPOCHS, size=8, bs=4, paired_sources=False)
IMAGES = dict(classes=['a', 'b'], train=8, valid=4)


def made(folder, runs, args=ARGS, digest='d1', body='b', **facts):
    "A folder with results of `runs`, (arm, seed) -> odds of an error"
    names = sorted({a for a, _ in runs if a != 'pretrained'})
    about = dict(format=3, args=args, arms={n: {} for n in ('naive_bn', 'freeze')}, names=names, versions={},
                 seeds=1+max(s for _, s in runs), sources=1, aa=None,
                 about=dict(name='digits', size=8, bs=4, digest=digest, source=IMAGES, target=IMAGES))
    folder.mkdir(parents=True)
    write_json(study_file(folder), about)
    for (arm, seed), odds in runs.items():
        d = run_dir(folder, arm, seed)
        d.mkdir(parents=True)
        epoch = dict(phase='x', epoch=0, train_loss=.5, valid_loss=.5, accuracy=.9)
        write_json(run_file(d), dict(arm=arm, seed=seed, source=0, what='', diverged='', epochs=[epoch], readings=dict(error_odds=odds),
                                     losses='0.5', args=args, data=digest, body=body, versions={}, threads=1, seconds=1., **facts))
    return folder


A = {('pretrained', 0): None, ('naive_bn', 0): .1, ('naive_bn', 1): .2}
B = {('pretrained', 0): None, ('naive_bn', 1): .2, ('naive_bn', 2): .3, ('freeze', 2): .4}


def test_results_are_copied_without_recordings(tmp_path):
    a = made(tmp_path/'a', A)
    (run_dir(a, 'naive_bn')/'weights.npz').write_text('large')
    assert copy_results(a, tmp_path/'b') == 3 and copy_results(a, tmp_path/'b') == 0
    assert load_runs(tmp_path/'b') == load_runs(a) and not list(tmp_path.glob('b/**/*.npz'))
    assert study_file(tmp_path/'b').read_text() == study_file(a).read_text()


def test_results_of_two_machines_make_one_study(tmp_path):
    a, b = made(tmp_path/'a', A), made(tmp_path/'b', B)
    assert copy_results(b, a) == 2
    about = json.loads(study_file(a).read_text())
    assert about['seeds'] == 3 and about['names'] == ['naive_bn', 'freeze']
    assert {arm: list(s) for arm, s in load_runs(a).items()} == {'pretrained': [0], 'naive_bn': [0, 1, 2], 'freeze': [2]}
    assert judge_study(a)[0].verdict == ''


def test_arms_with_a_learning_rate_of_their_own_are_merged_too(tmp_path):
    b = made(tmp_path/'b', {('pretrained', 0): None, ('naive_bn@0.3', 0): .4, ('freeze', 0): .3})
    about = json.loads(study_file(b).read_text())
    write_json(study_file(b), {**about, 'arms': {**about['arms'], 'naive_bn@0.3': dict(bn='keep')}})
    a = made(tmp_path/'a', A)
    assert copy_results(b, a) == 2
    about = json.loads(study_file(a).read_text())
    assert about['names'] == ['naive_bn@0.3', 'naive_bn', 'freeze'] and {*about['arms']} == {*about['names']}
    assert (0, 1, 'naive_bn@0.3') in missing_runs(study_about(a), study_table(a)) # seed 1 has it nowhere


def test_the_images_may_lie_in_other_folders(tmp_path):
    a = made(tmp_path/'a', A, dict(ARGS, source='/x', target='/y'))
    assert copy_results(made(tmp_path/'b', B, dict(ARGS, source='/z', target='/w')), a) == 2


REFUSED = {
    'arguments': (dict(args=dict(ARGS, bs=8)), 'hold studies with other arguments: bs is 4 and 8. Only results of one study can be merged'),
    'sources': (dict(args=dict(ARGS, paired_sources=True)), 'paired_sources is False and True'),
    'design': (dict(args=dict(ARGS, design='abc')), "design is '' and 'abc'"),
    'images': (dict(digest='d2'), 'have other images: their digests are d1 and d2. Only results of one study'),
    'start': (dict(body='c'), 'The runs of source0 start from different weights in the two studies. A source must be pretrained once')}


@pytest.mark.parametrize('change, text', REFUSED.values(), ids=REFUSED)
def test_another_study_is_refused_and_nothing_is_written(tmp_path, change, text):
    a, b = made(tmp_path/'a', A), made(tmp_path/'b', {('freeze', 2): .4}, **change)
    before = {f: f.read_bytes() for f in a.rglob('*') if f.is_file()}
    with pytest.raises(ValueError, match=text): copy_results(b, a)
    assert before == {f: f.read_bytes() for f in a.rglob('*') if f.is_file()}


def test_two_results_for_one_run_are_refused_unless_they_agree(tmp_path):
    a, b = made(tmp_path/'a', A), made(tmp_path/'b', {**B, ('naive_bn', 1): .25})
    with pytest.raises(ValueError, match='naive_bn/result.json exists, with another result. Delete the folder of one of the two runs'):
        copy_results(b, a)
    f = run_file(run_dir(b, 'naive_bn', 1))
    write_json(f, {**json.loads(f.read_text()), 'readings': dict(error_odds=.2), 'seconds': 9.})
    assert copy_results(b, a) == 2 # the time that it took does not count


@pytest.mark.parametrize('fact, value', [('epochs', [dict(phase='x', epoch=0, train_loss=.5, valid_loss=.5, accuracy=.8)]),
                                         ('losses', '0.6'), ('diverged', 'the loss is not finite'), ('body', 'c')])
def test_every_fact_of_a_result_counts(tmp_path, fact, value):
    a, b = made(tmp_path/'a', A), made(tmp_path/'b', {('naive_bn', 1): .2})
    f = run_file(run_dir(b, 'naive_bn', 1))
    write_json(f, {**json.loads(f.read_text()), fact: value})
    with pytest.raises(ValueError, match='naive_bn/result.json exists, with another result'): copy_results(b, a)


def test_the_control_and_the_sweep_are_merged_too(tmp_path):
    a, b = made(tmp_path/'a', A), made(tmp_path/'b', B)
    write_json(study_file(b), {**json.loads(study_file(b).read_text()), 'aa': 2})
    made(b/'sweep', {('naive_bn', 0): .1})
    assert copy_results(b, a) == 3 and json.loads(study_file(a).read_text())['aa'] == 2
    assert list(load_runs(a/'sweep')) == ['naive_bn'] and study_file(a/'sweep').exists()


def test_runs_of_one_source_that_start_from_different_weights_are_refused_when_read(tmp_path):
    a, b = made(tmp_path/'a', A), made(tmp_path/'b', B, body='c')
    shutil.copytree(run_dir(b, 'freeze', 2), run_dir(a, 'freeze', 2))
    text = 'The runs of source 0 in .* start from different weights: .*Delete the folders of one kind'
    with pytest.raises(ValueError, match=text): load_runs(a)


def without_figures(*args):
    from fastai_bnstats.study import report
    report.draw_figures = report.draw_overview = lambda folder: None # test_report draws them
    command(*args)


def test_the_command_merges_and_copies(study, tmp_path):
    out = shutil.copytree(study, tmp_path/'out')
    other = shutil.copytree(out, tmp_path/'other')
    shutil.rmtree(run_dir(out, 'freeze'))
    p = run(without_figures, 'bnstats-report', out, '--merge', other, '--results', tmp_path/'kept')
    assert p.returncode == 0, p.stderr
    assert '1 results added from' in p.stdout and '6 results copied to' in p.stdout and '`freeze`' in (out/'report.md').read_text()
    assert sorted(p.suffix for p in (tmp_path/'kept').rglob('*.*')) == ['.json']*7
    (tmp_path/'x').mkdir()
    p = run(command, 'bnstats-report', out, '--merge', tmp_path/'x')
    assert p.returncode == 1 and 'Traceback' not in p.stderr and 'holds no study' in p.stderr

