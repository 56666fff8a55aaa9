"""The ledger finds which tensors moved and why"""
from functools import partial

import pytest
import torch
from helpers import quiet, tiny_learner, tiny_model
from fastai.basics import Callback, SGD, load_learner, nn
from freeze_cases import (BNS, CONVS, HEAD, HEAD_STATS, OPTS, POLICIES, PRESETS, STATS, interrupt, lr_find, no_warnings, slow_weights,
                          two_groups)

from fastai_bnstats.freeze import KeepFrozen, LedgerCallback, LedgerError
from fastai_bnstats.record import WeightHistCallback


def audited(cbs=(), on_move='raise', **kwargs): return tiny_learner(cbs=[LedgerCallback(on_move), *cbs], splitter=two_groups, **kwargs)


@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('how', POLICIES)
@pytest.mark.parametrize('opt', OPTS)
def test_frozen_and_held_tensors_are_identical(preset, how, opt):
    learn = audited(opt_func=OPTS[opt])
    learn.fit(1)
    getattr(learn, preset)(bn_stats=how)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    learn.fit(1)
    t = learn.ledger.table
    assert list(t.index) == [*before] and not len(learn.ledger.broken)
    for n, v in learn.model.state_dict().items(): # largest changes, computed independently
        change = (v.double()-before[n].double()).abs().max().item()
        assert t['largest change'][n] == change or abs(t['largest change'][n]/change-1) < 1e-3
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


def removed():
    class Swap(Callback):
        def after_train(self): self.model[0][3] = nn.Identity()
    learn = audited([Swap()])
    learn.freeze_body()
    return learn


BROKEN = [(drifting, CONVS, 'weight decay shrank it: it kept an old gradient'),
          (partial(drifting, opt_func=SGD, wd=.01), CONVS, 'weight decay shrank it'),
          (after_an_interrupt, CONVS | BNS, 'the optimizer updated it with that gradient or with its momentum'),
          (partial(slow_weights, LedgerCallback()), CONVS | BNS, r'slow weights of Lookahead \(ranger\) pulled it'),
          (overwritten, {'0.0.weight'}, 'a callback or your own code changed it'),
          (unfrozen, {'0.0.weight'}, 'it was unfrozen during the fit'),
          (statistics, STATS, 'something set it to training mode between before_batch and the forward pass'),
          (removed, {'0.3.weight'}, 'its module was removed from the model')]


@pytest.mark.parametrize('make,names,cause', BROKEN)
def test_a_moved_tensor_raises_with_name_and_cause(make, names, cause):
    learn = make()
    with pytest.raises(LedgerError, match=cause) as e: learn.fit(2)
    assert {*learn.ledger.broken.index} == names
    assert 'Tensors that were declared frozen or held changed in this fit' in str(e.value) and sorted(names)[0] in str(e.value)
    assert 'BROKEN' in repr(learn.ledger) and '<b>BROKEN</b>' in learn.ledger._repr_html_()
    learn.unfreeze() # the learner is still usable
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


def test_only_training_makes_a_table():
    learn = audited()
    assert 'no fit has ended yet' in repr(learn.ledger) and 'no fit has ended yet' in learn.ledger._repr_html_()
    with pytest.raises(ValueError, match=r'no table yet.*learn.ledger.compare\(\)'): _ = learn.ledger.broken
    learn.validate(); learn.get_preds(); lr_find(learn)
    assert learn.ledger.table is None
    learn.fit(1)
    table = learn.ledger.table
    learn.validate(); learn.get_preds(); lr_find(learn)
    assert learn.ledger.table is table


def test_validation_inside_a_fit_does_not_end_the_comparison():
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
    with pytest.raises(LedgerError): learn.fit(3, 1e-2)
    whole = learn.ledger.broken['largest change']['0.0.weight']
    w = learn.model[0][0].weight.abs().max().item()
    assert abs(whole/(w/(1-1e-2*.01)**12-w)-1) < 1e-2 # of all three epochs


def test_after_an_interrupt_compare_is_called_by_hand():
    learn = drifting()
    class Stop(Callback):
        def before_validate(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=Stop())
    assert learn.ledger.table is None and 'learn.ledger.compare()' in repr(learn.ledger)
    learn.get_preds() # this is not the end of the fit
    assert learn.ledger.table is None
    assert {*learn.ledger.compare().index[learn.ledger.table.verdict == 'BROKEN']} == CONVS
    learn.freeze_non_bn(); learn.fit(1)
    assert not len(learn.ledger.broken)
    with pytest.raises(ValueError, match='no fit to compare with'): learn.ledger.compare()


def test_no_work_per_batch_and_no_change_to_training():
    per_batch = {f'{w}_{e}' for w in ('before', 'after', 'after_cancel') for e in ('batch', 'backward', 'step', 'pred', 'loss')}
    assert not per_batch & {*vars(LedgerCallback)}
    plain = tiny_learner(splitter=two_groups); plain.fit(2)
    learn = audited(); learn.fit(2)
    assert all(v.equal(plain.model.state_dict()[k]) for k, v in learn.model.state_dict().items())


