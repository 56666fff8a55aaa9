"""The drift of running statistics: exact numbers, nothing moves, and models of all kinds"""
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, strategies as st
from helpers import loaders, quiet, tiny_learner, tiny_model
from fastai.basics import (AccumMetric, AvgMetric, BatchNorm1dFlat, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner,
                           Metric, ValueMetric, nn)
from fastai.metrics import F1Score, accuracy
from freeze_cases import interrupt, snapshot, two_groups

from fastai_bnstats.freeze import bn_doctor, bn_drift
from fastai_bnstats.freeze.drift import MIN_ITEMS, Moments, channel_drift, summarize_channels
from fastai_bnstats.plot import plot_drift
from fastai_bnstats.record import ActivationHistCallback, WeightHistCallback


def images(learn, dl=None): return torch.cat([b[0] for b in dl or learn.dls.valid])


def moments(x):
    "Mean and unbiased variance per channel, by numpy in float64"
    x = x.double().numpy()
    axes = tuple(d for d in range(x.ndim) if d != 1)
    return x.mean(axes), x.var(axes, ddof=1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(-1e6, 1e6), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_moments_of_parts_are_those_of_the_whole(sizes, mean, sd, seed):
    x = np.random.default_rng(seed).normal(mean, sd, (sum(sizes), 3, 2))
    m = Moments()
    for part in np.split(x, np.cumsum(sizes)[:-1]): m.add(torch.tensor(part))
    m.add(torch.zeros(0, 3, 2))
    assert m.n == sum(sizes)*2
    np.testing.assert_allclose(m.mean, x.mean((0, 2)), rtol=1e-12, atol=1e-12*sd)
    np.testing.assert_allclose(m.var, x.var((0, 2), ddof=1), rtol=1e-9+1e-13*(mean/sd)**2)


def test_a_single_element_has_no_variance():
    m = Moments()
    m.add(torch.ones(1, 3))
    assert m.mean.tolist() == [1, 1, 1] and m.var.isnan().all()


def test_numbers_of_a_layer_with_statistics_set_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, eps=.1), nn.Flatten(), nn.Linear(192, 2))
    model[0].running_mean.copy_(torch.tensor([1., -2, 0])); model[0].running_var.copy_(torch.tensor([4., .25, 1]))
    learn = tiny_learner(model)
    d = bn_drift(learn)
    mean, var = moments(images(learn))
    shift = (mean-[1, -2, 0])/np.sqrt(np.array([4, .25, 1])+.1)
    log_ratio = np.log((var+.1)/(np.array([4, .25, 1])+.1))
    t = d.channels['0']
    for column, want in {'mean': mean, 'var': var, 'shift': shift, 'log ratio': log_ratio}.items():
        np.testing.assert_allclose(t[column], want, rtol=1e-5, atol=1e-6)
    row = d.layers.loc['0']
    np.testing.assert_allclose(row[['shift', 'largest shift', 'variance ratio', 'log ratio', 'largest log ratio']].astype(float),
                               [np.sqrt((shift**2).mean()), shift[1], np.exp(log_ratio.mean()), np.sqrt((log_ratio**2).mean()),
                                log_ratio[np.abs(log_ratio).argmax()]], rtol=1e-5)
    assert list(row[['channels', 'elements', 'verdict']]) == [3, 32*64, 'far'] and d.far == ['0']


def test_a_layer_is_measured_behind_layers_in_eval_mode():
    "An independent evaluation: the model cut before the layer, in eval mode"
    learn = tiny_learner(splitter=two_groups)
    learn.fit(2)
    learn.model[0][1].running_mean += 3 # a drift that the second layer sees
    d = bn_drift(learn)
    learn.model.eval()
    with torch.no_grad(): x = learn.model[0][:4](images(learn))
    mean, var = moments(x)
    np.testing.assert_allclose(d.channels['0.4']['mean'], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d.channels['0.4']['var'], var, rtol=1e-4)
    assert d.layers.verdict['0.1'] == 'far'


def test_batches_of_different_sizes_count_by_their_elements():
    learn = tiny_learner(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 2)))
    dl = DataLoader(learn.dls.valid.dataset, bs=27) # 27 and 5
    np.testing.assert_allclose(bn_drift(learn, dl).channels['0'], bn_drift(learn).channels['0'], rtol=1e-5, atol=1e-6)
    d = bn_drift(learn, dl)
    assert d.items == 32 and d.batch_size == 27


