"""`Ledger` in a plain loop: what is declared, what is found, and the likely cause"""
import pytest
import torch
from helpers import tiny_model
from fastai.basics import nn

from fastai_bnstats.freeze import Ledger, LedgerError

STATS = {f'{n}.{k}' for n in ('0.1', '0.4', '1.2') for k in ('running_mean', 'running_var', 'num_batches_tracked')}
CONVS = {'0.0.weight', '0.3.weight'}


def train(model, opt=None, steps=2):
    opt = opt or torch.optim.SGD(model.parameters(), .1, weight_decay=.01)
    for _ in range(steps):
        opt.zero_grad(set_to_none=False)
        model(torch.randn(4, 3, 8, 8)).square().mean().backward()
        opt.step()


def model_with_frozen(*names):
    torch.manual_seed(0)
    m = tiny_model()
    for n in names: m.get_parameter(n).requires_grad_(False)
    return m


def test_by_default_the_flags_declare():
    m = model_with_frozen(*CONVS)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    with Ledger(m) as led: train(m)
    t = led.table
    assert list(t.index) == [*before] and {*t.index[t.declared == 'frozen']} == CONVS and {*t.index[t.declared == 'may move']} == STATS
    for n, v in m.state_dict().items(): assert (t.found[n] == 'identical') == v.equal(before[n])
    assert not len(led.broken) and 'frozen: 2 identical' in repr(led) and '<table' in led._repr_html_()


@pytest.mark.parametrize('frozen', ['0.0.*', ['0.0.weight'], lambda n: n.startswith('0.0.')])
def test_what_frozen_names_must_not_move_whatever_the_flags_say(frozen):
    m = model_with_frozen()
    with pytest.raises(LedgerError, match='it requires a gradient, so an optimizer updates it: call .requires_grad_'), \
            Ledger(m, frozen=frozen) as led: train(m)
    assert list(led.broken.index) == ['0.0.weight'] and led.table.declared['0.3.weight'] == 'trains'
    with Ledger(m, frozen=frozen): train(m, torch.optim.SGD(m[1].parameters(), .1))


def test_what_trains_does_not_name_must_not_move():
    m = model_with_frozen(*CONVS)
    with pytest.raises(LedgerError, match='put their layer in eval mode, again after each model.train') as e, \
            Ledger(m, trains=lambda n: 'weight' in n or 'bias' in n) as led: train(m)
    assert {*led.broken.index} == STATS and 'Ledger.table lists all tensors' in str(e.value)
    assert led.table.verdict['0.0.weight'] == 'did not train' # it was meant to, and has no gradient
    m.eval()
    with Ledger(m, trains='*.[wb]*') as led: train(m)
    assert led.summary() == 'trains: 2 identical, 8 moved; frozen: 9 identical'


def old_gradient(decay):
    m = model_with_frozen()
    opt = torch.optim.SGD(m.parameters(), .1, weight_decay=decay, momentum=0. if decay else .9)
    train(m, opt)
    m.get_parameter('0.0.weight').requires_grad_(False)
    with Ledger(m): train(m, opt)


def unfrozen():
    m = model_with_frozen('0.0.weight')
    with Ledger(m):
        m.requires_grad_(True)
        train(m)


def by_hand():
    m = model_with_frozen('0.0.weight')
    with Ledger(m), torch.no_grad(): m.get_parameter('0.0.weight').add_(1)


def removed():
    m = model_with_frozen('0.0.weight')
    with Ledger(m): m[0][0] = nn.Identity()


@pytest.mark.parametrize('run,cause', [
    (lambda: old_gradient(.01), 'weight decay shrank it.*Give the optimizer only parameters that train, or set its .grad to None'),
    (lambda: old_gradient(0), 'with that gradient or with its momentum'),
    (unfrozen, "it was unfrozen during the training; if this was intended, use on_move='warn'"),
    (by_hand, 'it has no gradient, so not the optimizer: your own code changed it, or loaded a checkpoint'),
    (removed, 'its module was removed from the model during the training')])
def test_likely_causes(run, cause):
    with pytest.raises(LedgerError, match=f'(?s)frozen or held changed in this training.*0.0.weight.*{cause}'): run()


def test_warn():
    m = model_with_frozen()
    with pytest.warns(UserWarning, match='changed in this training') as seen, Ledger(m, frozen='0.0.*', on_move='warn') as led: train(m)
    assert seen[0].filename == __file__ and len(led.broken) == 1


def test_an_error_of_the_training_is_not_hidden():
    m = model_with_frozen()
    with pytest.raises(ZeroDivisionError), Ledger(m, frozen='0.0.*') as led:
        train(m)
        _ = 1/0
    assert list(led.broken.index) == ['0.0.weight']


def test_look_in_between():
    m = model_with_frozen(*CONVS)
    led = Ledger(m)
    assert repr(led) == 'Ledger: no training has ended yet'
    with pytest.raises(ValueError, match='There is no training to compare with'): led.compare()
    with pytest.raises(ValueError, match=r'no table yet: it is made when a training ends.*Ledger.compare\(\)'): _ = led.broken
    led.start()
    assert 'a training has begun and not ended; Ledger.compare()' in repr(led)
    assert (led.compare().found == 'identical').all()
    train(m)
    assert (led.compare().found == 'moved').sum() > 10
    led.end()
    train(m) # afterwards
    assert (led.table.found['1.3.weight'], len(led.broken)) == ('moved', 0)


def test_names_do_not_show_wrappers():
    m = model_with_frozen(*CONVS)
    with Ledger(nn.DataParallel(m)) as led: pass
    with Ledger(torch.compile(m)) as compiled: pass
    assert list(led.table.index) == list(compiled.table.index) == [*m.state_dict()]


@pytest.mark.parametrize('kwargs,text', [
    (dict(frozen='body.*'), r"No layer matches 'body\.\*'. There are: 0.0.weight"), (dict(trains=[]), 'selects nothing'),
    (dict(frozen='0.*', trains='1.*'), r'Pass frozen= or trains=, not both'), (dict(on_move='stop'), "must be 'raise' or 'warn'")])
def test_wrong_arguments_raise_before_training(kwargs, text):
    with pytest.raises(ValueError, match=text), Ledger(model_with_frozen(), **kwargs): raise AssertionError('the training has begun')
