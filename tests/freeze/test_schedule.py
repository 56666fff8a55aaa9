"""Schedules of freezing: what trains in each phase, checks before the first one, and what is left after an error"""
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from helpers import tiny_learner, tiny_model
from fastai.basics import Callback, CancelFitException, load_learner, nn, params, trainable_params
import fastai.callback.schedule # noqa: F401 adds fit_one_cycle and fit_flat_cos
from fastai.callback.tracker import EarlyStoppingCallback
from fastai.metrics import accuracy
from freeze_cases import BNS, CONVS, HEAD, OPTS, STATS, moved, no_warnings, snapshot, two_groups

from fastai_bnstats.freeze import KeepFrozen, LedgerCallback, LedgerError, bn_splitter, read_schedule
from fastai_bnstats.freeze.calls import match_params
from fastai_bnstats.freeze.phases import parse_lr
from fastai_bnstats.record import GradHistCallback, WeightHistCallback

THREE = [dict(call='freeze_body', bn_stats='hold', epochs=1, lr=1e-2), dict(call='freeze_non_bn', epochs=1, lr=1e-2, fit='fit'),
         dict(call='unfreeze', epochs=1, lr=slice(1e-3, 1e-2), fit='fit_flat_cos', pct_start=.5)]


def learner(splitter=two_groups, **kwargs): return tiny_learner(splitter=splitter, **kwargs)


class Watch(Callback):
    "The tensors that moved in each fit, and the learning rates of its first step"
    order = 90
    def __init__(self): self.moved, self.lrs = [], []
    def before_train(self):
        if self.epoch == 0: self.before = snapshot(self.learn); self.lrs.append([])
    def before_step(self): self.lrs[-1].append([h['lr'] for h in self.opt.hypers])
    def after_fit(self): self.moved.append(moved(self.learn, self.before))


def parameters(names): return {n for n in names if 'running' not in n and 'tracked' not in n}


@pytest.mark.parametrize('opt', ['Adam', 'ranger', 'torch AdamW'])
def test_each_phase_trains_what_it_says(opt):
    watch = Watch()
    learn = learner(opt_func=OPTS[opt], cbs=watch, metrics=accuracy)
    learn.fit(1) # so that gradients and optimizer state are there
    watch.moved.clear()
    s = learn.fit_schedule(THREE)
    assert [parameters(m) for m in watch.moved] == [HEAD, HEAD | BNS, HEAD | BNS | CONVS]
    assert not STATS & watch.moved[0] and STATS <= watch.moved[1] # held, updated
    t = s.table
    assert s.ok and s is learn.schedule and list(t.index) == ['freeze_body', 'freeze_non_bn', 'unfreeze']
    assert list(t.tensors) == list(t.moved) == [4, 8, 10] and list(t.broken) == [0, 0, 0] and set(t.status) == {'done'}
    assert list(t.trains) == ['1', '0.1, 0.4, 1', '(the whole model)'] and list(t.fit) == ['fit_one_cycle', 'fit', 'fit_flat_cos']
    assert list(t.lr) == ['0.01', '0.01', 'slice(0.001, 0.01)'] and list(t.epochs) == [1, 1, 1]
    np.testing.assert_allclose(t.loc['unfreeze', ['train_loss', 'valid_loss', 'accuracy']].astype(float), learn.recorder.values[-1])
    assert {*s.ledgers} == {*t.index} and not learn._grab_cbs(LedgerCallback) and not hasattr(learn, 'ledger')
    assert '3 of 3 phases ended as planned; no tensor moved that was frozen or held.' in repr(s) and '<table' in s._repr_html_()