def test_words_follow_the_thresholds():
    def word(shift, ratio):
        channels = pd.DataFrame({'shift': [shift, -shift], 'log ratio': np.log([ratio, 1/ratio])})
        return summarize_channels(channels)['verdict']
    assert [word(s, 1) for s in (0, .19, .21, .49, .51)] == ['close', 'close', 'some drift', 'some drift', 'far']
    assert [word(0, r) for r in (1.24, 1.26, 1.99, 2.01)] == ['close', 'some drift', 'some drift', 'far']
    assert word(np.nan, 1) == word(np.inf, 1) == 'not finite'


def learner_with_metrics(**kwargs):
    return tiny_learner(metrics=[accuracy, F1Score(average='macro'), partial(accuracy, axis=-1)], splitter=two_groups, **kwargs)


def test_eval_mode_is_what_validate_gives_and_minibatch_mode_what_train_mode_gives():
    learn = learner_with_metrics()
    learn.fit(2)
    d = bn_drift(learn)
    np.testing.assert_allclose(d.metrics['running statistics'], learn.validate(), rtol=1e-5)
    preds, ys = [], []
    model = tiny_model()
    model.load_state_dict(learn.model.state_dict())
    for x, y in learn.dls.valid: preds.append(model.train()(x)); ys.append(y) # has no dropout
    preds, ys = torch.cat(preds), torch.cat(ys)
    want = [nn.functional.cross_entropy(preds, ys).item(), accuracy(preds, ys).item()]
    np.testing.assert_allclose(d.metrics['minibatch'].iloc[:2], want, rtol=1e-5)
    np.testing.assert_allclose(d.metrics.gap, d.metrics['running statistics']-d.metrics['minibatch'], rtol=1e-6)
    assert list(d.metrics.index) == ['loss', 'accuracy', 'f1_score', 'accuracy'] # two of one name


def test_dropout_stays_off():
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.Dropout(.9), nn.Linear(192, 2))
    learn = tiny_learner(model)
    for m in model.modules(): m.train()
    d = bn_drift(learn, learn.dls.valid)
    assert d.metrics['minibatch'].equals(bn_drift(learn).metrics['minibatch'])


class Boom(nn.Module):
    "Fails at its second call"
    calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls == 2: raise RuntimeError('boom')
        return x


class Count(nn.Module):
    "A module that changes a buffer and an attribute at each call, also in eval mode"
    def __init__(self): super().__init__(); self.register_buffer('n', torch.zeros(1)); self.last = None
    def forward(self, x): self.n += 1; self.last = x.mean() + torch.rand(1); return x + torch.rand(1)*0 + random.random()*0


def state(learn):
    m = learn.model
    hooks = [len(h) for x in m.modules() for h in (x._forward_pre_hooks, x._forward_hooks)]
    flags = [(x.training, getattr(x, 'track_running_stats', None), getattr(x, 'last', None)) for x in m.modules()]
    return hooks, flags, [id(b) for b in m.buffers()], random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize('fails', [False, True])
def test_nothing_moves(fails):
    model = tiny_model()
    model[0].append(Count()); model[0].append(Boom() if fails else nn.Dropout())
    learn = tiny_learner(model, metrics=accuracy, splitter=two_groups)
    learn.freeze_non_bn(bn_stats='batch')
    learn.create_opt(); learn.freeze_body(bn_stats='hold')
    model.train(); model[0][1].eval()
    dls = learn.dls.train, learn.dls.valid, DataLoader(learn.dls.valid.dataset, bs=5, shuffle=True)
    before, was, metric = state(learn), snapshot(learn), dict(vars(learn.metrics[0]))
    attributes = {k: id(v) for k, v in vars(learn).items()}
    for dl in dls:
        rng = dl.rng.getstate()
        if fails:
            with pytest.raises(RuntimeError, match='boom'): bn_drift(learn, dl)
            model[0][-1].calls = 0
        else: bn_drift(learn, dl)
        assert dl.rng.getstate() == rng
    assert state(learn) == before and all(v.equal(was[k]) for k, v in snapshot(learn).items())
    assert vars(learn.metrics[0]) == metric and {k: id(v) for k, v in vars(learn).items()} == attributes


