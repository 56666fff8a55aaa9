"""A study can be repeated and resumed, refuses wrong arguments, and its arms train as declared"""
import ast
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.basics import Callback, nn, set_seed
from test_data import folder

import fastai_bnstats
from fastai_bnstats.freeze import count_bn
from fastai_bnstats.record import select_tensors
from fastai_bnstats.recording import Recording, full_counts
from fastai_bnstats.study import ARMS, GRID, POST_ARMS, digits, load_runs, load_study, new_learner, new_model, run_study, train_arm
from fastai_bnstats.study import image_folders, train
from fastai_bnstats.study.arms import CONTROLS, RATE_CONTROLS, SGD_ARMS, arm_of, arm_order, times_lr
from fastai_bnstats.study.jobs import _start_model
from fastai_bnstats.study.report import write_report
from fastai_bnstats.study.results import body_file, edges_file, recording_file, run_dir, run_file, study_about, study_file, write_json
from fastai_bnstats.study.runner import parse_epochs
from forks import LIMIT, command, fork, run, wait_for
from helpers import SMALL


RUN = dict(arm='naive_bn', seed=0, source=0, what='', seconds=1., args={}, versions={}, threads=1, data='', body='', diverged='', losses='',
           readings=dict(accuracy=.9), readings_despite=dict(accuracy=.9),
           epochs=[dict(phase='naive', epoch=0, train_loss=.7, valid_loss=.6, accuracy=.9)])
IMAGES = dict(classes=['a', 'b'], train=8, valid=4)
STUDY = dict(format=3, args=dict(epochs=dict(source=1, naive=1, freeze=1, unfreeze=1)), arms={}, versions={},
             about=dict(name='digits', size=16, bs=4, digest='x', source=IMAGES, target=IMAGES))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    "Drawing is slower than the small runs here, and test_report tests it"
    from fastai_bnstats.study import report
    monkeypatch.setattr(report, 'draw_figures', lambda folder: {})


def test_arms_contain_only_data():
    from fastai_bnstats.study import arms
    tree = ast.parse(Path(arms.__file__).read_text())
    assert [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)] == ['dataclasses']
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import)]


def test_results_follow_the_order_of_the_arms(tmp_path):
    for arm in ('later', 'freeze_non_bn', 'freeze_hold', 'earlier', 'naive_bn', 'pretrained'):
        run = run_dir(tmp_path, arm)
        run.mkdir(parents=True)
        write_json(run_file(run), {**RUN, 'arm': arm})
    assert list(load_runs(tmp_path)) == ['pretrained', 'naive_bn', 'freeze_hold', 'freeze_non_bn', 'earlier', 'later']


def test_every_arm_leaves_a_folder_that_describes_itself(study):
    st, runs = load_study(study), load_runs(study)
    assert list(st) == ['pretrained', *POST_ARMS] == list(runs)
    for arm, r in runs.items():
        assert r[0]['args']['epochs'] == dict(source=1, naive=1, freeze=1, unfreeze=1)
        assert {'torch', 'fastai', 'python'} <= set(r[0]['versions'])
        rec = st[arm][0]
        assert len(rec.names) == 23 and (full_counts(rec).sum(-1) == rec.numel).all() and len(rec.loss) == len(rec)
        assert rec.meta['seed'] == 0 and rec.meta['arm'] == arm
        last = rec.sel(fit=int(rec.fit.max()))
        assert r[0]['epochs'][-1]['valid_loss'] == pytest.approx(np.average(last.valid_loss, weights=last.valid_n), rel=1e-4)
    assert len(st['naive_bn'][0]) == 8 and len(st['freeze'][0]) == 16 and set(st['freeze'][0].phase) == {'freeze', 'unfreeze'}


def test_edges_come_from_the_checkpoint(study):
    st = load_study(study)
    pretrained = run_dir(study, 'pretrained')
    assert edges_file(pretrained, 'weights', 'folded') == study/'source0/pretrained/edges_weights_folded.npz'
    ed, fold = (Recording.load(edges_file(pretrained, 'weights', kind)) for kind in ('', 'folded'))
    for arm in POST_ARMS: np.testing.assert_array_equal(st[arm][0].edges, (fold if arm == 'naive_fold' else ed).edges)
    assert (ed.edges != fold.edges).any()
    np.testing.assert_allclose(ed.edges[-1][[0, -1]], [-5/np.sqrt(3*1024), 5/np.sqrt(3*1024)], rtol=1e-5) # the head's initialiser