def test_learning_rates_are_those_of_the_fits():
    watch = Watch()
    learn = learner(splitter=bn_splitter, cbs=watch)
    learn.fit_schedule([dict(call='freeze_to', n=1, epochs=1, lr=[1e-4, 1e-3, 1e-2], fit='fit'),
                        dict(call='unfreeze', epochs=1, lr=slice(1e-4, 1e-2), fit='fit'), dict(call='freeze', epochs=1, lr=4e-3, div=2.)])
    np.testing.assert_allclose(watch.lrs[0][0], [1e-4, 1e-3, 1e-2])
    np.testing.assert_allclose(watch.lrs[1][0], [1e-4, 1e-3, 1e-2])
    np.testing.assert_allclose(watch.lrs[2][0], [2e-3]*3)
    assert not CONVS & watch.moved[2] and CONVS <= watch.moved[1] # fastai's own freeze, without its drift
    assert learn.schedule.ok and list(learn.schedule.table.lr) == ['0.0001, 0.001, 0.01', 'slice(0.0001, 0.01)', '0.004']


def test_exactly_the_named_parameters_train():
    watch = Watch()
    learn = learner(cbs=[watch, LedgerCallback()])
    learn.fit(1)
    watch.moved.clear()
    s = learn.fit_schedule([dict(params=['0.3', '*.2.bias'], epochs=1, lr=1e-2, bn_stats='hold'),
                            dict(name='b', params='1', epochs=1, lr=1e-2)])
    assert [parameters(m) for m in watch.moved] == [{'0.3.weight', '1.2.bias'}, HEAD] and not STATS & watch.moved[0]
    t = s.ledgers['freeze_except']
    assert {*t.index[t.declared == 'trains']} == {'0.3.weight', '1.2.bias'} and s.ok
    assert learn.ledger.table is s.ledgers['b'] # the learner's own ledger was used, and stays
    learn.unfreeze()
    assert all(p.requires_grad for p in learn.model.parameters())


def test_freeze_all_trains_nothing_and_adapts_statistics():
    learn = learner()
    before = snapshot(learn)
    s = learn.fit_schedule([dict(call='freeze_all', epochs=1, lr=1e-2)])
    assert s.ok and s.table.tensors.iloc[0] == 0 and s.table.trains.iloc[0] == 'nothing' and not parameters(moved(learn, before))


def test_names_and_globs():
    model = nn.DataParallel(tiny_model()).module
    assert {*match_params(model, '0.1')} == {'0.1.weight', '0.1.bias'}
    assert {*match_params(model, ['module.0.1.bias', '1.*'])} == HEAD | {'0.1.bias'}
    assert {*match_params(model, '*.weight')} == {n for n in CONVS | BNS | HEAD if n.endswith('weight')}
    for bad in ('0.10', '1.3.w', []):
        with pytest.raises(ValueError, match='selects none of the 10 parameters.*Pass names of parameters or modules, or globs'):
            match_params(model, bad)
    shared = nn.Sequential(model[0][0], model[0][0])
    assert len({id(p) for p in match_params(shared, '1').values()}) == 1 # the second name of a shared layer


YAML_LIST = """
- {call: freeze_body, bn_stats: hold, epochs: 1, lr: 1e-2}
- {call: freeze_non_bn, epochs: 1, lr: 0.01, fit: fit}
- {call: unfreeze, epochs: 1, lr: 'slice(1e-3, 1e-2)', fit: fit_flat_cos, pct_start: 5e-1}
"""
YAML_NAMES = """
freeze_body:   {bn_stats: hold, epochs: 1, lr: 1e-2}
freeze_non_bn: {epochs: 1, lr: .01, fit: fit}
unfreeze:      {epochs: 1, lr: "slice(0.001, .01)", fit: fit_flat_cos, pct_start: 0.5}
"""


def as_table(): return pd.DataFrame(THREE)
def as_named_table(): return pd.DataFrame([{k: v for k, v in d.items() if k != 'call'} for d in THREE], [d['call'] for d in THREE])
def as_file(tmp): (tmp/'a b.yaml').write_text(YAML_LIST); return tmp/'a b.yaml'


@pytest.mark.parametrize('form', ['table', 'named table', 'list', 'names', 'file', 'file as text', 'dict', 'L'])
def test_all_ways_to_write_a_schedule_are_one(form, tmp_path):
    from fastai.basics import L
    spec = {'table': as_table(), 'named table': as_named_table(), 'list': YAML_LIST, 'names': YAML_NAMES, 'file': as_file(tmp_path),
            'file as text': str(tmp_path/'a b.yaml'), 'dict': {d['call']: d for d in THREE}, 'L': L(*THREE)}[form]
    assert read_schedule(spec, tiny_model()) == read_schedule(THREE, tiny_model())


