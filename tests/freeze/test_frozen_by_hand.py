"""Parameters that were frozen by hand before a call of this library: what each call and the end of a policy do with them"""
import pytest
from helpers import loaders, quiet, tiny_learner, tiny_model
from fastai.basics import Learner, CrossEntropyLossFlat, nn, params, ranger, trainable_params
from freeze_cases import BNS, CONVS, HEAD, Stop, moved, snapshot, two_groups

from fastai_bnstats.freeze import KeepFrozen

BY_HAND = {'0.0.weight'}


def only_trainable(m): return [trainable_params(m[0]), trainable_params(m[1])]


def adapted(splitter=trainable_params, **kwargs):
    "A learner whose first convolution was frozen before training, so that the optimizer leaves it out"
    learn = tiny_learner(splitter=splitter, wd=.1, **kwargs)
    learn.model[0][0].weight.requires_grad_(False)
    return learn


def trainable(learn): return {n for n, p in learn.model.named_parameters() if p.requires_grad}


def check_as_before(learn):
    "All but the parameter that was frozen by hand train, also after fastai's own calls, whatever optimizer they use"
    everything = {n for n, _ in learn.model.named_parameters()}
    assert trainable(learn) == everything-BY_HAND and learn.freeze_policy is None
    for call in (lambda: None, learn.unfreeze, learn.create_opt, learn.unfreeze):
        call()
        before = snapshot(learn)
        learn.fit(1)
        assert moved(learn, before) == {*before}-BY_HAND


# --- a policy, in force on the learner that it gets
def one_call(learn): learn.freeze_body()
def fitted_before(learn): learn.fit(2); learn.freeze_non_bn(bn_stats='batch'); learn.fit(1)
def two_calls(learn): learn.freeze_non_bn(); learn.fit(1); learn.freeze_all(); learn.fit(1)
def new_optimizer(learn): learn.freeze_body(); learn.fit(1, reset_opt=True)
def interrupted(learn):
    learn.freeze_body(bn_stats='batch')
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())


def exported(learn):
    learn.freeze_body(); learn.fit(1)
    learn.export()
    learn.fit(1)


POLICIES = [one_call, fitted_before, two_calls, new_optimizer, interrupted, exported]


@pytest.mark.parametrize('splitter', [trainable_params, only_trainable])
@pytest.mark.parametrize('opt', [None, ranger])
@pytest.mark.parametrize('policy', POLICIES)
def test_unfreeze_gives_back_what_the_policy_froze(policy, opt, splitter, tmp_path):
    if policy is exported and splitter is only_trainable: pytest.skip('fastai cannot export it: its create_opt drops frozen parameters')
    learn = adapted(splitter, path=tmp_path, **(dict(opt_func=opt) if opt else {}))
    before = learn.model[0][0].weight.detach().clone()
    policy(learn)
    in_force, log = repr(learn.freeze_policy), []
    learn.logger = log.append
    learn.unfreeze()
    assert log == [f"unfreeze: 1 tensors, such as 0.0.weight, were frozen by hand before {in_force} and stay frozen. "
                   "learn.unfreeze(bn_stats='update') trains them too."]
    check_as_before(learn)
    assert learn.model[0][0].weight.equal(before)
    learn.unfreeze(bn_stats='update')
    assert len(trainable(learn)) == 10 and learn.splitter is splitter


@pytest.mark.parametrize('end', [lambda l: l.freeze_to(0), lambda l: l.fine_tune(1), lambda l: l.unfreeze()])
@pytest.mark.parametrize('policy', POLICIES[:3])
def test_fastais_calls_end_a_policy(policy, end):
    learn = adapted()
    policy(learn)
    end(learn)
    check_as_before(learn)


@pytest.mark.parametrize('what', ['body', 'non_bn', 'all', 'nothing'])
@pytest.mark.parametrize('fit', [lambda l, cb: l.fit(1, cbs=cb), lambda l, cb: l.fine_tune(1, cbs=cb)])
def test_keep_frozen_leaves_the_learner_as_it_was(what, fit):
    learn = adapted()
    fit(learn, KeepFrozen(what, bn_stats='batch'))
    check_as_before(learn)
    assert learn.splitter is trainable_params


@pytest.mark.parametrize('head', [None, '0'])
def test_a_call_that_fails_changes_nothing(head):
    learn = adapted()
    learn.model[1][2], learn.model[0][1], learn.model[0][4] = nn.Identity(), nn.Identity(), nn.Identity()
    learn.fit(1)
    opt = learn.opt
    with pytest.raises(ValueError, match='no batch norm to train'): learn.freeze_non_bn(head=head)
    assert learn.opt is opt and learn.splitter is trainable_params and learn.freeze_policy is None
    check_as_before(learn)


def test_fastais_freeze_is_not_by_hand():
    "The optimizer holds these parameters, so unfreeze trains them, as without this library"
    learn = tiny_learner(splitter=two_groups, train_bn=False)
    learn.freeze()
    learn.fit(1, reset_opt=True)
    learn.freeze_non_bn(); learn.fit(1)
    learn.unfreeze()
    assert trainable(learn) == HEAD | BNS | CONVS
    before = snapshot(learn)
    learn.fit(1)
    assert moved(learn, before) == {*before}


def test_a_policy_that_trains_a_part_that_was_frozen_by_hand():
    learn = tiny_learner()
    learn.model[1][3].weight.requires_grad_(False)
    learn.freeze_body()
    before = snapshot(learn)
    learn.fit(1)
    assert '1.3.weight' in moved(learn, before) # it is of the head, which was asked for
    learn.unfreeze()
    assert trainable(learn) == (HEAD | BNS | CONVS)-{'1.3.weight'}


def test_a_policy_does_not_outlive_a_splitter_over_a_part():
    "An optimizer over a part of the model is refused by a call of this library, and the learner stays as it was"
    learn = quiet(Learner(loaders(), tiny_model(), loss_func=CrossEntropyLossFlat(), splitter=lambda m: [params(m[1])]))
    learn.fit(1)
    opt = learn.opt
    for call in (lambda: learn.freeze_body(head='1'), lambda: learn.fit(1, cbs=KeepFrozen('body', head='1'))):
        with pytest.raises(ValueError, match='The optimizer lacks 6 parameters of the model'): call()
    assert learn.opt is opt and learn.freeze_policy is None and len(trainable(learn)) == 10
    learn.fine_tune(1)


def test_everything_frozen_by_hand():
    learn = tiny_learner()
    for p in learn.model.parameters(): p.requires_grad_(False)
    learn.freeze_non_bn()
    before = snapshot(learn)
    learn.fit(1)
    assert moved(learn, before) == {*before}-CONVS
    with pytest.raises(IndexError): learn.unfreeze() # as in plain fastai, whose optimizer would have no parameters
    assert not trainable(learn)
    learn.unfreeze(bn_stats='update'); learn.fit(1)