def test_frozen_phases_are_frozen(study):
    for arm in ('freeze', 'freeze_non_bn'):
        f = load_study(study)[arm][0].sel(phase='freeze', layers='0.*')
        assert not f.moved().any() and not f.trainable.any()
        assert (load_study(study)[arm][0].sel(phase='unfreeze').trainable).all()


def test_the_same_seed_gives_the_same_arrays(study, tmp_path):
    again = run_study(tmp_path/'again', arms='freeze', **SMALL)
    for arm in ('pretrained', 'freeze'): assert load_study(again)[arm][0].is_same(load_study(study)[arm][0])


@pytest.mark.slow
def test_arms_see_the_same_pictures(tmp_path, monkeypatch):
    seen, src = {}, folder(tmp_path/'src')
    class Look(Callback):
        def __init__(self, key): self.key = key
        def before_batch(self): seen.setdefault((self.key, self.training), []).append(self.x.double().sum().item())
    dls, state = image_folders(src, src, size=8, bs=2).target, new_model(2)[0].state_dict()
    def run(arm, seed):
        def learner(dls, model, cbs, opt): return new_learner(dls, model, [*cbs, Look((arm, seed))], opt)
        monkeypatch.setattr(train, 'new_learner', learner)
        train_arm(ARMS[arm], new_model(2, state, ARMS[arm].bn), dls, dict(naive=1, freeze=1, unfreeze=1), (1, seed))
    for arm, seed in (('freeze', 0), ('naive_nobn', 0), ('freeze_non_bn', 0), ('freeze', 1)): run(arm, seed)
    a, b, c, d = (seen[k, True] for k in (('freeze', 0), ('freeze_non_bn', 0), ('naive_nobn', 0), ('freeze', 1)))
    assert a == b and a[:6] == c and a[:6] != a[6:] and a != d


def test_a_second_call_skips_finished_runs_and_adds_a_seed(study, capsys, tmp_path):
    import shutil
    out = tmp_path/'copy'
    shutil.copytree(study, out)
    before = (out/'source0/seed0/naive_bn/weights.npz').stat().st_mtime_ns
    run_study(out, arms='naive_bn,naive_bn', seeds=2, **SMALL)
    printed = capsys.readouterr().out
    assert 'skipped: pretrained, naive_bn (seed 0)' in printed and '[1/1] naive_bn, seed 1' in printed
    assert (out/'source0/seed0/naive_bn/weights.npz').stat().st_mtime_ns == before
    st = load_study(out)['naive_bn']
    assert sorted(st) == [0, 1] and (st[0].edges == st[1].edges).all() and not st[0].is_same(st[1])
    assert 'mean of 2 runs' in (out/'report.html').read_text()


def test_ctrl_c_explains_how_to_resume(tmp_path):
    out, src = tmp_path/'stopped', folder(tmp_path/'src')
    args = '--source', src, '--target', src, '--size', 8, '--bs', 4, '--epochs', '999,1,1,1', '--jobs', 1, '--out', out
    with fork(command, 'bnstats-study', *args) as p:
        wait_for(lambda: 'pretrain epoch 1/999' in p.printed(), p)
        os.kill(p.pid, signal.SIGINT)
        p.join(LIMIT)
        err = p.printed('stderr')
    assert p.exitcode == 130 and 'Traceback' not in err
    assert f'Interrupted. Finished runs are kept in {out}; the same command goes on from there.' in err
    assert not list(out.rglob('*.partial'))


@pytest.mark.parametrize('change,text', [
    (dict(epochs='2,1,1,1'), "other arguments: epochs was .*'source': 1.* now .*'source': 2"),
    (dict(bs=32), 'bs was 64, now 32'),
    (dict(size=32), 'size was 16, now 32')])