FTS = """
0:
  params: # the parameters of a phase can be given by name
  - 1.3.bias
  - 1.3.weight
  max_transition_epoch: 3
1:
  params: # or by a regular expression
  - 1.2.*
  max_transition_epoch: 4
2:
  params:
  - 0.(3|4).*
  epochs: 2
  lr: 1.0e-06
3:
  params: ['0.*.bias', '*.weight'] # the second is a glob
  max_transition_epoch: 9
"""


def test_schedules_of_finetuning_scheduler():
    text = FTS.replace('max_transition_epoch:', 'lr: 1e-3\n  max_transition_epoch:')
    phases = read_schedule(text, tiny_model())
    assert [p.name for p in phases] == ['phase 0', 'phase 1', 'phase 2', 'phase 3'] and [p.epochs for p in phases] == [3, 1, 2, 3]
    top, rest = {'1.3.bias', '1.3.weight'}, {'0.3.weight', '0.4.weight', '0.4.bias'}
    assert [{*p.args['params']} for p in phases] == [top, HEAD, HEAD | rest, HEAD | BNS | CONVS]
    assert [p.lr for p in phases] == [1e-3, 1e-3, 1e-6, 1e-3]
    learn = learner()
    short = text.replace('_epoch: 3', '_epoch: 1').replace('_epoch: 4', '_epoch: 2').replace('epochs: 2', 'epochs: 1').replace('9', '4')
    s = learn.fit_schedule(short, start='phase 1')
    assert list(s.table.tensors.fillna(-1)) == [-1, 4, 7, 10] and list(s.table.status) == ['skipped', 'done', 'done', 'done']


def test_phases_are_the_names_in_recordings_and_restored():
    cbs = [WeightHistCallback(), GradHistCallback()]
    learn = learner(cbs=cbs)
    learn.weight_hist.phase = 'mine'
    class Own(Callback): # an attribute of the learner or the model is not the callback's
        def before_fit(self): assert 'phase' not in vars(self)
    learn.add_cb(Own())
    third = WeightHistCallback(layers='*.bias')
    learn.fit_schedule([THREE[0], {**THREE[1], 'name': 'bn', 'cbs': third}])
    for cb in cbs: assert list(dict.fromkeys(cb.recording.phase)) == ['freeze_body', 'bn']
    assert set(third.recording.phase) == {'bn'} and [cb.phase for cb in (*cbs, third)] == ['mine', None, None]


