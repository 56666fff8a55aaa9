"""Curves show the right numbers, smoothing stays within a fit, and labels and legends are complete"""
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, strategies as st
from matplotlib.axes import Axes
from test_heatmaps import panels
from helpers import make

from fastai_bnstats.plot import plot_losses, plot_rms, plot_var_change
from fastai_bnstats.plot.curves import smooth, smoothing_window
from fastai_bnstats.plot.style import TRAIN, VALID
from fastai_bnstats.recording import empty_recording


def test_losses(rec):
    fig, ax = plt.subplots()
    assert plot_losses(rec, ax=ax) is ax and isinstance(ax, Axes)
    top = [a for a in fig.axes if a is not ax][0]
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), rec.loss)
    np.testing.assert_array_equal(top.get_lines()[0].get_ydata(), rec.valid_loss)
    assert (ax.get_lines()[0].get_color(), top.get_lines()[0].get_color()) == (TRAIN, VALID)
    assert (ax.get_xlabel(), top.get_xlabel(), ax.get_ylabel()) == ('training minibatch', 'validation minibatch', 'loss')
    assert plot_losses(rec, log=True).get_yscale() == 'log'
    for n, text in ((1, '1 loss is NaN or infinite'), (2, '2 losses are NaN or infinite')):
        assert plot_losses(replace(rec, loss=np.where(rec.step < n, np.nan, rec.loss))).texts[0].get_text() == text
    assert len(plot_losses(rec.sel(epoch=0), log=True).figure.axes) == 2


@given(st.lists(st.floats(-1e3, 1e3), min_size=5, max_size=60), st.integers(1, 5))
def test_smoothing(y, w):
    np.testing.assert_allclose(smooth(np.array(y), w), [np.mean(y[i:i+w]) for i in range(len(y)-w+1)], atol=1e-9)


def test_smoothing_leaves_out_nan():
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


def test_no_curve_crosses_from_one_fit_to_the_next(rec):
    "A layer that is frozen in the first fit is exactly flat there for any width of the smoothing"
    r = replace(rec, var=np.where(rec.fit[:, None] == 0, 1., rec.var))
    x, y = panels(plot_var_change(r, window=20))[0].get_lines()[0].get_data()
    assert (y[x < 7] == 0).all() and np.isnan(y[x == 7]).all() and x.max() < len(r)


def test_panels_have_one_range_of_x(rec):
    "Also those of layers whose variance is not known in all rows"
    var = np.where((rec.step[:, None] < [0, 5, 99]), np.nan, rec.var)
    limits = [{ax.get_xlim() for ax in panels(plot_var_change(r))} for r in (rec, replace(rec, var=var), replace(rec, var=rec.var*np.nan))]
    assert list(map(len, limits)) == [1, 1, 1] and limits[0] == limits[1]


def test_var_change_labels_and_curves(rec):
    u, f = rec.sel(phase='unfreeze'), rec.sel(phase='freeze')
    assert [t.get_text() for t in plot_var_change(u, f).legends[0].get_texts()] == ['unfreeze', 'freeze']
    ax = panels(plot_var_change(*[rec]*7))[0]
    assert len({(l.get_color(), l.get_linestyle()) for l in ax.get_lines() if len(l.get_xdata()) > 2}) == 7
    with pytest.raises(ValueError, match='each of the 2 recordings. Found 1'): plot_var_change(rec, rec, labels=['a'])
    with pytest.raises(ValueError, match='draws 1 to 15 recordings. Found 0'): plot_var_change()
    for runs in ({'x': u, 'y': f}, [u, f]):
        fig = plot_var_change(runs, labels=None if isinstance(runs, dict) else ['x', 'y'])
        assert [t.get_text() for t in fig.legends[0].get_texts()] == ['x', 'y']
    assert [t.get_text() for t in plot_rms({'x': u, 'y': f}).get_legend().get_texts()] == ['x', 'y']
    for w in (0, -1, 2.5):
        with pytest.raises(ValueError, match='window must be a whole number'): plot_var_change(rec, window=w)


def test_legend_on_an_axes_in_use(rec):
    fig, ax = plt.subplots()
    ax.plot([0, 1], label='mine')
    plot_losses(rec, ax=ax)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['training', 'validation']


def test_rms_by_depth(rec):
    ax = plot_rms(rec, layers=[0, 1])
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), np.median(np.sqrt(rec.var+rec.mean**2), 0)[:2])
    assert ax.get_yscale() == 'log' and 'RMS of weights' in ax.get_ylabel()


def test_refusals(rec):
    with pytest.raises(ValueError, match='no training loss.*select more rows'): plot_losses(empty_recording(['a'], [[0, 1, 2]]))
    with pytest.raises(ValueError, match='needs two successive rows of one fit.*Select more rows'): plot_var_change(rec.sel(step=[0, 5]))
    with pytest.raises(ValueError, match='has a finite value other than 0'): plot_rms(replace(rec, var=rec.var*0, mean=rec.mean*np.nan))
    with pytest.raises(ValueError, match='draws 1 to 15 recordings. Found 0'): plot_rms()
    with pytest.raises(ValueError, match="The recording 'b' has no layer '1.weight', which 'a' has. Choose layers that all"):
        plot_var_change({'a': rec, 'b': rec.sel(layers=0)})
    with pytest.raises(ValueError, match='plot_rms draws recordings of one quantity. Found gradients and weights: draw each by itself'):
        plot_rms(rec, replace(rec, meta={'quantity': 'gradients'}))


def test_rms_leaves_out_zeros(rec):
    r = replace(rec, var=np.where(rec.step[:, None] < 4, 0, rec.var), mean=np.where(rec.step[:, None] < 4, 0, rec.mean))
    np.testing.assert_allclose(plot_rms(r).get_lines()[0].get_ydata(), np.median(rec.rms[4:], 0))
    one = replace(rec, var=rec.var*[1, 0, 1], mean=rec.mean*[1, 0, 1])
    assert np.isnan(plot_rms(one).get_lines()[0].get_ydata()).tolist() == [False, True, False]