def test_a_fit_afterwards_is_the_same_to_the_bit():
    def fit(between):
        learn = tiny_learner(splitter=two_groups)
        learn.fit(1)
        between(learn)
        learn.fit(1)
        return snapshot(learn)
    one = fit(lambda l: None)
    for between in (bn_drift, lambda l: bn_drift(l, l.dls.train)):
        assert all(v.equal(one[k]) for k, v in fit(between).items())


def test_inside_of_a_fit():
    class Drift(Callback):
        def after_epoch(self): self.d = bn_drift(self.learn); assert not self.learn.model.training
    def fit(*cbs):
        learn = tiny_learner(splitter=two_groups, cbs=[WeightHistCallback(), ActivationHistCallback(), *cbs])
        learn.fit(2)
        return learn
    plain, learn = fit(), fit(Drift())
    for name in ('weight_hist', 'activation_hist'):
        a, b = (getattr(l, name).recording for l in (plain, learn))
        assert np.array_equal(a.hist, b.hist) and np.array_equal(a.mean, b.mean)
    assert len(learn.drift.d.layers) == 3


def test_torch_loaders_keep_their_own_generator():
    g = torch.Generator().manual_seed(3)
    ds = torch.utils.data.TensorDataset(torch.randn(40, 3, 8, 8), torch.randint(0, 2, (40,)))
    dl = torch.utils.data.DataLoader(ds, batch_size=8, shuffle=True, generator=g)
    before, learn = g.get_state(), tiny_learner(splitter=two_groups)
    global_state = torch.get_rng_state()
    assert bn_drift(learn, dl).items == 40
    assert g.get_state().equal(before) and torch.get_rng_state().equal(global_state)


class Twice(nn.Module):
    "A layer that is called twice, one that is never called, and one without statistics"
    def __init__(self):
        super().__init__()
        self.bn, self.unused, self.untracked = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)
        self.fc = nn.Linear(192, 2)
    def forward(self, x): return self.fc(self.untracked(self.bn(x) + self.bn(input=x*2+1)).flatten(1))


def test_shared_unused_and_untracked_layers():
    learn = tiny_learner(Twice())
    d, x = bn_drift(learn), images(learn)
    mean, var = moments(torch.cat([x, x*2+1]))
    np.testing.assert_allclose(d.channels['bn'][['mean', 'var']].T, [mean, var], rtol=1e-5, atol=1e-6)
    assert dict(d.layers.verdict) == {'bn': d.layers.verdict['bn'], 'untracked': 'no running statistics', 'unused': 'not called'}
    assert list(d.layers.elements) == [2*32*64, 32*64, 0] and list(d.layers.index)[-1] == 'unused'
    assert d.layers['shift'].isna().tolist() == [False, True, True] and list(d.channels) == ['bn']
    assert 'not called' in repr(d) and 'of 1 layer' in d.verdict


def with_stats(model, n=4):
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.running_mean.fill_(.3)
    return model


def conv(d, n): return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[d](3, n, 1)


@pytest.mark.parametrize('d', [1, 2, 3])
def test_all_dimensions(d):
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[d]
    class Shape(nn.Module):
        def forward(self, x): return x[:, :, :3, :3].reshape(len(x), 3, *{1: (9,), 2: (3, 3), 3: (3, 3, 1)}[d])
    learn = tiny_learner(nn.Sequential(Shape(), norm(3), nn.Flatten(), nn.Linear(27, 2)))
    want = moments(images(learn)[:, :, :3, :3])
    np.testing.assert_allclose(bn_drift(learn).channels['1'][['mean', 'var']].T, want, rtol=1e-5, atol=1e-6)


def test_batch_norm_of_the_last_dimension():
    class Rows(nn.Module):
        def forward(self, x): return x.flatten(2).transpose(1, 2)[:, :3] # as many rows as channels
    learn = tiny_learner(nn.Sequential(Rows(), BatchNorm1dFlat(3), nn.Flatten(), nn.Linear(9, 2)))
    x = Rows()(images(learn))
    np.testing.assert_allclose(bn_drift(learn).channels['1'][['mean', 'var']].T, moments(x.transpose(1, 2)), rtol=1e-5, atol=1e-6)