ERRORS = [
    (dict(call='freeze_bodi', epochs=1, lr=1), r"Phase 'freeze_bodi': call must be one of freeze_body, .*Found 'freeze_bodi'"),
    (dict(epochs=1, lr=1), r"Phase 2: call must be one of .*Found None"),
    (dict(call='unfreeze', fit='fine_tune', epochs=1, lr=1),
     "Phase 'unfreeze': fit must be one of fit_one_cycle, fit, fit_flat_cos. Found 'fine_tune'"),
    (dict(call='unfreeze', epoch=1, lr=1),
     "Phase 'unfreeze': unknown key 'epoch'. With unfreeze and fit_one_cycle, .*Did you mean 'epochs'"),
    (dict(call='freeze_to', n=1, bn_stats='hold', epochs=1, lr=1),
     "unknown key 'bn_stats'. With freeze_to and fit_one_cycle, .*lr, n, div"),
    (dict(call='unfreeze', epochs=1, lr=1, fit='fit', pct_start=.3), "unknown key 'pct_start'. With unfreeze and fit, "),
    (dict(call='unfreeze', lr=1), "Phase 'unfreeze': epochs is missing. Found the keys call, fit, lr"),
    (dict(call='unfreeze', epochs=1), 'lr is missing'),
    (dict(call='freeze_to', epochs=1, lr=1), 'n is missing'),
    (dict(call='freeze_except', epochs=1, lr=1), 'params is missing'),
    (dict(name='last', call='unfreeze', epochs=0, lr=1), "Phase 'last': epochs must be a whole number of at least 1. Found 0"),
    (dict(call='unfreeze', epochs=True, lr=1), 'epochs must be a whole number of at least 1. Found True'),
    (dict(call='unfreeze', epochs=1.5, lr=1), 'epochs must be a whole number'),
    (dict(call='unfreeze', epochs=1, lr=0), r'lr must be a positive number, slice\(lo, hi\), or a list'),
    (dict(call='unfreeze', epochs=1, lr=None), 'lr must be a positive number'),
    (dict(call='unfreeze', epochs=1, lr=[1e-3]*3),
     "Phase 'unfreeze': lr has 3 numbers, and there are 2 parameter groups. Pass one number for each"),
    (dict(call='unfreeze', epochs=1, lr=1, bn_stats='off'), "Phase 'unfreeze': bn_stats must be one of update, hold, batch. Found 'off'"),
    (dict(call='freeze_body', name='b', epochs=1, lr=1, head='2'), r"Phase 'b': head= must be a module or parameter .*Found '2'"),
    (dict(call='freeze_to', n=2, epochs=1, lr=1), "there is no group 2 to freeze to: the splitter makes 2. Pass n from -2 to 1"),
    (dict(params='2.*', epochs=1, lr=1), "Phase 'freeze_except': params='2.*' selects none of the 10 parameters"),
    (dict(call='freeze_body', epochs=1, lr=1), "Two phases are called 'freeze_body'. Give each its own name="),
    ('unfreeze', "Phase 2: a phase is a dict, such as dict.*Found 'unfreeze'")]


@pytest.mark.parametrize('bad,text', ERRORS)
def test_a_mistake_in_the_last_phase_is_found_before_the_first(bad, text):
    learn = learner(cbs=Watch())
    learn.freeze_non_bn(bn_stats='hold')
    before, opt, policy = snapshot(learn), learn.opt, learn.freeze_policy
    flags, hypers = [p.requires_grad for p in learn.model.parameters()], [dict(h) for h in learn.opt.hypers]
    with pytest.raises(ValueError, match=text): learn.fit_schedule([THREE[0], bad])
    assert not moved(learn, before) and not learn.watch.lrs and 'schedule' not in vars(learn)
    assert learn.opt is opt and learn.freeze_policy is policy and [dict(h) for h in opt.hypers] == hypers
    assert [p.requires_grad for p in learn.model.parameters()] == flags and not learn._grab_cbs(LedgerCallback)


@pytest.mark.parametrize('spec,text', [
    ([], r'A schedule is a list of phases, .*Found \[\]'),
    (3, 'A schedule is a list of phases, .*Found 3'), ('', 'A schedule is a list of phases'),
    ('nowhere.yaml', "There is no file 'nowhere.yaml'. Pass the path of a YAML file, or YAML as text"),
    (Path('no.yml'), "no file 'no.yml'"),
    ('a: [', 'The schedule is not valid YAML'), ('just words', "A schedule is a list of phases, .*Found 'just words'"),
    ({0: {'params': ['1'], 'max_transition_epoch': 2, 'lr': 1}, 1: {'params': ['0'], 'max_transition_epoch': 2, 'lr': 1}},
     "Phase 'phase 1': max_transition_epoch must be a whole number above 2, the epoch at which this phase begins. Found 2"),
    ({0: {'params': ['1'], 'lr': 1}}, "Phase 'phase 0': epochs is missing"),
    ({0: {'params': ['9.*'], 'epochs': 1, 'lr': 1}}, "Phase 'phase 0': params='9"),
    ({0: 5}, "Phase 'phase 0': a phase is a dict"), ({'a': 5}, 'Phase 1: a phase is a dict'),
    ({0: {'params': ['1'], 'epochs': 1, 'lr': 1, 'new_lr_scheduler': {}}}, "Phase 'phase 0': unknown key 'new_lr_scheduler'")])
def test_what_is_not_a_schedule(spec, text):
    with pytest.raises(ValueError, match=text): learner().fit_schedule(spec)


