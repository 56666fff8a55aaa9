"""The doctor shows what batch norm will do in training, and warns of mistakes"""
import re
from functools import partial

import pytest
import torch
from helpers import Items, loaders, tiny_learner, tiny_model
from fastai.basics import Adam, Callback, DataLoader, DataLoaders, nn, params, ranger, trainable_params
from fastai.callback.training import BnFreeze
from freeze_cases import CONVS, POLICIES, PRESETS, moved, no_warnings, slow_weights, snapshot, two_groups

from fastai_bnstats.freeze import KeepFrozen, bn_doctor, bn_splitter


def test_a_sound_learner():
    learn = tiny_learner(splitter=two_groups)
    d = bn_doctor(learn)
    assert learn.opt is None and not d.warnings and repr(d).endswith('no warnings') # it was not changed
    rest = ['trained', 'updated', 'minibatch']
    assert d.layers.reset_index().values.tolist() == [['0.1', 'BatchNorm2d', 4, 'body', *rest], ['0.4', 'BatchNorm2d', 4, 'body', *rest],
                                                      ['1.2', 'BatchNorm1d', 4, 'head', *rest]]
    assert "3 batch norm layers, 1 of them in the head (head = 1 (the splitter's last group))" in d.title and '<table' in d._repr_html_()


@pytest.mark.parametrize('preset,how,want', [
    ('freeze_body', 'hold', ['frozen', 'held', 'statistics']), ('freeze_non_bn', 'batch', ['trained', 'held', 'minibatch']),
    ('freeze_non_bias', 'update', ['beta trained', 'updated', 'minibatch']),
    ('unfreeze', 'hold', ['trained', 'held', 'statistics']), ('freeze_all', 'hold', ['frozen', 'held', 'statistics'])])
def test_training_does_what_the_table_shows(preset, how, want):
    learn = tiny_learner(splitter=two_groups)
    getattr(learn, preset)(bn_stats=how)
    d, seen = bn_doctor(learn), {}
    assert d.layers.loc['0.1'].tolist()[3:] == want and not d.warnings
    before = snapshot(learn)
    class Look(Callback):
        order = 99
        def before_batch(self):
            if self.training: seen['by'] = 'minibatch' if learn.model[0][1].training else 'statistics'
    learn.fit(1, cbs=Look())
    now = moved(learn, before)
    assert seen['by'] == want[2] and ('0.1.running_mean' in now) == (want[1] == 'updated')
    assert ('0.1.bias' in now) == ('trained' in want[0]) and ('0.1.weight' in now) == (want[0] == 'trained')


class Watch(Callback):
    "How each batch norm layer normalises in training, by its input and its output"
    order = 99
    def before_train(self):
        self.by, self.handles = {}, []
        for n, m in self.learn.model.named_modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)): self.handles.append(m.register_forward_hook(partial(self.look, n)))
    def look(self, name, m, xs, y):
        if not self.training: return
        dims = [d for d in range(xs[0].ndim) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(xs[0].ndim)]
        mean, var = xs[0].mean(dims), xs[0].var(dims, unbiased=False)
        x = (xs[0]-mean.view(shape))/(var+m.eps).sqrt().view(shape)
        self.by.setdefault(name, set()).add('minibatch' if torch.allclose(y, x*m.weight.view(shape)+m.bias.view(shape), atol=1e-4)
                                            else 'statistics')
    def after_train(self): [h.remove() for h in self.handles]


@pytest.mark.parametrize('train_bn', [True, False])
@pytest.mark.parametrize('bn_freeze', [False, True])
@pytest.mark.parametrize('how', POLICIES)
@pytest.mark.parametrize('preset', [*PRESETS, 'freeze', 'nothing'])
def test_the_table_shows_what_a_forward_hook_sees(preset, how, bn_freeze, train_bn):
    learn = tiny_learner(splitter=two_groups, train_bn=train_bn, cbs=[BnFreeze] if bn_freeze else [])
    learn.fit(1)
    if preset == 'freeze': learn.freeze()
    elif preset != 'nothing': getattr(learn, preset)(bn_stats=how)
    for p in learn.model.parameters(): p.grad = None
    table, before, watch = bn_doctor(learn).layers, snapshot(learn), Watch()
    with no_warnings(): learn.fit(1, cbs=watch)
    now = moved(learn, before)
    for n, row in table.iterrows():
        assert watch.by[n] == {row['normalises by']}, n
        assert (f'{n}.running_mean' in now) == (row.statistics == 'updated'), n
        assert [f'{n}.{k}' in now for k in ('weight', 'bias')] == {'trained': [True, True], 'beta trained': [False, True],
                                                                  'frozen': [False, False]}[row['gamma, beta']], n


