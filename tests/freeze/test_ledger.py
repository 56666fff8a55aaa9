"""The ledger finds what moved and says why; the doctor finds what is about to go wrong"""
from functools import partial

import pytest
import torch
from conftest import Items, loaders, quiet, tiny_learner, tiny_model
from fastai.basics import Adam, Callback, DataLoader, DataLoaders, Learner, OptimWrapper, SGD, load_learner, nn, params, ranger, trainable_params
from fastai.callback.training import BnFreeze
from test_freeze import AFTER, BEFORE, BNS, CONVS, HEAD, HEAD_STATS, OPTS, POLICIES, PRESETS, SPLITTERS, STATS, interrupt, lr_find, no_warnings, two_groups

from fastai_bnstats.freeze.audit import LedgerCallback, LedgerError, bn_doctor
from fastai_bnstats.freeze.calls import KeepFrozen, bn_splitter


def audited(cbs=(), on_move='raise', **kwargs): return tiny_learner(cbs=[LedgerCallback(on_move), *cbs], splitter=two_groups, **kwargs)


# --- the ledger
@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('how', POLICIES)
@pytest.mark.parametrize('opt', OPTS)
def test_a_kept_promise_is_told(preset, how, opt):
    learn = audited(opt_func=OPTS[opt])
    learn.fit(1)
    getattr(learn, preset)(bn_stats=how)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fit(1)
    t = learn.ledger.table
    assert list(t.index) == [*before] and not len(learn.ledger.broken)
    for n, v in learn.model.state_dict().items(): # largest changes by another road
        assert t['largest change'][n] == (v.double()-before[n].double()).abs().max().item() or abs(t['largest change'][n]/(v.double()-before[n].double()).abs().max().item()-1) < 1e-3
        assert t.found[n] == ('identical' if v.equal(before[n]) else 'moved')
    assert {n for n in t.index if t.declared[n] == 'frozen'} == (CONVS | BNS | HEAD)-PRESETS[preset]
    held = set() if how == 'update' else STATS | HEAD_STATS if preset == 'freeze_all' else STATS
    assert {n for n in t.index if t.declared[n] == 'held'} == held
    assert learn.ledger._before is None # the copy is gone


def drifting(**kwargs):
    learn = audited(train_bn=False, **kwargs)
    learn.fit(1)
    learn.freeze()
    return learn


def after_an_interrupt(): learn = audited(train_bn=False); learn.fit(1); interrupt(learn); learn.freeze(); return learn


def slow_weights():
    learn = audited(opt_func=ranger)
    learn.fit(1)
    for p in learn.model[0].parameters(): p.requires_grad_(False); p.grad = None # by hand, as people do
    return learn


def overwritten():
    class Write(Callback):
        def after_epoch(self): self.model[0][0].weight.data.mul_(2)
    learn = audited([Write()])
    learn.freeze_body()
    return learn


def unfrozen():
    class Thaw(Callback):
        def before_train(self): self.model[0][0].weight.requires_grad_(True)
    learn = audited()
    learn.freeze_body()
    learn.add_cb(Thaw())
    learn.cbs[-1].order = 80
    return learn


def statistics():
    class Train(Callback):
        order = 0
        def before_batch(self): self.model.train()
    learn = audited([Train()])
    learn.freeze_body(bn_stats='hold')
    return learn


def taken_out():
    class Swap(Callback):
        def after_train(self): self.model[0][3] = nn.Identity()
    learn = audited([Swap()])
    learn.freeze_body()
    return learn


BROKEN = [(drifting, CONVS, 'weight decay shrank it: it kept an old gradient'), (partial(drifting, opt_func=SGD, wd=.01), CONVS, 'weight decay shrank it'),
          (after_an_interrupt, CONVS | BNS, 'what is left in that gradient or in its momentum'), (slow_weights, CONVS | BNS, r'slow weights of Lookahead \(ranger\) pulled it'),
          (overwritten, {'0.0.weight'}, 'a callback or your own code wrote to it'), (unfrozen, {'0.0.weight'}, 'it was unfrozen during the fit'),
          (statistics, STATS, 'something set it to training mode between before_batch and the forward pass'), (taken_out, {'0.3.weight'}, 'taken out of the model')]