def same_as_plain(model, rtol=1e-6, **kwargs):
    "The drift of a variant of the tiny model is that of the model itself"
    torch.manual_seed(0)
    plain = with_stats(tiny_model())
    variant = model(plain)
    a, b = bn_drift(tiny_learner(plain)), bn_drift(tiny_learner(variant, **kwargs))
    np.testing.assert_allclose(a.layers.iloc[:, :7].astype(float), b.layers.iloc[:, :7].astype(float), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(a.metrics, b.metrics, rtol=10*rtol, atol=rtol)
    return b


def copy_of(model):
    new = tiny_model()
    new.load_state_dict(model.state_dict())
    return new


def test_synchronised_batch_norm(): same_as_plain(lambda m: nn.SyncBatchNorm.convert_sync_batchnorm(copy_of(m)))


def test_data_parallel():
    d = same_as_plain(lambda m: nn.DataParallel(copy_of(m)))
    assert list(d.layers.index) == ['0.1', '0.4', '1.2']


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    if dtype == torch.bfloat16: same_as_plain(lambda m: copy_of(m).to(dtype), rtol=.05)
    else:
        items = [(x.double(), y) for x, y in loaders().valid.dataset]
        same_as_plain(lambda m: copy_of(m).to(dtype), rtol=1e-4, dls=DataLoaders(*(DataLoader(items, bs=16) for _ in range(2))))


def test_held_and_stale_layers_are_measured_alike():
    learn = tiny_learner(splitter=two_groups)
    learn.fit(1)
    want = bn_drift(learn).layers
    learn.freeze_body(bn_stats='hold')
    assert bn_drift(learn).layers.equals(want)
    learn.model[0][1].track_running_stats = False
    assert bn_drift(learn).layers.equals(want)
    assert learn.model[0][1].track_running_stats is False


def test_a_model_that_is_one_layer():
    learn = tiny_learner(nn.BatchNorm2d(3))
    learn.loss_func = lambda p, y: p.mean((1, 2, 3)) # one loss per item
    assert list(bn_drift(learn).layers.index) == ['(root)']


def test_recalibration_brings_drift_to_about_zero():
    learn = tiny_learner(splitter=two_groups)
    learn.fit(1)
    dl = DataLoader([(x*2+1, y) for x, y in learn.dls.valid.dataset]*2, bs=64) # one batch, so that both see the same statistics
    assert bn_drift(learn, dl).far
    learn.recalibrate_bn(dl=dl)
    d = bn_drift(learn, dl)
    assert not d.far and d.layers['shift'].max() < .05 and d.layers['log ratio'].max() < .05
    same_inputs = d.layers.loc['0.1', ['shift', 'log ratio']] # of the first layer, in training mode and in eval mode
    np.testing.assert_allclose(same_inputs.astype(float), 0, atol=1e-4)
    assert abs(d.metrics.gap['loss']) < 1e-3


def test_running_variance_lacks_what_differs_between_minibatches():
    "Constant images: a minibatch of n of them has (n-1)/n of the variance of all, as the lesson says"
    torch.manual_seed(0)
    xs = torch.randn(4096, 1, 1, 1).expand(-1, 2, 4, 4)
    dl = DataLoader([(x, 0) for x in xs], bs=4)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 2))
    learn = quiet(Learner(DataLoaders(dl, dl), model, loss_func=CrossEntropyLossFlat()))
    learn.recalibrate_bn()
    within = 3/4*64/63 # unbiased over the 64 pixels of a minibatch
    assert abs(bn_drift(learn).layers['variance ratio'].iloc[0]*within-1) < .05


def test_a_minibatch_with_one_element_per_channel_is_left_out_of_the_metrics():
    class Flat(nn.Module):
        def forward(self, x): return x.flatten(1)
    learn = tiny_learner(nn.Sequential(Flat(), nn.BatchNorm1d(192), nn.Linear(192, 2)))
    items = learn.dls.valid.dataset
    d = bn_drift(learn, DataLoader(items, bs=31))
    assert d.left_out == 1 and d.layers.elements.iloc[0] == 32 and '1 minibatch with a single element per channel left out' in d.verdict
    only = bn_drift(learn, DataLoader(items[:31], bs=31))
    assert only.metrics.equals(d.metrics)
    alone = bn_drift(learn, DataLoader(items[:2], bs=1))
    assert not len(alone.metrics) and alone.left_out == 2 and 'In eval mode' not in alone.verdict