def test_a_folder_of_another_study_is_refused(study, change, text):
    with pytest.raises(ValueError, match=text): run_study(study, **{**SMALL, **change})


def test_refusals(tmp_path):
    (tmp_path/'a').write_text('mine')
    with pytest.raises(FileExistsError, match='is not empty and holds no study'): run_study(tmp_path, **SMALL)
    text = f"Unknown arm 'naive'. The arms are {', '.join(ARMS)}; post stands for .*; grid stands for {', '.join(GRID)}; controls"
    with pytest.raises(ValueError, match=text):
        run_study(tmp_path/'x', arms='naive')
    with pytest.raises(ValueError, match='--seeds must be at least 1. Found 0'): run_study(tmp_path/'x', seeds=0)
    with pytest.raises(FileNotFoundError, match='No folder'): run_study(tmp_path/'x', source=tmp_path/'no', target=tmp_path/'no')
    assert not (tmp_path/'x').exists()
    with pytest.raises(FileNotFoundError, match='holds no study'): load_study(tmp_path)
    (tmp_path/'study.json').write_text(json.dumps(dict(format=99)))
    with pytest.raises(ValueError, match='format 99.*Upgrade'): study_about(tmp_path)
    with pytest.raises(ValueError, match='format 99'): run_study(tmp_path, **SMALL)
    (tmp_path/'study.json').write_text(json.dumps(dict(format=2, versions=dict(fastai_bnstats='0.0.1'))))
    for f in (lambda: run_study(tmp_path, **SMALL), lambda: study_about(tmp_path)):
        with pytest.raises(ValueError, match=r'has format 2; this version of fastai_bnstats reads format 3.*another folder.*\(0.0.1\)'): f()


@pytest.mark.slow
def test_a_damaged_study_says_what_to_delete(tmp_path, capsys):
    import shutil
    src = folder(tmp_path/'src', n=4)
    small = dict(arms='freeze', source=src, target=src, epochs='1,1,1,1', size=8, bs=4)
    out = run_study(tmp_path/'out', **small)
    def cut(f): f.write_bytes(f.read_bytes()[:90])
    run = run_dir(out, 'freeze')
    cut(recording_file(run, 'weights'))
    with pytest.raises(ValueError, match='weights.npz.*Delete .*freeze and repeat'): load_study(out)
    cut(run_file(run))
    with pytest.raises(ValueError, match='result.json is damaged or cut off.*Delete .*freeze and repeat'): load_study(out)
    shutil.rmtree(run)
    cut(body_file(run_dir(out, 'pretrained')))
    run_study(out, **small)
    assert 'Not whole, trained again: pretrained: body.pth is damaged' in capsys.readouterr().out and 'freeze' in load_study(out)
    cut(study_file(out))
    for f in (lambda: load_study(out), lambda: run_study(out, **small)):
        with pytest.raises(ValueError, match='study.json is damaged or cut off.*another --out'): f()
    with pytest.raises(FileExistsError, match='is a file. Pass --out with a folder'): run_study(out/'study.json', **SMALL)


def changed(content, field, value):
    "A copy in which a field such as 'epochs.0.accuracy' has another value, or is missing"
    content = json.loads(json.dumps(content))
    *path, last = [int(k) if k.isdigit() else k for k in field.split('.')]
    inner = content
    for k in path: inner = inner[k]
    if value is MISSING: del inner[last]
    else: inner[last] = value
    return content