@pytest.mark.parametrize('make,names,cause', BROKEN)
def test_a_broken_promise_raises_with_name_and_cause(make, names, cause):
    learn = make()
    with pytest.raises(LedgerError, match=cause) as e: learn.fit(2)
    assert {*learn.ledger.broken.index} == names
    assert 'What was declared frozen or held has moved in this fit' in str(e.value) and sorted(names)[0] in str(e.value)
    assert 'BROKEN' in repr(learn.ledger) and '<b>BROKEN</b>' in learn.ledger._repr_html_()
    learn.unfreeze() # the learner goes on
    learn.fit(1)


def test_warns_once_a_fit():
    learn = drifting(on_move='warn')
    with pytest.warns(UserWarning, match='weight decay') as seen: learn.fit(3)
    assert len([w for w in seen if 'declared' in str(w.message)]) == 1 and len(learn.ledger.broken) == 2


def test_the_half_freeze_of_the_scripts():
    "A loop that froze only the first convolution: one row says frozen, all others train"
    learn = audited()
    learn.model[0][0].weight.requires_grad_(False)
    learn.fit(1)
    t = learn.ledger.table
    assert list(t.index[t.declared == 'frozen']) == ['0.0.weight'] and (t.found[t.declared == 'trains'] == 'moved').all()
    assert learn.ledger.summary().startswith('frozen: 1 identical; trains: 9 moved; may move: 9 moved')


def test_only_what_trains_makes_an_entry():
    learn = audited()
    assert 'no fit has ended yet' in repr(learn.ledger) and 'no fit has ended yet' in learn.ledger._repr_html_()
    with pytest.raises(ValueError, match='no table yet'): learn.ledger.broken
    learn.validate(); learn.get_preds(); lr_find(learn)
    assert learn.ledger.table is None
    learn.fit(1)
    table = learn.ledger.table
    learn.validate(); learn.get_preds(); lr_find(learn)
    assert learn.ledger.table is table


def test_validation_inside_a_fit_does_not_end_the_entry():
    class Nested(Callback):
        run_valid = False
        inside = False
        def after_epoch(self):
            if self.inside: return # validate fires after_epoch too
            self.inside = True
            learn.validate()
            self.inside = False
    learn = drifting()
    learn.add_cb(Nested())
    with pytest.raises(LedgerError) as e: learn.fit(3, 1e-2)
    whole = learn.ledger.broken['largest change']['0.0.weight']
    w = learn.model[0][0].weight.abs().max().item()
    assert abs(whole/(w/(1-1e-2*.01)**12-w)-1) < 1e-2 # of all three epochs


def test_after_an_interrupt_the_comparison_is_yours():
    learn = drifting()
    class Stop(Callback):
        def before_validate(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
    assert learn.ledger.table is None and 'learn.ledger.compare()' in repr(learn.ledger)
    learn.get_preds() # must not be taken for the end of it
    assert learn.ledger.table is None
    assert {*learn.ledger.compare().index[learn.ledger.table.verdict == 'BROKEN']} == CONVS
    learn.freeze_non_bn(); learn.fit(1)
    assert not len(learn.ledger.broken)
    with pytest.raises(ValueError, match='no fit to compare with'): learn.ledger.compare()


def test_nothing_per_batch_and_nothing_changed():
    per_batch = {f'{w}_{e}' for w in ('before', 'after', 'after_cancel') for e in ('batch', 'backward', 'step', 'pred', 'loss')}
    assert not per_batch & {*vars(LedgerCallback)}
    plain = tiny_learner(splitter=two_groups); plain.fit(2)
    learn = audited(); learn.fit(2)
    assert all(v.equal(plain.model.state_dict()[k]) for k, v in learn.model.state_dict().items())


def test_bits_not_values():
    class Bits(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)
            for n, v in dict(nan=[float('nan')], zero=[0.], brain=torch.tensor([1.], dtype=torch.bfloat16), count=torch.tensor(3), yes=torch.tensor([True]), none=torch.zeros(0)).items(): self.register_buffer(n, torch.as_tensor(v))
        def forward(self, x): return self.fc(x.mean((2, 3)).repeat(1, 2)[:, :4])
    class Move(Callback):
        def after_train(self): self.model.zero.neg_(); self.model.brain.add_(.01); self.model.count.add_(2)
    learn = tiny_learner(Bits(), cbs=[LedgerCallback(), Move()])
    learn.fit(1)
    t = learn.ledger.table
    assert dict(t.found) == {'fc.weight': 'moved', 'fc.bias': 'moved', 'nan': 'identical', 'zero': 'moved', 'brain': 'moved', 'count': 'moved', 'yes': 'identical', 'none': 'identical'}
    assert t['largest change']['count'] == 2 and t['largest change']['zero'] == 0 and abs(t['largest change']['brain']-.0078125) < 1e-9 and t['shape']['count'] == '1'


def test_lazy_and_shared_tensors():
    conv = nn.Conv2d(4, 4, 1)
    m = nn.Sequential(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), conv, conv), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    learn = tiny_learner(m, cbs=LedgerCallback())
    learn.freeze_body(bn_stats='hold'); learn.fit(1)
    t = learn.ledger.table
    assert t.found['0.0.weight'] == 'new' and t.found['0.1.running_mean'] == 'new' and t.found['0.2.weight'] == 'identical' and '0.3.weight' not in t.index
    learn.fit(1)
    assert learn.ledger.table.found['0.0.weight'] == 'identical' and not len(learn.ledger.broken)


