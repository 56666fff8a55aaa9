"""Pictures: the right numbers in the right place, labelled, on the axes that were given"""
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from test_recording import make

from fastai_bnstats.plot import panels as plot
from fastai_bnstats.plot.panels import plot_hist, plot_hist_diff, plot_hists, plot_losses, plot_var_change, shown_layers, smooth, smoothing_window
from fastai_bnstats.recording import empty_recording, full_counts


@pytest.fixture
def rec(): return make(fits=(('freeze', 2), ('unfreeze', 4)), P=3)


def panels(fig): return [ax for ax in fig.axes if ax.get_title()]


def test_heat_map_is_log1p_of_the_counts_with_flow(rec):
    fig, ax = plt.subplots()
    assert plot_hist(rec, 1, ax=ax) is ax
    image = ax.get_images()[0].get_array()
    np.testing.assert_allclose(image, np.log1p(np.c_[rec.under[:, 1], rec.hist[:, 1], rec.over[:, 1]]).T)
    assert ax.get_xlabel() == 'minibatch' and ax.get_ylabel() == 'weight' and ax.get_title() == '1'
    x0, x1, y0, y1 = ax.get_images()[0].get_extent()
    assert (x0, x1) == (-.5, 23.5) and (y0, y1) == pytest.approx((-2.4, 2.4)) # one bin for each flow


def test_change_is_signed_and_its_title_says_how_much(rec):
    ax = plot_hist(rec, 0, change=True)
    c = full_counts(rec)[:, 0]
    d = (c-c[0])[:, :-1].T
    np.testing.assert_allclose(ax.get_images()[0].get_array(), np.sign(d)*np.log1p(abs(d)))
    assert ax.get_title() == f'0  ≥{rec.moved()[-1, 0]:.1%} moved'
    norm = ax.get_images()[0].norm
    assert norm.vmin == -norm.vmax


def test_borders(rec):
    lines = [l for l in plot_hist(rec, 0).get_lines() if l.get_xdata()[0] == l.get_xdata()[1]]
    assert sorted((l.get_xdata()[0], l.get_linestyle()) for l in lines) == [(3.5, ':'), (7.5, '-'), (11.5, ':'), (15.5, ':'), (19.5, ':')]


@pytest.mark.parametrize('change,n', [(False, 3), (True, 3), ('both', 6)])
def test_panels_share_one_scale_with_a_colour_bar(rec, change, n):
    fig = plot_hists(rec, change=change)
    assert isinstance(fig, Figure) and len(panels(fig)) == n
    assert len({(a.get_images()[0].norm.vmin, a.get_images()[0].norm.vmax) for a in panels(fig)}) == (2 if change == 'both' else 1)
    assert sum(ax.get_ylabel() in ('change of the count', 'weights in a bin') for ax in fig.axes) == (2 if change == 'both' else 1)
    assert panels(fig)[2].get_title().startswith('3 · 2')


def test_shortcuts_are_left_out_unless_asked_for(rec):
    r = replace(rec, names=np.array(['0.conv.weight', '0.idpath.0.weight', '0.downsample.0.weight']))
    assert shown_layers(r).tolist() == [0] and shown_layers(r, '0.idpath.*').tolist() == [1]
    with pytest.raises(ValueError, match='No layer matches'): plot_hists(rec, 'conv')


def test_nan_is_named(rec):
    r = replace(rec, nonfinite=rec.nonfinite+2)
    assert '(2 NaN or inf)' in plot_hist(r, 0).get_title()


def test_edges_that_are_not_uniform(rec):
    r = replace(rec, edges=np.stack([np.r_[-2:0:6j, .1, .4, .9, 1.5, 2]]*3))
    assert plot_hist(r, 0).collections


def test_losses(rec):
    fig, ax = plt.subplots()
    assert plot_losses(rec, ax=ax) is ax and isinstance(ax, Axes)
    top = [a for a in fig.axes if a is not ax][0]
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), rec.loss); np.testing.assert_array_equal(top.get_lines()[0].get_ydata(), rec.valid_loss)
    assert (ax.get_lines()[0].get_color(), top.get_lines()[0].get_color()) == (plot.TRAIN, plot.VALID)
    assert (ax.get_xlabel(), top.get_xlabel(), ax.get_ylabel()) == ('training minibatch', 'validation minibatch', 'loss')
    assert plot_losses(rec, log=True).get_yscale() == 'log'
    assert plot_losses(replace(rec, loss=np.where(rec.step == 3, np.nan, rec.loss))).texts[0].get_text() == '1 losses are NaN or infinite'
    assert len(plot_losses(rec.sel(epoch=0), log=True).figure.axes) == 2


def test_nothing_to_draw():
    e = empty_recording(['a'], [[0, 1, 2]])
    with pytest.raises(ValueError, match='no training loss'): plot_losses(e)
    with pytest.raises(ValueError, match='has 0 rows, and the picture needs 1'): plot_hists(e)
    with pytest.raises(ValueError, match='needs 2'): plot_var_change(e)


@given(st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=60), st.integers(1, 5))
def test_smoothing(y, w):
    np.testing.assert_allclose(smooth(np.array(y), w), [np.mean(y[i:i+w]) for i in range(len(y)-w+1)], atol=1e-9)