def test_other_mistakes():
    with pytest.raises(ValueError, match=r"learner has KeepFrozen\('non_bn'.*learn.remove_cb\(KeepFrozen\)"):
        learner(cbs=KeepFrozen()).fit_schedule(THREE)
    with pytest.raises(ValueError, match="start must be the name of a phase: freeze_body, freeze_non_bn, unfreeze. Found 'head'"):
        learner().fit_schedule(THREE, start='head')
    with pytest.raises(ValueError, match="on_move must be 'raise' or 'warn'"): learner().fit_schedule(THREE, on_move='x')
    frozen = learner(splitter=lambda m: [params(m[0]), [], params(m[1])][:2])
    with pytest.raises(ValueError, match="Phase 'freeze': freeze.. leaves nothing to train"):
        learner(splitter=lambda m: [params(m), []], train_bn=False).fit_schedule([dict(call='freeze', epochs=1, lr=1)])
    assert frozen.opt is None


def test_a_fit_that_was_not_imported(monkeypatch):
    from fastai.basics import Learner
    monkeypatch.delattr(Learner, 'fit_flat_cos')
    with pytest.raises(ValueError, match="Phase 'unfreeze': Learner has no fit_flat_cos yet. Import it"): learner().fit_schedule(THREE)


@given(st.floats(1e-9, 1e3), st.floats(1e-9, 1e3))
def test_learning_rates_survive_text(a, b):
    assert parse_lr(repr(a)) == a and parse_lr(f'slice({a!r}, {b!r})') == slice(a, b) and parse_lr([repr(a), b]) == [a, b]
    assert parse_lr(f'slice({b!r})') == slice(None, b) and parse_lr(np.array([a, b])) == [a, b] and parse_lr(np.float64(a)) == a


@pytest.mark.parametrize('bad', ['fast', '', [], [1, 'x'], True, float('nan'), float('inf'), slice(None), slice(-1, 1), 'slice()', {},
                                 '-1'])
def test_what_is_not_a_learning_rate(bad):
    with pytest.raises(ValueError, match='lr must be a positive number'): parse_lr(bad)


class Spoil(Callback):
    "Change a frozen weight in the fit with this number"
    def __init__(self, at): self.at, self.fits = at, 0
    def before_fit(self): self.fits += 1
    def after_train(self):
        if self.fits == self.at: self.model[0][3].weight.data += 1


def test_a_ledger_error_names_the_phase():
    learn = learner(cbs=Spoil(2))
    with pytest.raises(LedgerError, match=r"(?s)^Phase 'freeze_non_bn': .*1 frozen: 0.3.weight.*learn.schedule.ledgers\['freeze_non_bn'\]"):
        learn.fit_schedule(THREE)
    s = learn.schedule
    assert list(s.table.status) == ['done', 'broken', 'not run'] and list(s.table.ok) == [True, False, False] and not s.ok
    assert s.table.broken['freeze_non_bn'] == 1 and list(s.ledgers['freeze_non_bn'].index)[0] == '0.3.weight'
    assert '1 of 3 phases ended as planned.' in repr(s) and not learn._grab_cbs(LedgerCallback)
    again = learn.fit_schedule(THREE, start='freeze_non_bn')
    assert again.ok and again.ledgers['freeze_body'] is s.ledgers['freeze_body'] # the phase that had ended is kept


def test_a_ledger_that_warns_goes_on():
    learn = learner(cbs=Spoil(1))
    with pytest.warns(UserWarning, match='Tensors that were declared frozen'): s = learn.fit_schedule(THREE, on_move='warn')
    assert list(s.table.status) == ['done']*3 and list(s.table.ok) == [False, True, True] and not s.ok


class StopAt(Callback):
    def __init__(self, fit, event, error): self.at, self.event, self.error, self.fits = fit, event, error, 0
    def before_fit(self):
        self.fits += 1
        self.maybe('before_fit')
    def before_validate(self): self.maybe('before_validate')
    def maybe(self, event):
        if self.fits == self.at and event == self.event: raise self.error