def test_with_a_policy_of_one_fit():
    learn = audited()
    learn.fit(1)
    learn.fine_tune(1, cbs=KeepFrozen('non_bn', bn_stats='hold'))
    t = learn.ledger.table
    assert {*t.index[t.declared == 'frozen']} == CONVS and {*t.index[t.declared == 'held']} == STATS and not len(learn.ledger.broken)


def test_goes_with_an_exported_learner(tmp_path):
    learn = audited(path=tmp_path); learn.fit(1); learn.export()
    with no_warnings(): back = quiet(load_learner(tmp_path/'export.pkl'))
    back.dls = learn.dls
    assert back.ledger.table.equals(learn.ledger.table) and back.ledger._before is None
    back.fit(1)
    assert len(back.ledger.table) == len(learn.ledger.table)


def test_ledger_argument():
    with pytest.raises(ValueError, match="on_move must be 'raise' or 'warn'. Found 'print'"): LedgerCallback('print')


def test_a_policy_replaced_during_a_fit_is_named_as_the_cause():
    class Thaw(Callback):
        def before_epoch(self):
            if self.epoch == 1: self.learn.unfreeze()
    learn = audited([Thaw()])
    learn.freeze_body(bn_stats='hold')
    with pytest.raises(LedgerError, match='(?s)unfrozen during the fit; if that was meant.*the policy was replaced during the fit, by a call that lets statistics follow'): learn.fit(2)


def test_one_line_among_other_callbacks():
    learn = audited(); learn.fit(1)
    assert f'{learn.ledger}' == 'LedgerCallback' and len(repr(learn.ledger).splitlines()) > 15 and '0.0.weight' in str(learn.ledger)


# --- the doctor
def test_a_sound_learner():
    learn = tiny_learner(splitter=two_groups)
    d = bn_doctor(learn)
    assert learn.opt is None and not d.warnings and repr(d).endswith('no warnings') # it was not changed
    assert d.layers.reset_index().values.tolist() == [['0.1', 'BatchNorm2d', 4, 'body', 'trained', 'updated', 'minibatch'], ['0.4', 'BatchNorm2d', 4, 'body', 'trained', 'updated', 'minibatch'],
                                                      ['1.2', 'BatchNorm1d', 4, 'head', 'trained', 'updated', 'minibatch']]
    assert "3 batch norm layers, 1 of them in the head (head = 1 (the splitter's last group))" in d.title and '<table' in d._repr_html_()


@pytest.mark.parametrize('preset,how,want', [('freeze_body', 'hold', ['frozen', 'held', 'statistics']), ('freeze_non_bn', 'batch', ['trained', 'held', 'minibatch']), ('freeze_non_bias', 'update', ['beta trained', 'updated', 'minibatch']),
                                             ('unfreeze', 'hold', ['trained', 'held', 'statistics']), ('freeze_all', 'hold', ['frozen', 'held', 'statistics'])])