def test_bits_are_compared_and_not_values():
    class Bits(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)
            buffers = dict(nan=[float('nan')], zero=[0.], brain=torch.tensor([1.], dtype=torch.bfloat16), count=torch.tensor(3),
                           yes=torch.tensor([True]), none=torch.zeros(0))
            for n, v in buffers.items(): self.register_buffer(n, torch.as_tensor(v))
        def forward(self, x): return self.fc(x.mean((2, 3)).repeat(1, 2)[:, :4])
    class Move(Callback):
        def after_train(self): self.model.zero.neg_(); self.model.brain.add_(.01); self.model.count.add_(2)
    learn = tiny_learner(Bits(), cbs=[LedgerCallback(), Move()])
    learn.fit(1)
    t = learn.ledger.table
    moves, stays = ('fc.weight', 'fc.bias', 'zero', 'brain', 'count'), ('nan', 'yes', 'none')
    assert dict(t.found) == {**dict.fromkeys(moves, 'moved'), **dict.fromkeys(stays, 'identical')} and t['shape']['count'] == '1'
    change = t['largest change']
    assert change['count'] == 2 and change['zero'] == 0 and abs(change['brain']-.0078125) < 1e-9


def test_lazy_and_shared_tensors():
    conv = nn.Conv2d(4, 4, 1)
    body = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), conv, conv)
    m = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    learn = tiny_learner(m, cbs=LedgerCallback())
    learn.freeze_body(bn_stats='hold'); learn.fit(1)
    t = learn.ledger.table
    assert t.found['0.0.weight'] == 'new' and t.found['0.1.running_mean'] == 'new'
    assert t.found['0.2.weight'] == 'identical' and '0.3.weight' not in t.index
    learn.fit(1)
    assert learn.ledger.table.found['0.0.weight'] == 'identical' and not len(learn.ledger.broken)


def test_with_a_policy_of_one_fit():
    learn = audited()
    learn.fit(1)
    learn.fine_tune(1, cbs=KeepFrozen('non_bn', bn_stats='hold'))
    t = learn.ledger.table
    assert {*t.index[t.declared == 'frozen']} == CONVS and {*t.index[t.declared == 'held']} == STATS and not len(learn.ledger.broken)


def test_exported_with_the_learner(tmp_path):
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
    with pytest.raises(LedgerError, match="(?s)unfrozen during the fit; if this was intended, use LedgerCallback.'warn'.*"
                                          "the policy was replaced during the fit, by a call that lets statistics follow"): learn.fit(2)


def test_one_line_among_other_callbacks():
    learn = audited(); learn.fit(1)
    assert f'{learn.ledger}' == 'LedgerCallback' and len(repr(learn.ledger).splitlines()) > 15 and '0.0.weight' in str(learn.ledger)


def test_broken_rows_come_first():
    class Write(Callback):
        def after_epoch(self): self.model[0][3].weight.data.mul_(2); self.model[0][4].bias.data.add_(1)
    learn = audited([Write()])
    learn.freeze_body()
    with pytest.raises(LedgerError): learn.fit(1)
    t, broken = learn.ledger.table, ['0.3.weight', '0.4.bias']
    assert list(t.index) == broken+[n for n in learn.model.state_dict() if n not in broken] # otherwise the order of the model
    assert list(t.verdict[:3]) == ['BROKEN', 'BROKEN', 'ok']


NORMS = {'batch norm': tiny_model,
         'group, layer and instance norm': lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(
             4, affine=True, track_running_stats=True), nn.Conv2d(4, 4, 3), nn.LayerNorm([4, 4, 4]), nn.Flatten(), nn.Linear(64, 2)),
         'no parameters': lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(144, 2)),
         'synchronised': lambda: nn.SyncBatchNorm.convert_sync_batchnorm(tiny_model()),
         'transformer': lambda: nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 8, batch_first=True), nn.Flatten(),
                                              nn.Linear(192, 2)),
         'spectral norm': lambda: nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(192, 2)))}


@pytest.mark.parametrize('model', NORMS)
def test_the_ledger_and_the_recording_name_the_same_kinds(model):
    learn = tiny_learner(NORMS[model](), cbs=[LedgerCallback(), WeightHistCallback(layers='all')])
    learn.fit(1)
    kinds, rec = learn.ledger.table.kind, learn.weight_hist.recording
    recorded = dict(zip(rec.names, rec.kind, strict=True))
    if model == 'spectral norm': assert recorded.pop('1.weight') == 'weight' # computed from `parametrizations.weight.original`
    assert {n: kinds[n] for n in recorded} == recorded and len(recorded) > 1
    assert ({'gamma', 'beta'} <= {*kinds}) == (model not in ('no parameters', 'spectral norm'))


class Complex(nn.Module):
    "A Fourier layer"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 5, dtype=torch.complex64))
    def forward(self, x): return torch.fft.irfft2(torch.fft.rfft2(x)*self.w, s=(8, 8))


@pytest.mark.parametrize('opt', ['torch AdamW', 'torch SGD', 'SGD'])
def test_complex_parameters(opt):
    learn = audited(model=nn.Sequential(Complex(), nn.Sequential(nn.Flatten(), nn.Linear(192, 2))), opt_func=OPTS[opt], wd=.1)
    learn.fit(1)
    learn.freeze_body()
    assert not learn.model[0].w.requires_grad
    before = learn.model[0].w.detach().clone()
    learn.fit(1)
    assert learn.model[0].w.equal(before) and learn.ledger.table.declared['0.w'] == 'frozen'
    learn.unfreeze()
    learn.fit(1)
    assert learn.model[0].w.requires_grad and not learn.model[0].w.equal(before)
    for factor, cause in ((.5, 'weight decay shrank it'), (-1j, 'with that gradient or with its momentum')):
        learn.freeze_body()
        class Write(Callback):
            def after_epoch(self):
                w = self.model[0].w
                w.grad = torch.zeros_like(w)
                w.data.mul_(factor) # noqa: B023
        with pytest.raises(LedgerError, match=cause): learn.fit(1, cbs=Write())
        assert learn.ledger.table['largest change']['0.w'] > 0