@pytest.mark.parametrize('event', ['before_fit', 'before_validate'])
def test_after_ctrl_c_finished_phases_are_kept(event):
    said = []
    learn = learner(cbs=[StopAt(2, event, KeyboardInterrupt()), WeightHistCallback()])
    learn.logger = said.append
    with pytest.raises(KeyboardInterrupt): learn.fit_schedule(THREE)
    s = learn.schedule
    assert list(s.table.status) == ['done', 'interrupted', 'not run'] and s.table.ok.tolist() == [True, False, False]
    assert ('freeze_non_bn' in s.ledgers) == (event == 'before_validate') # as far as the fit had come
    assert "Phase 'freeze_non_bn' was interrupted. fit_schedule(..., start='freeze_non_bn')" in said[-1]
    assert learn.weight_hist.phase is None and not learn._grab_cbs(LedgerCallback)
    learn.remove_cb(StopAt)
    assert learn.fit_schedule(THREE, start='freeze_non_bn').ok
    changed = [{**THREE[0], 'epochs': 2}, *THREE[1:]]
    assert list(learn.fit_schedule(changed, start='unfreeze').table.status) == ['skipped', 'done', 'done'] # the first is another phase now


def test_an_error_in_a_fit_is_its_own():
    learn = learner(cbs=StopAt(1, 'before_validate', ValueError('mine')))
    with pytest.raises(ValueError, match='mine') as e: learn.fit_schedule(THREE)
    assert 'Phase' not in str(e.value) and learn.schedule.table.status.iloc[0] == 'failed'


def test_fits_that_end_early_or_do_not_begin():
    stop = EarlyStoppingCallback(patience=1, min_delta=1e3)
    with no_warnings(): s = learner(cbs=stop).fit_schedule([dict(call='freeze_body', epochs=9, lr=1e-2)])
    assert s.ok and s.table.epochs.iloc[0] < 9
    s = learner(cbs=StopAt(2, 'before_fit', CancelFitException())).fit_schedule(THREE)
    assert list(s.table.status) == ['done', 'did not begin', 'done'] and not s.ok


def test_other_parameters_than_planned_are_not_ok():
    class Thaw(Callback):
        order = -7
        def before_train(self): self.model[0][0].weight.requires_grad_(True)
    s = learner(cbs=Thaw()).fit_schedule(THREE[:1])
    assert s.table.status.iloc[0] == 'done, with other parameters than planned' and not s.ok and s.table.tensors.iloc[0] == 5


def test_without_a_recorder_and_with_one_group():
    from fastai.learner import Recorder
    learn = learner(splitter=trainable_params).remove_cb(Recorder)
    s = learn.fit_schedule(THREE)
    assert s.ok and 'train_loss' not in s.table and list(s.table.epochs) == [1, 1, 1]


def test_parameters_frozen_by_hand_before():
    learn = learner(splitter=trainable_params)
    learn.model[0][0].weight.requires_grad_(False)
    s = learn.fit_schedule([THREE[0], dict(call='unfreeze', epochs=1, lr=1e-2)])
    assert s.ok and list(s.table.tensors) == [4, 9] # fastai's unfreeze does not train what the optimizer leaves out
    learn = learner(splitter=trainable_params)
    learn.create_opt() # this optimizer has it
    learn.model[0][0].weight.requires_grad_(False)
    s = learn.fit_schedule([THREE[0], dict(call='unfreeze', epochs=1, lr=1e-2)])
    assert s.ok and list(s.table.tensors) == [4, 10]


def test_rehearsing_does_not_change_a_trained_learner():
    def train(rehearsed):
        learn = learner(opt_func=OPTS['ranger'])
        learn.fit(1)
        if rehearsed:
            with pytest.raises(ValueError, match='selects none'): learn.fit_schedule([*THREE, dict(params='9', epochs=1, lr=1)])
        learn.fit(1)
        return snapshot(learn)
    a, b = train(False), train(True)
    assert all(a[k].equal(b[k]) for k in a)


