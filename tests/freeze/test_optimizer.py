"""The optimizer holds every parameter, and an optimizer of another learner is refused"""
from functools import partial

import pytest
import torch
from helpers import loaders, tiny_learner, tiny_model
from fastai.basics import Callback, OptimWrapper, params, ranger, trainable_params
from freeze_cases import CONVS, HEAD, HEAD_STATS, OPTS, STATS, moved, no_warnings, slow_weights, snapshot

from fastai_bnstats.freeze import KeepFrozen, bn_splitter
from fastai_bnstats.freeze.optimizer import clear_frozen, missing_params


def test_parameters_frozen_before_the_optimizer_was_made_come_back():
    learn = tiny_learner()
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    learn.fit(1)
    assert len(learn.opt.all_params()) == 4
    learn.unfreeze(bn_stats='update')
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == {*snap}


def only_trainable(m): return [trainable_params(m[0]), trainable_params(m[1])]
def flat_list(m): return list(m.parameters())
def one_group(m): return [params(m)]


@pytest.mark.parametrize('splitter', [only_trainable, flat_list, one_group])
def test_splitters_of_every_kind(splitter):
    learn = tiny_learner(splitter=splitter)
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    learn.fit(1)
    learn.freeze_non_bn()
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == {*snap}-CONVS


def test_groups_of_torch_dicts():
    groups = lambda m: [{'params': list(m[0].parameters()), 'lr': 1e-3}, {'params': list(m[1].parameters())}]
    learn = tiny_learner(splitter=groups, opt_func=partial(OptimWrapper, opt=torch.optim.SGD, convert_groups=False))
    learn.freeze_body()
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == HEAD | STATS | HEAD_STATS


def test_an_optimizer_built_by_hand_that_lacks_parameters_is_refused():
    m = tiny_model()
    learn = tiny_learner(m, opt_func=OptimWrapper(opt=torch.optim.SGD(m[1].parameters(), lr=.1)))
    with pytest.raises(ValueError, match=r'lacks 6 parameters of the model, such as 0\.0\.weight: its opt_func .* Change opt_func'):
        learn.freeze_body()
    learn = tiny_learner(m, opt_func=OptimWrapper(opt=torch.optim.SGD(m.parameters(), lr=.1)))
    learn.freeze_body()
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == HEAD | STATS | HEAD_STATS


# as many groups as bn_splitter makes, and as many parameters in each
def other_groups(m): return [params(m[1][3]), params(m[1][2])+params(m[0][1]), params(m[0][4])+[m[0][0].weight, m[0][3].weight]]


@pytest.mark.parametrize('opt', OPTS)
def test_an_optimizer_of_another_splitter_is_refused_by_each_call_and_policy(opt, tmp_path):
    theirs = tiny_learner(splitter=bn_splitter, opt_func=OPTS[opt], path=tmp_path)
    theirs.fit(2); theirs.save('theirs')
    learn = tiny_learner(splitter=other_groups, opt_func=OPTS[opt], path=tmp_path)
    with no_warnings(): learn.load('theirs')
    error = (r"optimizer's state does not fit the model: parameter \S+ has shape .*, but its \S+ has shape .* "
             r"loaded from a learner with another splitter.*learn.create_opt\(\)")
    for call in (learn.freeze_non_bn, learn.freeze_body, learn.freeze_all, lambda: learn.unfreeze(bn_stats='update')):
        with pytest.raises(ValueError, match=error): call()
    with pytest.raises(RuntimeError, match='size of tensor|broadcast shape'): learn.fit(1) # without a policy, as in plain fastai
    learn.create_opt() # the remedy
    learn.freeze_non_bn(head='1')
    snap = snapshot(learn)
    learn.fit(1)
    assert moved(learn, snap) == {*snap}-CONVS
    with no_warnings(): learn.load('theirs')
    for call in (lambda: learn.fit(1), lambda: learn.fine_tune(1), learn.freeze, learn.unfreeze): # with a policy
        with pytest.raises(ValueError, match=error): call()
    assert repr(learn.freeze_policy) == "freeze_non_bn(head='1')"