def test_batches_without_targets():
    learn = tiny_learner(splitter=two_groups)
    dl = DataLoader([(x,) for x, _ in learn.dls.valid.dataset], bs=16)
    d = bn_drift(learn, dl)
    assert not len(d.metrics) and d.items == 32 and 'In eval mode' not in d.verdict and repr(d) and d._repr_html_()


def test_metrics_that_refer_to_the_learner():
    class Uses(Metric):
        def __init__(self, learn): self.learn, self.seen = learn, []
        def reset(self): self.seen.clear()
        def accumulate(self, learn): self.seen.append((learn.y.shape[0], learn.x.shape[0], learn.training, learn.lr))
        @property
        def value(self): return float(sum(y for y, *_ in self.seen))
        name = 'items'
    learn = tiny_learner()
    uses = Uses(learn)
    uses.seen.append((5, 5, True, 0))
    learn.metrics = [uses, AccumMetric(lambda p, y: (p.argmax(-1) == y).float().mean().item(), flatten=False), AvgMetric(accuracy)]
    d = bn_drift(learn)
    assert d.metrics.loc['items'].tolist() == [32, 32, 0] and uses.seen == [(5, 5, True, 0)]
    assert d.metrics['minibatch'].iloc[2] == pytest.approx(d.metrics['minibatch'].iloc[3])


def test_a_metric_without_a_number():
    learn = tiny_learner(metrics=ValueMetric(lambda: np.array([1., 2.]), 'pair'))
    d = bn_drift(learn)
    assert d.metrics.gap['pair'].tolist() == [0, 0] and 'pair' not in d.verdict and repr(d) and d._repr_html_()


def test_values_that_are_not_finite():
    learn = tiny_learner(splitter=two_groups)
    learn.model[0][1].running_mean[1] = float('nan')
    d = bn_drift(learn)
    assert d.layers.verdict['0.1'] == 'not finite' and d.far[0] == '0.1' and 'are not finite: 0.1' in d.verdict
    assert d.plot()


def test_what_the_verdict_says():
    learn = tiny_learner(splitter=two_groups, metrics=accuracy)
    learn.fit(1)
    learn.recalibrate_bn(dl=learn.dls.valid)
    dl = DataLoader(list(learn.dls.valid.dataset)*2, bs=16)
    assert bn_drift(learn, dl).verdict.startswith('The running statistics are close to this data')
    few = bn_drift(learn, DataLoader(learn.dls.valid.dataset[:MIN_ITEMS-1], bs=16))
    assert 'With 32 items this may be chance; pass a dl with 40 or more.' in few.verdict
    learn.model[0][1].running_mean += 5
    far = bn_drift(learn, dl)
    assert 'are far from this data: 0.1' in far.verdict and 'In eval mode: loss' in far.verdict and 'minibatches of 16 items' in far.verdict
    assert ('learn.recalibrate_bn(dl=...)' in far.verdict) == (far.metrics.gap['loss'] > 0)
    assert far.verdict[:20] in repr(far) and '<table' in far._repr_html_()


ERRORS = [(lambda l: bn_drift(l.model), 'bn_drift takes a Learner. Found Sequential'),
          (lambda l: bn_drift(l, 'valid'), "dl must be a DataLoader, such as learn.dls.valid. Found 'valid'"),
          (lambda l: bn_drift(l, DataLoader([], bs=4)), 'gives no batch: it is empty'),
          (lambda l: bn_drift(tiny_learner(tiny_model(bn=False)[0])), 'has no batch norm layer'),
          (lambda l: bn_drift(tiny_learner(nn.Sequential(nn.LazyBatchNorm2d()))), 'lazy layers that have not seen a batch')]


@pytest.mark.parametrize('call,text', ERRORS)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text): call(tiny_learner())


def test_a_learner_without_a_validation_set():
    dls = loaders()
    dls.loaders = dls.loaders[:1]
    learn = tiny_learner(dls=dls)
    with pytest.raises(ValueError, match='no validation set. Pass the data to compare with as dl='): bn_drift(learn)
    assert bn_drift(learn, learn.dls.train).items == 64


def test_after_an_interrupt():
    learn = tiny_learner(splitter=two_groups)
    learn.freeze_non_bn(bn_stats='batch')
    interrupt(learn)
    assert len(bn_drift(learn).layers) == 3


def test_the_doctor_runs_no_data_unless_asked():
    learn = tiny_learner(splitter=two_groups)
    learn.dls.valid.before_iter = lambda: pytest.fail('the doctor read the data')
    assert 'drift' not in bn_doctor(learn).layers