def test_bn_freeze_and_the_statistics_of_the_minibatch():
    learn = tiny_learner(splitter=two_groups, cbs=BnFreeze)
    learn.freeze_body(bn_stats='batch')
    text = bn_doctor(learn).warnings['BnFreeze overrides bn_stats']
    assert text == ("0.1, 0.4: BnFreeze puts these layers in eval mode, so they normalise by the running statistics although "
                    "bn_stats='batch'. Remove BnFreeze.")
    learn.remove_cb(BnFreeze)
    assert not bn_doctor(learn).warnings


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
def freeze_conv(learn): learn.model[0][0].weight.requires_grad_(False)
def freeze_bns(learn): [p.requires_grad_(False) for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
def bare(learn): learn.model[0][1] = nn.BatchNorm2d(4, affine=False)
def one_more(learn): learn.dls = DataLoaders(DataLoader(Items(loaders().train.dataset[:17]), bs=16), loaders().valid)


DOCTOR = {
    'drift': (freeze_after_fit, ['drift'], r'0\.0\.weight, 0\.3\.weight: frozen, but with an old gradient'),
    'slow weights': (slow_weights, ['drift of slow weights', 'running statistics move'], 'Lookahead'),
    'BnFreeze': (edited(lambda l: None, cbs=BnFreeze), ['BnFreeze has no effect'],
                 r'0\.1, 0\.4, 1\.2: BnFreeze will not hold these statistics'),
    'BnFreeze crashes': (edited(bare, cbs=BnFreeze), ['BnFreeze crashes', 'BnFreeze has no effect'], 'will crash when training starts'),
    'SyncBN': (sync, ['SyncBatchNorm'], r'learn.freeze\(\) freezes gamma and beta too'),
    'one group': (edited(lambda l: None, splitter=trainable_params), ['one group'], 'so learn.freeze.. trains everything'),
    'left out': (edited(freeze_conv, splitter=trainable_params), ['one group', 'left out of the optimizer'],
                 'The default splitter will leave it out'),
    'small batches': (edited(lambda l: None, dls=loaders(bs=4)), ['small batches'],
                      '3 layers normalise by the minibatch, and a minibatch has 4 items.*Use batches of at least 16 items'),
    'batch of one': (edited(one_more), ['batch of one'], r'a single item \(17 = 1×16\+1\)'),
    'no statistics': (edited(untracked), ['no statistics'], 'The minibatch normalises in validation too'),
    'stale statistics': (edited(lightning), ['stale statistics'], 'validation uses old statistics'),
    'eval mode is undone': (edited(evaluated), ['eval mode is undone'], r'0\.1: in eval mode, but'),
    'running statistics move': (edited(freeze_bns), ['running statistics move'], 'requires_grad has no effect on buffers'),
    'nothing trains': (edited(freeze_flags), ['running statistics move', 'nothing trains'], 'backward.. will fail'),
    'replaced layer': (replaced, ['not in the optimizer', 'not in the model'], r'1\.3\.weight, 1\.3\.bias: not in the optimizer'),
    'KeepFrozen': (edited(lambda l: None, cbs=KeepFrozen('non_bn')), ['KeepFrozen'],
                   r"KeepFrozen\('non_bn'\) will freeze again when a fit starts"),
}


@pytest.mark.parametrize('kind', DOCTOR)
def test_the_doctor_finds(kind):
    make, names, text = DOCTOR[kind]
    learn = make()
    flags, opt = [p.requires_grad for p in learn.model.parameters()], learn.opt
    d = bn_doctor(learn)
    assert list(d.warnings) == names and re.search(text, ' '.join(d.warnings.values()))
    assert all(n in repr(d) and n in d._repr_html_() for n in names)
    assert flags == [p.requires_grad for p in learn.model.parameters()] and learn.opt is opt


def test_the_doctor_finds_an_optimizer_of_another_splitter(tmp_path):
    d = bn_doctor(foreign(tmp_path))
    assert 'loaded from a learner with another splitter' in d.warnings['optimizer state mismatch']
    assert "marked 'force_train'" in d.warnings['force_train flags']


@pytest.mark.parametrize('kind', ['drift', 'BnFreeze crashes', 'SyncBN', 'one group', 'batch of one', 'eval mode is undone',
                                  'running statistics move', 'nothing trains'])
def test_what_the_doctor_predicts_happens(kind):
    learn = DOCTOR[kind][0]()
    before = snapshot(learn)
    if kind == 'drift': learn.fit(1); assert CONVS <= moved(learn, before)
    if kind == 'BnFreeze crashes': pytest.raises((StopIteration, IndexError), learn.fit, 1)
    if kind == 'SyncBN': learn.freeze(); assert not learn.model[0][1].weight.requires_grad
    if kind == 'one group': learn.freeze(); assert all(p.requires_grad for p in learn.model.parameters())
    if kind == 'batch of one': pytest.raises(ValueError, learn.fit, 1)
    if kind in ('eval mode is undone', 'running statistics move'): learn.fit(1); assert '0.1.running_mean' in moved(learn, before)
    if kind == 'nothing trains': pytest.raises(RuntimeError, learn.fit, 1)


def test_the_remedies_of_the_doctor_help():
    # these warn of a callback, a number or a flag that is still there
    still = {'BnFreeze has no effect', 'small batches', 'eval mode is undone', 'SyncBatchNorm'}
    for kind in ('drift', 'slow weights', 'BnFreeze', 'SyncBN', 'one group', 'small batches', 'eval mode is undone',
                 'running statistics move', 'nothing trains'):
        learn = DOCTOR[kind][0]()
        learn.freeze_non_bn(bn_stats='hold')
        assert not {*bn_doctor(learn).warnings}-still, kind


def test_the_doctor_uses_the_head_of_the_call():
    learn = tiny_learner(splitter=two_groups)
    learn.freeze_non_bn(head='1.3', bn_stats='hold')
    d = bn_doctor(learn)
    assert 'head = 1.3' in d.title and "freeze_non_bn(head='1.3', bn_stats='hold')" in d.title and d.layers.part['1.2'] == 'body'
    assert bn_doctor(learn, head='1').layers.part['1.2'] == 'head'


def test_other_buffers_and_doubtful_heads():
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    m = nn.Sequential(conv, nn.InstanceNorm2d(4, track_running_stats=True), nn.Flatten(), nn.BatchNorm1d(144))
    d = bn_doctor(tiny_learner(m))
    assert '0.parametrizations.weight.0, 1: updates statistics' in d.warnings['other buffers']
    assert d.warnings['doubtful head'].startswith('3: it is a norm layer')


def test_the_doctor_refuses():
    for x, found in ((None, 'NoneType'), ('learn', 'str')):
        with pytest.raises(ValueError, match=f'bn_doctor takes a Learner. Found {found}'): bn_doctor(x)


def test_no_batch_norm_at_all():
    d = bn_doctor(tiny_learner(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))))
    assert len(d.layers) == 0 and '(no batch norm layers)' in repr(d) and '<div' not in d._repr_html_()
    with pytest.raises(ValueError, match="Found 'fc'"): bn_doctor(tiny_learner(), head='fc')


