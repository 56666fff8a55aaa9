"""Pictures of findings show the rows in which they were found"""
from dataclasses import replace

import numpy as np
import pytest
from helpers import make
from matplotlib.figure import Figure

from fastai_bnstats.compare import diagnose
from fastai_bnstats.plot import plot_finding
from fastai_bnstats.plot.findings import AFTER, BEFORE, MOST


def table(quantity='weights', epochs=40, P=3, **fields):
    r = make((('a', epochs),), P=P)
    return replace(r, **fields, meta={**r.meta, 'quantity': quantity})


def put(a, where, value):
    a = np.array(a)
    a[where] = value
    return a


def with_nan(r): return replace(r, nonfinite=put(r.nonfinite, np.s_[100:, 1:], 4), mean=put(r.mean, np.s_[100:, 1], np.nan))
def with_zeros(r): return replace(r, mean=put(r.mean, np.s_[90:, 1], 0.), var=put(r.var, np.s_[90:, 1], 0.))
def with_spike(r): return replace(r, loss=put(r.loss, np.s_[80:83], [50., np.nan, 60.]))
def with_skips(r): return replace(r, stepped=put(r.stepped, np.s_[130:], False))
def still(r):
    fields = {k: getattr(r, k) for k in ('hist', 'mean', 'var', 'under', 'over')}
    return replace(r, **{k: put(a, np.s_[:, 1], a[:1, 1]) for k, a in fields.items()})


def dead_gamma(r):
    r = replace(r, kind=np.array(['weight', 'gamma', 'gamma']))
    return replace(r, mean=put(r.mean, np.s_[:, 1], np.r_[np.ones(60), np.full(100, 1e-3)]), var=put(r.var, np.s_[:, 1], 0.))


def of(r, kind):
    d = diagnose(r)
    return next(f for f in d if f.kind == kind), d


def line(ax, label): return next(l for l in ax.lines if l.get_label() == label)


@pytest.mark.parametrize('r, kind, step, ylabel', [
    (with_nan(table()), 'not finite', 100, 'RMS of weights'), (with_zeros(table('gradients')), 'zero gradient', 90, 'RMS of gradients'),
    (with_zeros(table('outputs')), 'dead output', 90, 'RMS of outputs'), (with_spike(table()), 'loss spike', 80, 'loss'),
    (still(table()), 'did not move', 0, 'share that changed bin'), (dead_gamma(table()), 'dead scale', 60, 'RMS of gamma'),
    (with_skips(table()), 'steps skipped', 130, 'loss')], ids=lambda x: x if isinstance(x, str) else '')
def test_each_kind_has_a_picture_at_its_step(r, kind, step, ylabel):
    f, d = of(r, kind)
    ax = plot_finding(r, f)
    assert f.step == step and ax.get_ylabel() == ylabel and ax.get_xlabel() == 'step' and f'step {step}: {kind}' in ax.get_title()
    assert [l for l in ax.lines if list(l.get_xdata()) == [step, step]]
    assert isinstance(d.plot(), Figure)
    d.plot().canvas.draw()


def test_the_layer_and_the_others():
    r = with_zeros(table('gradients'))
    ax = plot_finding(r, of(r, 'zero gradient')[0])
    assert (line(ax, '1.weight').get_ydata() == r.rms[:, 1]).all() and (line(ax, 'other layers').get_ydata() == r.rms[:, 0]).all()
    r = replace(r, var=put(r.var, np.s_[:, 0], np.geomspace(1, 1e-6, 160)))
    ax = plot_finding(r, of(r, 'zero gradient')[0]) # far apart: a logarithmic axis, which can't show zeros
    assert ax.get_yscale() == 'log' and line(ax, 'exactly 0').get_xdata().tolist() == list(range(90, 160))


def test_what_is_not_finite_is_marked():
    r = with_nan(table())
    ax = plot_finding(r, of(r, 'not finite')[0])
    assert line(ax, 'NaN or infinite').get_xdata().tolist() == list(range(100, 101+AFTER))
    assert line(ax, '1.weight').get_xdata()[[0, -1]].tolist() == [100-BEFORE, 100+AFTER] and line(ax, 'also concerned')
    r = with_spike(table())
    ax = plot_finding(r, of(r, 'loss spike')[0])
    assert line(ax, 'NaN or infinite').get_xdata().tolist() == [81]
    assert np.array_equal(ax.lines[0].get_ydata(), r.loss[80-BEFORE:81+AFTER], equal_nan=True)


def test_a_validation_loss():
    r = table()
    r = replace(r, valid_loss=put(r.valid_loss, 10, np.inf))
    f, _ = of(r, 'not finite')
    assert plot_finding(r, f).get_ylabel() == 'validation loss' and f.step == 43


def test_updates_show_the_displacement():
    far, start = put(np.tile(np.arange(160.)[:, None], 3), np.s_[:, 1], 0), put(np.full((160, 3), 2.), np.s_[:, 2], 0)
    u = table('updates', step_norm=far, fit_norm=far, start_norm=start) # the third layer has no length
    ax = plot_finding(u, of(u, 'did not move')[0])
    assert ax.get_ylabel() == 'displacement' and (line(ax, 'other layers').get_ydata() == np.arange(160)/2).all()
    assert not line(ax, '1.weight').get_ydata().any()


def test_no_findings_show_the_losses():
    d = diagnose(table())
    ax, *_ = d.plot().axes
    assert d == [] and ax.get_title() == 'nothing suspicious' and len(ax.lines[0].get_ydata()) == 160
    with pytest.raises(ValueError, match='no training loss'): diagnose(replace(table(), **{k: table().loss[:0] for k in (
        'loss', 'loss_step', 'loss_fit', 'loss_epoch', 'loss_batch')})).plot()


def test_many_findings():
    r = table(P=MOST+3)
    r = replace(r, kind=np.array(['gamma']*(MOST+3)), mean=put(r.mean, np.s_[60:], 0.), var=put(r.var, np.s_[60:], 0.))
    fig = diagnose(r).plot(ncols=3)
    assert len(fig.axes) == MOST and fig.get_supxlabel() == '3 more not shown'
    with pytest.raises(ValueError, match='ncols must be at least 1'): diagnose(r).plot(0)


def test_errors():
    r = with_zeros(table('gradients'))
    f, _ = of(r, 'zero gradient')
    with pytest.raises(ValueError, match="has no layer '1.weight': pass the one of gradients"): plot_finding(r.sel(layers=0), f)
    with pytest.raises(TypeError, match='needs a Recording'): plot_finding(f, r)