def test_the_table_says_what_training_then_does(preset, how, want):
    learn = tiny_learner(splitter=two_groups)
    getattr(learn, preset)(bn_stats=how)
    d, seen = bn_doctor(learn), {}
    assert d.layers.loc['0.1'].tolist()[3:] == want and not d.warnings
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    class Look(Callback):
        order = 99
        def before_batch(self):
            if self.training: seen['by'] = 'minibatch' if learn.model[0][1].training else 'statistics'
    learn.fit(1, cbs=Look())
    now = learn.model.state_dict()
    assert seen['by'] == want[2] and (not now['0.1.running_mean'].equal(before['0.1.running_mean'])) == (want[1] == 'updated')
    assert (not now['0.1.bias'].equal(before['0.1.bias'])) == ('trained' in want[0]) and (not now['0.1.weight'].equal(before['0.1.weight'])) == (want[0] == 'trained')


def with_model(model, **kwargs): return tiny_learner(model, **{'splitter': two_groups, **kwargs})


def freeze_after_fit(**kwargs): learn = with_model(None, **kwargs); learn.fit(1); learn.freeze(); return learn
def sync():
    m = nn.SyncBatchNorm.convert_sync_batchnorm(tiny_model())
    learn = with_model(m); learn.create_opt()
    return learn


def replaced(): learn = with_model(None); learn.create_opt(); learn.model[1][3] = nn.Linear(4, 2); return learn


def foreign(tmp_path):
    theirs = tiny_learner(splitter=bn_splitter, path=tmp_path); theirs.fit(1); theirs.save('theirs')
    learn = tiny_learner(splitter=lambda m: [params(m[1]), params(m[0][:3]), params(m[0][3:])], path=tmp_path)
    with no_warnings(): learn.load('theirs')
    return learn


def edited(f, **kwargs):
    def make():
        learn = with_model(None, **kwargs)
        f(learn)
        return learn
    return make