# --- the advice can be followed on every model
def no_bn(): return tiny_model(bn=False)[0]
def head_of(m, *first): return nn.Sequential(m, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *first, nn.Linear(4, 2)))


ADVISED = {'batch norm': tiny_model, 'no batch norm': lambda: head_of(no_bn()),
           'batch norm in the head': lambda: head_of(no_bn(), nn.BatchNorm1d(4)),
           'no gamma and beta': lambda: head_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False))),
           'synchronised': lambda: nn.SyncBatchNorm.convert_sync_batchnorm(tiny_model()),
           'synchronised head': lambda: nn.SyncBatchNorm.convert_sync_batchnorm(head_of(no_bn(), nn.BatchNorm1d(4))),
           'no head': lambda: nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)))}


def drifting(learn): learn.fit(1); [p.requires_grad_(False) for p in [*learn.model.parameters()][:1]]
def in_eval_mode(learn): learn.model.train(); [m.eval() for m in learn.model.modules() if isinstance(m, nn.BatchNorm2d)]


STATES = {'new': lambda l: None, 'drift': drifting, 'frozen': freeze_flags, 'eval': in_eval_mode,
          'with an optimizer': lambda l: l.create_opt()}


@pytest.mark.parametrize('state', STATES)
@pytest.mark.parametrize('cbs,opt', [([], Adam), ([BnFreeze], Adam), ([], ranger)])
@pytest.mark.parametrize('model', ADVISED)
def test_the_advice_can_be_followed(model, cbs, opt, state):
    learn = tiny_learner(ADVISED[model](), opt_func=opt)
    STATES[state](learn)
    learn.add_cbs(cbs)
    calls = {c for text in bn_doctor(learn).warnings.values() for c in re.findall(r'learn\.(?:opt\.)?\w+\([^)]*\)', text)}
    calls -= {'learn.freeze()'} # fastai's, named as the cause
    for call in calls: eval(call.replace('head=...', 'head=learn.model[0][1].weight'), {'learn': learn}) # raises no error
    if calls and 'batch norm' == model: assert any('learn.freeze_non_bn()' == c for c in calls) or state in ('eval', 'frozen')
    if model != 'batch norm' and model != 'synchronised': assert 'learn.freeze_non_bn()' not in calls


def test_drift_is_yes_or_no_and_its_numbers_are_short():
    learn = tiny_learner()
    with pytest.raises(ValueError, match="drift must be True or False. Found 'train'. Name the data"): bn_doctor(learn, drift='train')
    learn.fit(1)
    numbers = bn_doctor(learn, drift=True).layers[['shift', 'variance ratio']].to_numpy(float)
    assert (numbers == [[float(f'{v:.3g}') for v in row] for row in numbers]).all() and (numbers > 0).all()