def test_a_schedule_equals_the_calls_by_hand():
    a = learner()
    a.fit_schedule(THREE)
    b = learner()
    b.freeze_body(bn_stats='hold'); b.fit_one_cycle(1, 1e-2)
    b.freeze_non_bn(); b.fit(1, 1e-2)
    b.unfreeze(); b.fit_flat_cos(1, slice(1e-3, 1e-2), pct_start=.5)
    a, b = snapshot(a), snapshot(b)
    assert all(a[k].equal(b[k]) for k in a)


def test_exported_with_the_learner(tmp_path):
    learn = learner(path=tmp_path)
    learn.fit_schedule(THREE[:1])
    learn.export()
    with no_warnings(): back = load_learner(tmp_path/'export.pkl')
    assert back.schedule.table.equals(learn.schedule.table) and back.schedule.ok


@pytest.mark.parametrize('part', [False, True])
def test_a_compiled_model_has_the_names_of_the_plain_one(part):
    def compile_(m): return torch.compile(m, backend='eager')
    def compiled(model): return nn.Sequential(compile_(model[0]), model[1]) if part else compile_(model)
    phases = [THREE[0], dict(params=['0.1', '1'], epochs=1, lr=1e-2), THREE[2]]
    plain, s = learner().fit_schedule(phases), tiny_learner(compiled(tiny_model()), splitter=trainable_params).fit_schedule(phases)
    assert s.ok and s.planned == plain.planned and list(s.table.status) == ['done']*3
    assert list(s.table.trains) == list(plain.table.trains) == ['1', '0.1, 1', '(the whole model)']
    regex = {0: dict(params=['0.(1|4).*'], epochs=1, lr=1e-2)}
    assert {*read_schedule(regex, compiled(tiny_model()))[0].args['params']} == BNS
    with pytest.raises(ValueError, match='which are 0.0.weight, 0.1.weight'): match_params(compiled(tiny_model()), '9')


def test_a_phase_that_did_not_begin_has_no_table_of_an_earlier_fit():
    class Fail(Callback):
        def after_batch(self): raise RuntimeError('earlier')
    class FailFirst(Callback):
        def before_fit(self): raise RuntimeError('mine')
    learn = learner(cbs=LedgerCallback())
    with pytest.raises(RuntimeError, match='earlier'): learn.fit(1, cbs=Fail())
    with pytest.raises(RuntimeError, match='mine'): learn.fit_schedule([dict(call='unfreeze', epochs=1, lr=1e-2, cbs=FailFirst())])
    s = learn.schedule
    assert s.table.status.iloc[0] == 'failed' and s.table.moved.isna().all() and not s.ledgers
    with pytest.raises(RuntimeError, match='earlier'): learn.fit_schedule([dict(call='unfreeze', epochs=1, lr=1e-2, cbs=Fail())])
    assert learn.schedule.table.moved.iloc[0] == 10 and {*learn.schedule.ledgers} == {'unfreeze'} # as far as it came


def test_epochs_from_numpy_and_phases_below_a_key():
    want = read_schedule(THREE, tiny_model())
    assert read_schedule({'phases': [{**d, 'epochs': np.int64(1)} for d in THREE]}, tiny_model()) == want
    assert read_schedule('phases:' + YAML_LIST, tiny_model()) == want
    assert read_schedule({'phases': {d['call']: d for d in THREE}}, tiny_model()) == want
    with pytest.raises(ValueError, match='epochs must be a whole number of at least 1. Found True'):
        read_schedule([{**THREE[0], 'epochs': True}], tiny_model())


def test_phases_without_a_learning_rate_take_that_of_the_call():
    text = "0: {params: ['1'], max_transition_epoch: 1}\n1: {params: ['0.*'], max_transition_epoch: 2, lr: 1e-4}"
    with pytest.raises(ValueError, match="Phase 'phase 0': lr is missing.*or pass lr= for all that have none"):
        learner().fit_schedule(text)
    s = learner().fit_schedule(text, lr=1e-2)
    assert s.ok and list(s.table.lr) == ['0.01', '0.0001']
    with pytest.raises(ValueError, match="Phase 'phase 0': lr must be a positive number.*Found 'x'"): learner().fit_schedule(text, lr='x')