MISSING = object()
WRONG_KINDS = {'list': [1], 'text': 'x', 'null': None, 'object': {}, 'number': 1.5, 'true': True, 'missing': MISSING}
FIELDS = { # file -> field -> values of it that are allowed
    'run': {'arm': 'text', 'seed': '', 'source': '', 'what': 'text', 'seconds': 'number null', 'args': 'object', 'versions': 'object',
            'threads': '', 'data': 'text', 'body': 'text', 'diverged': 'text', 'losses': 'text', 'readings': 'object',
            'readings.accuracy': 'number null missing', 'readings_despite': 'object missing',
            'readings_despite.accuracy': 'number null missing', 'epochs': '',
            'epochs.0': '', 'epochs.0.phase': 'text', 'epochs.0.epoch': '', 'epochs.0.train_loss': 'number null',
            'epochs.0.valid_loss': 'number null', 'epochs.0.accuracy': 'number null'},
    'study': {'format': '', 'args': '', 'args.epochs': '', 'args.epochs.naive': '', 'arms': 'object', 'versions': 'object', 'about': '',
              'about.name': 'text', 'about.size': '', 'about.bs': '', 'about.digest': 'text', 'about.source': '',
              'about.target.classes': '',
              'about.target.classes.0': 'text', 'about.source.train': '', 'about.target.valid': '', 'seeds': 'null missing',
              'sources': 'null missing', 'aa': 'null missing'}}


def refused(out, file, reader):
    with pytest.raises(ValueError) as e: reader()
    text = str(e.value)
    remedy = 'Delete .*naive_bn and repeat' if file.name == 'result.json' else 'Restore it, or start a new study with another --out'
    assert text.startswith(str(file)) and re.search(remedy, text), text
    return text


@pytest.mark.parametrize('which', FIELDS)
def test_a_wrong_kind_of_field_is_refused_with_a_remedy(tmp_path, which):
    write_json(study_file(tmp_path), STUDY)
    run = run_dir(tmp_path, 'naive_bn')
    run.mkdir(parents=True)
    write_json(run_file(run), RUN)
    file, content = (run_file(run), RUN) if which == 'run' else (study_file(tmp_path), {**STUDY, 'seeds': 1, 'sources': 1, 'aa': None})
    write_json(file, content)
    readers = [lambda: load_study(tmp_path), lambda: write_report(tmp_path)]
    if which == 'study': readers.append(lambda: run_study(tmp_path, **SMALL))
    def check(content, text):
        write_json(file, content)
        for reader in readers: assert text in refused(tmp_path, file, reader)
    for kind, value in WRONG_KINDS.items():
        if value is not MISSING and kind != 'object': check(value, 'the content should be an object, but is')
        for field, allowed in FIELDS[which].items():
            name = re.sub(r'\.(\d+)', r'[\1]', field)
            if kind in allowed.split() or field.endswith('.0') and value is MISSING: continue
            if field == 'epochs' and kind == 'list': name = 'epochs[0]'
            if field == 'about.target.classes' and kind == 'list': name = 'about.target.classes[0]'
            if kind == 'object' and field in ('args', 'args.epochs', 'about', 'about.source', 'epochs.0'): name = f'{name}.'
            check(changed(content, field, value), name)
    if which == 'run':
        check({**RUN, 'epochs': []}, 'epochs is empty')
        check({**RUN, 'losses': '1.2 x'}, "losses has something else than numbers (could not convert string to float: 'x')")


@pytest.mark.parametrize('change, text', [
    (dict(arm='freeze'), 'it is the result of freeze, seed0, source0, which is not its folder'),
    (dict(seed=1), 'it is the result of naive_bn, seed1, source0'), (dict(source=1), 'it is the result of naive_bn, seed0, source1'),
    (dict(data='00'), 'is the result of a study with other arguments or images than .*study.json'),
    (dict(args=dict(STUDY['args'], size=99)), 'is the result of a study with other arguments or images')])
def test_a_result_that_belongs_elsewhere_is_refused(tmp_path, change, text):
    write_json(study_file(tmp_path), STUDY)
    run = run_dir(tmp_path, 'naive_bn')
    run.mkdir(parents=True)
    fits = {**RUN, 'data': STUDY['about']['digest'], 'args': STUDY['args']}
    write_json(run_file(run), {**fits, 'args': dict(STUDY['args'], source='/elsewhere')}) # the folder of the images may be another one
    assert list(load_runs(tmp_path)) == ['naive_bn']
    write_json(run_file(run), {**fits, **change})
    with pytest.raises(ValueError, match=f'{text}.*Delete .*naive_bn and repeat'): load_runs(tmp_path)


