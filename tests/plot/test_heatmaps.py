"""Heat maps show the right numbers in the right place, with labels, on the given axes"""
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import make
from matplotlib.figure import Figure

from fastai_bnstats.plot import plot_hist, plot_hist_diff, plot_hists
from fastai_bnstats.plot.heatmaps import choose_layers, layer_counts, moved_share
from fastai_bnstats.recording import Recording, full_counts


def panels(fig): return [ax for ax in fig.axes if ax.get_title()]


def test_heat_map_shows_log1p_of_the_counts_with_flow(rec):
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
    assert not any('·' in ax.get_title() for ax in panels(fig)) # they stand in order of their change
    titles = [ax.get_title().split('\n')[0] for ax in panels(plot_hists(rec, '*', change=change))]
    assert titles == ['1 · 0', '2 · 1', '3 · 2']*(n//3)


def test_nan_is_mentioned(rec):
    r = replace(rec, nonfinite=rec.nonfinite+2)
    assert '(2 NaN or inf)' in plot_hist(r, 0).get_title()


def test_edges_that_are_not_uniform(rec):
    r = replace(rec, edges=np.stack([np.r_[-2:0:6j, .1, .4, .9, 1.5, 2]]*3))
    assert plot_hist(r, 0).collections


def test_rows_without_a_finite_value_are_grey(rec):
    gone = rec.step[:, None] >= 20
    counts = {n: np.where(gone, 0, getattr(rec, n)) for n in ('under', 'over')}
    r = replace(rec, nonfinite=np.where(gone, rec.numel, 0), hist=np.where(gone[..., None], 0, rec.hist), **counts)
    image = plot_hist(r, 0).get_images()[0].get_array()
    assert np.ma.getmaskarray(image)[:, 20:].all() and not np.ma.getmaskarray(image)[:, :20].any()


def test_difference(rec):
    d = rec.sel(phase='unfreeze', epoch=range(2))-rec.sel(phase='freeze')
    fig = plot_hist_diff(d)
    v = full_counts(d)[:, 2, :-1].T
    np.testing.assert_allclose(panels(fig)[2].get_images()[0].get_array(), np.sign(v)*np.log1p(abs(v)))
    assert panels(fig)[2].get_title() == f'3 · 2\n≥{d.moved().mean(0)[2]:.1%} differ'
    assert any('unfreeze minus count in freeze' in ax.get_ylabel().replace('\n', ' ') for ax in fig.axes)


def test_layers_without_data(rec):
    r = replace(rec, edges=np.where(np.arange(3)[:, None] == 1, np.nan, rec.edges))
    assert [[t.get_text() for t in ax.texts] for ax in panels(plot_hists(r, '*'))] == [[], ['no data'], []]


@pytest.mark.parametrize('change', [False, True, 'both'])
def test_panels_share_one_selection_of_the_recording(rec, monkeypatch, change):
    "`sel` copies and validates every array, which is slow in a figure of many layers"
    calls, sel = [], Recording.sel
    monkeypatch.setattr(Recording, 'sel', lambda *a, **k: calls.append(1) or sel(*a, **k))
    plot_hists(rec, change=change)
    assert len(calls) <= 1


def many(P, moved):
    "A recording of P layers of 10 values each: `moved[i]` values of layer i leave their bin in the second row"
    rec = make(fits=(('fit', 1),), batches=2, P=P)
    hist = np.zeros((2, P, 10), int)
    hist[0, :, 3] = 10
    hist[1, :, 3], hist[1, :, 7] = 10-np.array(moved), moved
    zeros = np.zeros((2, P), int)
    return replace(rec, hist=hist, under=zeros, over=zeros, nonfinite=zeros, numel=zeros+10)


def shown(fig): return [ax.get_title().split(' · ')[-1].split('\n')[0] for ax in panels(fig)]


def footnote(fig): return [t.get_text() for t in fig.texts if 'more' in t.get_text() or 'Largest' in t.get_text()]


def test_by_default_the_layers_that_changed_most_come_first_and_the_others_are_counted():
    moved = np.r_[np.zeros(20, int), np.arange(1, 10), 0, np.full(21, 4)] # 51 layers
    rec = many(51, moved)
    best = sorted(range(51), key=lambda i: -moved[i])[:20] # sorted is stable, as the figure must be
    fig = plot_hists(rec)
    assert shown(fig) == [str(i) for i in best]
    assert footnote(fig) == ["Largest change first. +31 more layers (plot_hists(rec, '*') shows all)."]
    fig = plot_hists(rec, change=False)
    assert shown(fig) == [str(i) for i in sorted(best)] and footnote(fig) == ["+31 more layers (plot_hists(rec, '*') shows all)."]
    assert panels(fig)[0].get_images()[0].norm.vmin == 0
    assert len(panels(plot_hists(rec, '*'))) == 51 and footnote(plot_hists(rec, '*')) == []
    assert shown(plot_hists(rec, ['50.weight', '0.weight'])) == ['0', '50']
    assert footnote(plot_hists(rec, [0, 1])) == ["+49 more layers (plot_hists(rec, '*') shows all)."]


def test_a_layer_without_data_is_chosen_last(rec):
    ps, _ = choose_layers(rec, np.array([np.nan, 0, .5]))
    assert ps.tolist() == [2, 1, 0]


def test_changes_are_drawn_of_weights_and_counts_of_other_quantities(rec):
    def is_signed(fig): return panels(fig)[0].get_images()[0].norm.vmin < 0
    grads = replace(rec, meta={**rec.meta, 'quantity': 'gradients'})
    assert is_signed(plot_hists(rec)) and not is_signed(plot_hists(grads)) and is_signed(plot_hists(grads, change=True))
    assert shown(plot_hists(grads)) == ['0', '1', '2']


def test_share_that_moved(rec):
    np.testing.assert_array_equal(moved_share(rec), rec.sel(step=rec.step[[0, -1]]).moved()[-1])
    assert moved_share(many(3, [0, 5, 10])).tolist() == [0, .5, 1]


def test_counts_of_a_layer(rec):
    d = rec.sel(phase='unfreeze', epoch=range(2))-rec.sel(phase='freeze')
    for r in (rec, d): np.testing.assert_array_equal(layer_counts(r, 2), full_counts(r)[:, 2])


def test_refusals(rec):
    d = rec.sel(phase='unfreeze')-rec.sel(phase='freeze')
    with pytest.raises(TypeError, match='draw it with plot_hist_diff'): plot_hists(d)
    with pytest.raises(TypeError, match='difference of two recordings.*Found Recording'): plot_hist_diff(rec)
    with pytest.raises(ValueError, match="None, False, True or 'both'. Found 'x'"): plot_hists(rec, change='x')
    with pytest.raises(ValueError, match='ncols must be at least 1'): plot_hists(rec, ncols=0)
    with pytest.raises(ValueError, match='selects nothing'): plot_hists(rec, layers=[])
    with pytest.raises(ValueError, match='No layer matches'): plot_hists(rec, 'conv')


def test_the_title_of_a_single_pair_fits(rec):
    fig = plot_hists(rec, 0, change='both')
    fig.draw_without_rendering()
    for text in (t for sub in fig.subfigs[1].subfigs for t in sub.texts+[sub._suptitle] if t is not None):
        box = text.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= fig.bbox.width, text.get_text()


def test_the_difference_of_two_runs_with_equal_phases_is_named(rec):
    labels = [ax.get_ylabel().replace('\n', ' ') for ax in plot_hist_diff(rec-rec).axes]
    assert 'count in the first minus count in the second' in labels