def split_at(i):
    def split(m): ps = params(m); return [ps[:i], ps[i:]]
    return split


def test_slow_weights_are_compared_group_by_group(tmp_path):
    "The order of the parameters is the same, but the groups have other boundaries: the state fits and the slow weights don't"
    theirs = tiny_learner(splitter=split_at(4), opt_func=ranger, path=tmp_path)
    theirs.fit(2); theirs.save('theirs')
    learn = tiny_learner(splitter=split_at(6), opt_func=ranger, path=tmp_path)
    with no_warnings(): learn.load('theirs')
    error = r"parameter group 0 has 6 parameters, but 4 slow_weights .* loaded from a learner with another splitter"
    with pytest.raises(ValueError, match=error): learn.freeze_body()
    learn.create_opt()
    learn.freeze_body()
    learn.fit(1)


def one_number(learn): return {p: torch.zeros(()) for p in learn.model.parameters()}         # NovoGrad
def one_element(learn): return {p: torch.zeros(1) for p in learn.model.parameters()}
def rows(learn): return {p: torch.zeros(p.shape[:1]) for p in learn.model.parameters() if p.ndim > 1} # as in Adafactor


@pytest.mark.parametrize('state,key', [(one_number, 'exp_avg_sq'), (one_element, 'exp_avg_sq'), (one_element, 'exp_avg'),
                                       (rows, 'exp_avg_sq_row')])
def test_state_with_shapes_of_its_own_is_no_reason_to_refuse(state, key):
    learn = tiny_learner(tiny_model(classes=1), loaders(classes=1), opt_func=partial(OptimWrapper, opt=torch.optim.SGD))
    learn.fit(1)
    for p, s in state(learn).items(): learn.opt.opt.state[p] = {key: s}
    learn.freeze_non_bn()
    for p, s in state(learn).items(): learn.opt.opt.state[p] = {key: s}
    learn.fit(1)


def test_state_of_another_shape_is_no_reason_to_refuse():
    "Optimizers keep factored or quantised state"
    learn = tiny_learner(opt_func=partial(OptimWrapper, opt=torch.optim.Adafactor))
    learn.fit(1)
    learn.freeze_non_bn(); learn.fit(1)
    for p in learn.model.parameters(): learn.opt.opt.state[p]['qmap'] = torch.zeros(256)
    learn.fit(1)


def test_a_fit_keeps_its_learning_rates_when_it_makes_a_new_optimizer():
    learn, seen = tiny_learner(), []
    class Look(Callback):
        def after_step(self): seen.append((self.opt.hypers[0]['lr'], self.opt.hypers[0]['wd'], len(self.opt.all_params())))
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    learn.create_opt()
    learn.fit(1, .123, wd=.045, cbs=[KeepFrozen('nothing'), Look()])
    assert {*seen} == {(.123, .045, 10)} and len(learn.opt.all_params()) == 4


def test_missing_parameters_are_named():
    learn = tiny_learner()
    learn.model[0][0].weight.requires_grad_(False)
    learn.create_opt()
    learn.model[0][0].weight.requires_grad_(True)
    assert missing_params(learn) == ['0.0.weight']
    learn.unfreeze(bn_stats='update')
    assert missing_params(learn) == []


def test_clear_frozen():
    learn = slow_weights()
    clear_frozen(learn)
    snap = snapshot(learn)
    learn.fit(3)
    assert moved(learn, snap) == HEAD | STATS | HEAD_STATS
    learn = tiny_learner(opt_func=ranger)
    clear_frozen(learn) # without an optimizer there is nothing to do
    learn.fit(1); clear_frozen(learn)
    assert all(p.grad is not None for p in learn.model.parameters()) # nothing is frozen
