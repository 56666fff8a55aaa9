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
    assert {*led.broken.index} == STATS and "See the ledger's .table for all tensors" in str(e.value)
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
    (by_hand, 'it has no gradient now: your own code changed it, or loaded a checkpoint, or the optimizer used an old gradient'),
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
    with pytest.raises(ValueError, match=r'no table yet: it is made when a training ends.*the ledger.s .compare\(\)'): _ = led.broken
    led.start()
    assert "a training has begun and not ended; the ledger's .compare()" in repr(led)
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
    (dict(frozen='body.*'), r"frozen='body\.\*' must match parameters or buffers.*There are: 0.0.weight"),
    (dict(trains=lambda n: False), 'trains=<function .* must match parameters or buffers'),
    (dict(frozen='0.*', trains='1.*'), r'Pass frozen= or trains=, not both'), (dict(on_move='stop'), "must be 'raise' or 'warn'")])
def test_wrong_arguments_raise_before_training(kwargs, text):
    with pytest.raises(ValueError, match=text), Ledger(model_with_frozen(), **kwargs): raise AssertionError('the training has begun')


def test_nothing_may_move():
    m = model_with_frozen()
    with pytest.raises(LedgerError), Ledger(m, trains=[]) as led: train(m)
    assert (led.table.declared == 'frozen').all() and len(led.broken) > 10
    with Ledger(m, trains=[]): m.eval()(torch.randn(4, 3, 8, 8))


def test_tied_weights_have_all_their_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.c = self.a
    for name in ('a.weight', 'b.weight', 'c.*'):
        with Ledger(Tied(), frozen=name) as led: pass
        assert list(led.table.index) == ['a.weight', 'a.bias', 'b.bias'] and led.table.declared['a.weight'] == 'frozen'


def test_models_without_tensors_and_what_is_no_model():
    with Ledger(nn.ReLU()) as led: pass
    assert len(led.table) == len(led.broken) == 0 and led.summary() == ''
    with pytest.raises(TypeError, match='model must be a torch.nn.Module. Found generator'): Ledger(nn.Linear(1, 1).parameters())


def test_begun_twice_or_ended_within():
    m = model_with_frozen(*CONVS)
    with Ledger(m) as led:
        with pytest.raises(RuntimeError, match='has begun already'), led: pass
        train(m)
        led.end()
    assert led.summary().startswith('frozen: 2 identical')
    with led: train(m) # again


def test_tensors_that_can_not_be_read_any_more_do_not_hide_the_error():
    m = model_with_frozen()
    with pytest.raises(KeyboardInterrupt), Ledger(m) as led:
        m.to('meta')
        raise KeyboardInterrupt
    assert led._before is None