def test_a_copy_of_a_folder_does_not_replace_a_run(tmp_path):
    import shutil
    run = run_dir(tmp_path, 'freeze')
    run.mkdir(parents=True)
    write_json(run_file(run), {**RUN, 'arm': 'freeze'})
    shutil.copytree(run, run_dir(tmp_path, 'freeze_copy'))
    text = 'freeze_copy.*it is the result of freeze, seed0, source0, which is not its folder'
    with pytest.raises(ValueError, match=text): load_runs(tmp_path)


@pytest.mark.parametrize('args', [
    ['bnstats-study', '--arms', 'x'], ['bnstats-study', '--epochs', '1,2'], ['bnstats-study', '--data', 'mnist'],
    ['bnstats-report', 'nowhere']])
def test_commands_print_errors_in_one_line(args, tmp_path):
    p = run(command, *args, cwd=tmp_path)
    assert p.returncode == 1 and p.stderr.startswith(f'{args[0]}: ') and p.stderr.count('\n') == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize('command', ['bnstats-study', 'bnstats-report'])
def test_the_version(command, tmp_path):
    p = subprocess.run([command, '--version'], capture_output=True, text=True, cwd=tmp_path)
    assert p.stdout == f'fastai_bnstats {fastai_bnstats.__version__}\n' and p.stderr == '' and p.returncode == 0


def test_epochs():
    assert parse_epochs(None, 'digits') == dict(source=10, naive=5, freeze=3, unfreeze=5) and parse_epochs(None, 'folders')['source'] == 40
    assert parse_epochs('1,2,3,4', 'digits') == dict(source=1, naive=2, freeze=3, unfreeze=4)
    for bad in ('1,2,3', 'a,b,c,d', '1,2,3,-4', '0,1,1,1', '1,1,0,1'):
        with pytest.raises(ValueError, match='four whole numbers of at least 1'): parse_epochs(bad, 'digits')


@pytest.mark.slow
def test_photographs_from_folders(tmp_path):
    src, tgt = folder(tmp_path/'src', n=8), folder(tmp_path/'tgt', classes=('a', 'b', 'c'), n=8, valid='val')
    out = run_study(tmp_path/'out', source=src, target=tgt, size=32, bs=8, epochs='1,1,1,1', arms='naive_fold,freeze')
    st = load_study(out)
    assert st['freeze'][0].phase.tolist() == ['freeze']*3+['unfreeze']*3 and len(st['naive_fold'][0]) == 3
    page = (out/'report.html').read_text()
    assert 'Source: 2 classes, 16 training and 6 validation images' in page
    assert 'Not drawn: this study has no finished run of <code>naive_bn</code>.' in page


def test_the_model(study):
    state = torch.load(study/'source0/pretrained/body.pth', weights_only=True)
    x = torch.randn(4, 3, 32, 32)
    kept, fold = new_model(4, state).eval(), new_model(4, state, 'fold').eval()
    torch.testing.assert_close(fold(x), kept(x), rtol=1e-3, atol=1e-3)
    assert count_bn(kept) == 22 and count_bn(fold) == count_bn(new_model(4, state, 'delete')) == 0
    assert isinstance(kept[1][-1], nn.Linear) and kept[1][-1].in_features == 1024 and len(select_tensors(kept)) == 23
    assert [k for k, v in kept[0].state_dict().items() if not v.equal(state[k])] == []


class AtEndOfPhase(Callback):
    "Keeps the state of the model after each phase"
    def __init__(self): self.states = []
    def after_fit(self): self.states.append({k: v.clone() for k, v in self.model.state_dict().items()})


class Spy(Callback):
    "Keeps the means of the batches that reach the first batch norm after the last training batch, in float64"
    order = 59 # just before the recalibration
    def __init__(self): self.means, self.hook = [], None
    def after_train(self):
        self.hook = self.model[0][0][1].register_forward_pre_hook(lambda m, x: self.means[-1].append(x[0].double().mean((0, 2, 3))))
    def before_fit(self): self.means.append([])
    def before_validate(self): self.hook.remove()