def test_smoothing_leaves_nan_out():
    np.testing.assert_allclose(smooth(np.array([1, np.nan, 3, np.nan, np.nan]), 2), [1, 3, 3, np.nan])
    assert [smoothing_window(t) for t in (1, 4, 175, 1000)] == [1, 1, 35, 50]


def test_change_of_variance(rec):
    other = make(fits=(('freeze', 2), ('unfreeze', 4)), P=3, seed=1)
    fig = plot_var_change(rec, other, labels=['a', 'b'], window=3)
    ax = panels(fig)[1]
    x, y = ax.get_lines()[0].get_data()
    d = rec.delta_var()[:, 1]
    np.testing.assert_allclose(y, np.r_[smooth(d[:7], 3), np.nan, smooth(d[8:], 3), np.nan])
    assert x[0] == 1.5 and x[4] == 5.5 and x[6] == 9.5
    assert len(panels(fig)) == 3 and [t.get_text() for t in fig.legends[0].get_texts()] == ['a', 'b']
    assert 'smoothed over 3 minibatches' in [t.get_text() for t in fig.texts]


def test_no_curve_crosses_a_border(rec):
    "A layer that is frozen in the first fit is exactly flat there, however wide the smoothing"
    r = replace(rec, var=np.where(rec.fit[:, None] == 0, 1., rec.var))
    x, y = panels(plot_var_change(r, window=20))[0].get_lines()[0].get_data()
    assert (y[x < 7] == 0).all() and np.isnan(y[x == 7]).all() and x.max() < len(r)


def test_var_change_labels_and_curves(rec):
    u, f = rec.sel(phase='unfreeze'), rec.sel(phase='freeze')
    assert [t.get_text() for t in plot_var_change(u, f).legends[0].get_texts()] == ['unfreeze', 'freeze']
    ax = panels(plot_var_change(*[rec]*7))[0]
    assert len({(l.get_color(), l.get_linestyle()) for l in ax.get_lines() if len(l.get_xdata()) > 2}) == 7
    with pytest.raises(ValueError, match='each of the 2 recordings. Found 1'): plot_var_change(rec, rec, labels=['a'])
    with pytest.raises(ValueError, match='draws 1 to 15 recordings. Found 0'): plot_var_change()
    for w in (0, -1, 2.5):
        with pytest.raises(ValueError, match='window must be a whole number'): plot_var_change(rec, window=w)


def test_the_wrong_kind_of_object_is_refused(rec):
    d = rec.sel(phase='unfreeze')-rec.sel(phase='freeze')
    with pytest.raises(TypeError, match='draw it with plot_hist_diff'): plot_hists(d)
    with pytest.raises(TypeError, match='difference of two recordings.*Found Recording'): plot_hist_diff(rec)
    with pytest.raises(TypeError, match='learn.weight_hist.recording.*Found str'): plot_losses('run.npz')
    with pytest.raises(ValueError, match="False, True or 'both'. Found 'x'"): plot_hists(rec, change='x')
    with pytest.raises(ValueError, match='ncols must be at least 1'): plot_hists(rec, ncols=0)
    with pytest.raises(ValueError, match='picks nothing'): plot_hists(rec, layers=[])


def test_rows_without_a_finite_value_are_grey(rec):
    gone = rec.step[:, None] >= 20
    r = replace(rec, nonfinite=np.where(gone, rec.numel, 0), hist=np.where(gone[..., None], 0, rec.hist), under=np.where(gone, 0, rec.under), over=np.where(gone, 0, rec.over))
    image = plot_hist(r, 0).get_images()[0].get_array()
    assert np.ma.getmaskarray(image)[:, 20:].all() and not np.ma.getmaskarray(image)[:, :20].any()


def test_legend_on_an_axes_in_use(rec):
    fig, ax = plt.subplots()
    ax.plot([0, 1], label='mine')
    plot_losses(rec, ax=ax)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['training', 'validation']


def test_difference(rec):
    d = rec.sel(phase='unfreeze', epoch=range(2))-rec.sel(phase='freeze')
    fig = plot_hist_diff(d)
    v = full_counts(d)[:, 2, :-1].T
    np.testing.assert_allclose(panels(fig)[2].get_images()[0].get_array(), np.sign(v)*np.log1p(abs(v)))
    assert panels(fig)[2].get_title() == f'3 · 2  ≥{d.moved().mean(0)[2]:.1%} differ'
    assert any('unfreeze minus count in freeze' in ax.get_ylabel() for ax in fig.axes)


def test_drawing_shows_nothing_by_itself(rec, monkeypatch):
    monkeypatch.setattr(plt, 'show', lambda *a, **k: pytest.fail('plt.show was called'))
    plot_hists(rec); plot_losses(rec); plot_var_change(rec)


def test_what_can_not_be_drawn_is_said(rec):
    with pytest.raises(ValueError, match='needs two successive rows of one fit'): plot_var_change(rec.sel(step=[0, 5]))
    with pytest.raises(ValueError, match='has a finite value other than 0'): plot.plot_rms(replace(rec, var=rec.var*0, mean=rec.mean*np.nan))


def test_rms_by_depth(rec):
    ax = plot.plot_rms(rec, layers=[0, 1])
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), np.median(np.sqrt(rec.var+rec.mean**2), 0)[:2])
    assert ax.get_yscale() == 'log' and 'RMS of weights' in ax.get_ylabel()