def test_the_doctor_warns_of_drift():
    learn = tiny_learner(splitter=two_groups)
    learn.fit(2)
    learn.recalibrate_bn(dl=learn.dls.valid)
    assert not bn_doctor(learn, drift=True).warnings
    far = DataLoader([(x+4, y) for x, y in learn.dls.valid.dataset], bs=16)
    d = bn_doctor(learn, dl=far)
    assert list(d.layers)[-3:] == ['shift', 'variance ratio', 'drift'] and d.layers.drift['0.1'] == 'far'
    assert "0.1, " in d.warnings['statistics far from the data'] and 'learn.recalibrate_bn()' in d.warnings['statistics far from the data']
    plain = bn_doctor(learn)
    assert plain.layers.equals(d.layers.iloc[:, :-3]) and not plain.warnings
    assert not bn_doctor(tiny_learner(nn.Sequential(nn.Flatten(), nn.Linear(192, 2))), drift=True).layers.shape[0]


def test_the_picture():
    learn = tiny_learner(splitter=two_groups)
    learn.fit(1)
    a, b = bn_drift(learn), bn_drift(learn, learn.dls.train)
    fig = plot_drift(a, b, labels=['valid', 'train'], title='t')
    top, bottom = fig.axes
    heights = [p.get_height() for p in top.patches]
    np.testing.assert_allclose(heights, [*a.layers['shift'], *b.layers['shift']], rtol=1e-6) # bars are the table's numbers
    np.testing.assert_allclose([abs(p.get_height()) for p in bottom.patches], [*a.layers['log ratio'], *b.layers['log ratio']], rtol=1e-6)
    assert [t.get_text() for t in bottom.get_xticklabels()] == ['0.1', '0.4', '1.2'] and fig.legends
    assert not a.plot().legends
    long = SimpleNamespace(limits=a.limits, channels={'backbone.stages.3.blocks.11.'+n: t for n, t in a.channels.items()})
    for fig in (a.plot(), plot_drift(a, b), plot_drift(long), plot_drift(long, long, title='t')): # nothing is cut off
        fig.canvas.draw()
        for ax in fig.axes:
            label = ax.yaxis.label.get_window_extent()
            assert fig.bbox.y0 <= label.y0 and label.y1 <= fig.bbox.y1 and label.x0 >= fig.bbox.x0
            assert label.height < 1.25*ax.bbox.height, label
    with pytest.raises(TypeError, match='results of bn_drift. Found DataFrame'): plot_drift(a.layers)
    with pytest.raises(TypeError, match='Found none'): plot_drift()
    with pytest.raises(ValueError, match='labels= must name each of the 1 results'): plot_drift(a, labels=['a', 'b'])
    untracked = bn_drift(tiny_learner(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(192, 2))))
    assert 'No layer that was called has running statistics' in untracked.verdict
    with pytest.raises(ValueError, match='No layer has statistics to compare'): untracked.plot()


def test_channel_drift_of_a_channel_that_is_always_zero():
    bn = nn.BatchNorm1d(1)
    bn.running_var.zero_()
    m = Moments()
    m.add(torch.zeros(8, 1))
    t = channel_drift(bn, m)
    assert t['shift'].tolist() == [0] and t['log ratio'].tolist() == [0]


def test_names_of_a_compiled_model_are_the_plain_ones():
    learn = tiny_learner()
    plain = bn_drift(learn)
    learn.model = torch.compile(learn.model, backend='eager')
    d = bn_drift(learn)
    assert list(d.layers.index) == [*d.channels] == ['0.1', '0.4', '1.2'] and d.layers.equals(plain.layers)
    doctor = bn_doctor(learn, drift=True)
    assert list(doctor.layers.index) == ['0.1', '0.4', '1.2'] and list(doctor.layers.part) == ['body', 'body', 'head']
    assert '_orig_mod' not in repr(doctor) and 'head = 1' in doctor.title
    learn.model.train()
    bn = learn.model._orig_mod[0][1].eval()
    bn.weight.requires_grad_(False), bn.bias.requires_grad_(False)
    w = bn_doctor(learn).warnings
    assert w['eval mode is undone'].startswith('0.1: ') and w['left out of the optimizer'].startswith('0.1.weight, 0.1.bias: ')