@pytest.fixture(scope='module')
def grid():
    "For each arm of the grid, trained on eight pictures: recordings, states after each phase, means of batches"
    import tempfile
    with tempfile.TemporaryDirectory() as d:
        dls = image_folders(folder(Path(d)/'src', n=4), folder(Path(d)/'tgt', n=4), size=16, bs=4).target
        set_seed(0)
        state, res = new_model(2)[0].state_dict(), {}
        for arm in GRID:
            end, spy = AtEndOfPhase(), Spy()
            cbs = [end, spy] if arm.endswith('recalibrated') else end
            set_seed(0)
            epochs, model = dict(freeze=2, unfreeze=1), new_model(2, state)
            recs, _ = train_arm(ARMS[arm], model, dls, epochs, (1, 0), phase_cbs=lambda phase, cbs=cbs: cbs)
            res[arm] = recs['weights'], end.states, spy.means
        return state, res


def test_the_grid_is_two_choices_crossed(grid):
    assert set(GRID) <= set(ARMS) and not set(GRID[1:3]+GRID[4:]) & set(POST_ARMS) and len(GRID) == 6
    for arm in GRID:
        how = 'hold' if arm.endswith('hold') else 'recalibrate' if arm.endswith('recalibrated') else 'update'
        assert [p.bn_stats for p in ARMS[arm].phases] == [how]*2
        assert ARMS[arm].phases[0].freeze == ('freeze_non_bn' if 'non_bn' in arm else 'freeze_body') and ARMS[arm].phases[1].freeze is None
        gamma = grid[1][arm][1][0]['0.0.1.weight']
        assert gamma.equal(grid[0]['0.1.weight']) is ('non_bn' not in arm) # gamma trains while the head trains, depending on the arm


@pytest.mark.parametrize('arm', ['freeze_hold', 'freeze_non_bn_hold'])
def test_held_statistics_do_not_move_by_a_bit(grid, arm):
    start, res = grid
    stats = [k for k in start if 'running' in k or 'tracked' in k]
    assert len(stats) == 66 and all(s[f'0.{k}'].equal(start[k]) for s in res[arm][1] for k in stats)
    assert not res[arm][1][1]['0.0.0.weight'].equal(start['0.0.weight']) # a convolution trained
    assert not any(res[arm.replace('_hold', '')][1][0][f'0.{k}'].equal(start[k]) for k in stats)


@pytest.mark.parametrize('arm', ['freeze_recalibrated', 'freeze_non_bn_recalibrated'])
def test_recalibration_uses_the_mean_of_all_batches_and_does_not_change_training(grid, arm):
    _, res = grid
    rec, states, means = res[arm]
    for state, ms in zip(states, means):
        assert len(ms) == 2 and state['0.0.1.num_batches_tracked'] == 2 # once, in the last epoch
        torch.testing.assert_close(state['0.0.1.running_mean'].double(), torch.stack(ms).mean(0), rtol=1e-5, atol=1e-7)
    other, plain, _ = res[arm.removesuffix('_recalibrated')]
    for a, b in zip(states, plain):
        trained = [k for k in a if 'running' not in k and 'tracked' not in k]
        assert all(a[k].equal(b[k]) for k in trained) and not a['0.0.1.running_mean'].equal(b['0.0.1.running_mean'])
    for n in ('hist', 'mean', 'var', 'loss', 'step', 'fit', 'epoch', 'batch'): assert np.array_equal(getattr(rec, n), getattr(other, n))
    last = rec.valid_epoch == np.where(rec.valid_fit == 0, 1, 0) # validation of the last epoch of each phase sees the new statistics
    assert (rec.valid_loss[~last] == other.valid_loss[~last]).all() and (rec.valid_loss[last] != other.valid_loss[last]).all()


def test_updates_are_recorded_of_all_tensors():
    start = new_model(4)
    state = start.state_dict()
    edges = train.study_edges(start, digits(8, 64).target)
    recs = {r.quantity: r for r in train.recorders(edges)}
    assert {n for n, *_ in recs['updates'].tensors(start)} == {n for n, v in state.items() if v.is_floating_point()}
    assert len(recs['weights'].tensors(start)) == 23