def untracked(learn): learn.model[0][1] = nn.BatchNorm2d(4, track_running_stats=False)
def lightning(learn): learn.model[0][1].track_running_stats = False
def evaluated(learn): learn.model.train(); learn.model[0][1].eval()
def freeze_flags(learn): [p.requires_grad_(False) for p in learn.model.parameters()]
def freeze_bns(learn): [p.requires_grad_(False) for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
def bare(learn): learn.model[0][1] = nn.BatchNorm2d(4, affine=False)
def one_more(learn): learn.dls = DataLoaders(DataLoader(Items(loaders().train.dataset[:17]), bs=16), loaders().valid)


DOCTOR = {
    'drift': (freeze_after_fit, ['drift'], r'0\.0\.weight, 0\.3\.weight: frozen, but still with an old gradient'),
    'slow weights': (lambda: slow_weights(), ['drift of slow weights', 'frozen layers follow'], 'Lookahead'),
    'BnFreeze': (edited(lambda l: None, cbs=BnFreeze), ['BnFreeze without effect'], '0.1, 0.4, 1.2: BnFreeze acts only'),
    'BnFreeze crashes': (edited(bare, cbs=BnFreeze), ['BnFreeze crashes', 'BnFreeze without effect'], 'crashes when training starts'),
    'SyncBN': (sync, ['SyncBatchNorm'], r'learn.freeze\(\) freezes gamma and beta too'),
    'one group': (edited(lambda l: None, splitter=trainable_params), ['one group'], 'so learn.freeze.. trains everything'),
    'left out': (edited(lambda l: [p.requires_grad_(False) for p in l.model[0][0].parameters()], splitter=trainable_params), ['one group', 'left out'], 'the default splitter will leave it out'),
    'small batches': (edited(lambda l: None, dls=loaders(bs=4)), ['small batches'], '3 layers normalise by the minibatch, and a minibatch has 4 items'),
    'a batch of one': (edited(one_more), ['a batch of one'], r'a single item \(17 = 1×16\+1\)'),
    'no statistics': (edited(untracked), ['no statistics'], 'the minibatch normalises in validation too'),
    'stale statistics': (edited(lightning), ['stale statistics'], 'validation uses old statistics'),
    'eval is undone': (edited(evaluated), ['eval is undone'], r'0\.1: in eval mode, but'),
    'frozen layers follow': (edited(freeze_bns), ['frozen layers follow'], 'requires_grad says nothing about buffers'),
    'nothing trains': (edited(freeze_flags), ['frozen layers follow', 'nothing trains'], 'backward.. will fail'),
    'replaced layer': (replaced, ['unknown to the optimizer', 'gone from the model'], r'1\.3\.weight, 1\.3\.bias: not in the optimizer'),
    'KeepFrozen': (edited(lambda l: None, cbs=KeepFrozen('non_bn')), ['KeepFrozen'], r"KeepFrozen\('non_bn'\) will freeze anew"),
}


@pytest.mark.parametrize('kind', DOCTOR)
def test_the_doctor_finds(kind):
    import re
    make, names, text = DOCTOR[kind]
    learn = make()
    flags, opt = [p.requires_grad for p in learn.model.parameters()], learn.opt
    d = bn_doctor(learn)
    assert list(d.warnings) == names and re.search(text, ' '.join(d.warnings.values()))
    assert all(n in repr(d) and n in d._repr_html_() for n in names)
    assert flags == [p.requires_grad for p in learn.model.parameters()] and learn.opt is opt


def test_the_doctor_finds_an_optimizer_of_another_splitter(tmp_path):
    d = bn_doctor(foreign(tmp_path))
    assert 'loaded from a learner with another splitter' in d.warnings['foreign optimizer'] and "marked 'force_train'" in d.warnings['flags']


@pytest.mark.parametrize('kind', ['drift', 'BnFreeze crashes', 'SyncBN', 'one group', 'a batch of one', 'eval is undone', 'frozen layers follow', 'nothing trains'])
def test_what_the_doctor_says_comes_true(kind):
    learn = DOCTOR[kind][0]()
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    moved = lambda: {k for k, v in learn.model.state_dict().items() if not v.equal(before[k])}
    if kind == 'drift': learn.fit(1); assert CONVS <= moved()
    if kind == 'BnFreeze crashes': pytest.raises((StopIteration, IndexError), learn.fit, 1)
    if kind == 'SyncBN': learn.freeze(); assert not learn.model[0][1].weight.requires_grad
    if kind == 'one group': learn.freeze(); assert all(p.requires_grad for p in learn.model.parameters())
    if kind == 'a batch of one': pytest.raises(ValueError, learn.fit, 1)
    if kind in ('eval is undone', 'frozen layers follow'): learn.fit(1); assert '0.1.running_mean' in moved()
    if kind == 'nothing trains': pytest.raises(RuntimeError, learn.fit, 1)


def test_the_remedies_of_the_doctor_help(tmp_path):
    for kind in ('drift', 'slow weights', 'BnFreeze', 'SyncBN', 'one group', 'small batches', 'eval is undone', 'frozen layers follow', 'nothing trains'):
        learn = DOCTOR[kind][0]()
        learn.freeze_non_bn(bn_stats='hold')
        left = {*bn_doctor(learn).warnings}-{'BnFreeze without effect', 'small batches', 'eval is undone', 'SyncBatchNorm'} # these tell of a callback, a number, a flag that are still there
        assert not left, kind


def test_the_head_of_the_call_is_the_doctors():
    learn = tiny_learner(splitter=two_groups)
    learn.freeze_non_bn(head='1.3', bn_stats='hold')
    d = bn_doctor(learn)
    assert 'head = 1.3' in d.title and "freeze_non_bn(head='1.3', bn_stats='hold')" in d.title and d.layers.part['1.2'] == 'body'
    assert bn_doctor(learn, head='1').layers.part['1.2'] == 'head'


def test_other_buffers_and_doubtful_heads():
    m = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten(), nn.BatchNorm1d(144))
    d = bn_doctor(tiny_learner(m))
    assert '0.parametrizations.weight.0, 1: collects statistics' in d.warnings['other buffers'] and d.warnings['doubtful head'].startswith('3: it is a norm layer')


def test_what_the_doctor_refuses():
    for x, found in ((None, 'NoneType'), ('learn', 'str')):
        with pytest.raises(ValueError, match=f'bn_doctor takes a Learner. Found {found}'): bn_doctor(x)


def test_no_batch_norm_at_all():
    d = bn_doctor(tiny_learner(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))))
    assert len(d.layers) == 0 and '(no batch norm layers)' in repr(d) and '<div' not in d._repr_html_()
    with pytest.raises(ValueError, match="Found 'fc'"): bn_doctor(tiny_learner(), head='fc')