def test_recipe():
    learn = new_learner(digits(16, 64).target, new_model(4))
    learn.create_opt()
    h = learn.opt.hypers
    assert len(h) == 3 and {(x['sqr_mom'], x['eps'], x['wd']) for x in h} == {(.99, 1e-6, 1e-2)}
    assert learn.opt.state[learn.model[0][0][1].weight]['do_wd'] is False # batch norm has no weight decay
    lrs = {(p.lr, p.pct_start) for k, a in ARMS.items() if k not in RATE_CONTROLS+SGD_ARMS for p in a.phases}
    assert lrs == {(3e-3, .5), (1e-2, .25), (3e-3, .25)}
    sgd = new_learner(learn.dls, learn.model, opt='sgd')
    sgd.create_opt()
    assert {(x['mom'], x['wd']) for x in sgd.opt.hypers} == {(.9, 1e-2)} and 'sqr_mom' not in sgd.opt.hypers[0]
    assert {k for k, a in ARMS.items() if a.opt == 'sgd'} == {*SGD_ARMS} and {ARMS[k].phases[0].lr for k in SGD_ARMS} == {3e-2}
    assert {p.lr for p in ARMS['naive_bn_lr0'].phases} == {0} and [p.lr for p in ARMS['freeze_lr_half'].phases] == [5e-3, 1.5e-3]


# ---- controls

def test_all_arms_of_a_seed_start_with_the_same_head():
    "Bit for bit, also where batch norm is deleted or folded, and where the body is random"
    state = new_model(6, key=(2, 0))[0].state_dict()
    def head(arm, seed): return _start_model(ARMS[arm], 4, state, seed)[1].state_dict()
    first = head('naive_bn', 3)
    assert len(first) == 2 and all(v.equal(first[k]) for arm in ARMS for k, v in head(arm, 3).items())
    assert not any(v.equal(first[k]) for k, v in head('naive_bn', 4).items())


def test_arms_without_transfer_start_from_random_weights():
    state = new_model(6, key=(2, 0))[0].state_dict()
    def body(arm, seed): return _start_model(ARMS[arm], 4, state, seed)[0].state_dict()
    bn, nobn, pretrained = body('scratch_bn', 3), body('scratch_nobn', 3), body('naive_bn', 3)
    convs = [k for k in nobn if k.endswith('weight')]
    assert len(convs) == 22 and all(v.equal(pretrained[k]) for k, v in state.items())
    assert all(nobn[k].equal(bn[k]) and not bn[k].equal(state[k]) for k in convs) # the two differ in batch norm alone
    assert not body('scratch_bn', 4)[convs[0]].equal(bn[convs[0]])


@pytest.mark.slow
def test_with_a_learning_rate_of_0_nothing_moves_by_one_bit():
    state = new_model(6, key=(2, 0))[0].state_dict()
    dls, model = digits(16, 64).target, _start_model(ARMS['naive_bn_lr0'], 4, state, 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recs, _ = train_arm(ARMS['naive_bn_lr0'], model, dls, dict(naive=1), (1, 0), train.study_edges(model, dls))
    assert all(v.equal(before[k]) for k, v in model.state_dict().items() if 'running' not in k and 'tracked' not in k)
    assert not recs['weights'].moved().any() and recs['updates'].fit_norm.any() # running statistics do move
    from fastai_bnstats.study.readings import READINGS, Run
    assert READINGS['farthest'].compute(Run(recs, [])) == 0


def test_learning_rates_are_multiplied():
    half = times_lr(ARMS['freeze'], .5, 'x')
    assert [p.lr for p in half.phases] == [p.lr/2 for p in ARMS['freeze'].phases] and half.what == 'x' and half.learns
    assert arm_of('freeze@0.3').phases[1].lr == pytest.approx(9e-4) and arm_of('freeze') is ARMS['freeze']
    assert sorted(['pretrained', 'x', 'freeze@3', 'freeze', 'naive_bn', 'freeze@0.3'], key=arm_order) == [
        'pretrained', 'naive_bn', 'freeze@0.3', 'freeze', 'freeze@3', 'x']
    assert not ARMS['naive_bn_lr0'].learns and set(CONTROLS) <= set(ARMS) and not set(CONTROLS) & set(POST_ARMS)
