"""Ridge plots and means of several runs show the numbers of the recordings, each in the row and colour that its label says"""
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import make
from matplotlib.colors import to_hex
from matplotlib.patches import StepPatch
from test_heatmaps import panels

from fastai_bnstats.plot import plot_hist, plot_mean, plot_ridge
from fastai_bnstats.plot.style import BLUE, VERMILION, borders
from fastai_bnstats.recording import common_rows, empty_recording


@pytest.fixture
def other(): return make(fits=(('freeze', 2), ('unfreeze', 4)), P=3, seed=1)


def outlines(ax):
    "Heights over the lines of the rows, edges and colour of each histogram, from the top row to the bottom"
    found = [(p.get_data(), to_hex(p.get_edgecolor())) for p in ax.patches if isinstance(p, StepPatch) and not p.fill]
    return [(d.values-d.baseline, d.edges, colour, -d.baseline) for d, colour in found]


def steps(ax): return [t.get_text() for t in ax.get_yticklabels()]


def density(rec, t, p=1): return rec.hist[t, p]/rec.numel[t, p]/np.diff(rec.edges[p])


def test_heights_are_densities_on_one_scale(rec):
    ax = plot_ridge(rec, layer='1.weight', steps=[0, 5, -1])
    drawn, want = outlines(ax), [density(rec, t) for t in (0, 5, 23)]
    for k, ((h, e, _, y), w) in enumerate(zip(drawn, want, strict=True)):
        np.testing.assert_allclose(h/np.max([d[0] for d in drawn]), w/np.max(want), atol=1e-12)
        assert (e == rec.edges[1]).all() and y == k
    inside = 1-(rec.under+rec.over)[[0, 5, 23], 1]/rec.numel[0, 1]
    np.testing.assert_allclose([(w*np.diff(rec.edges[1])).sum() for w in want], inside)
    assert steps(ax) == ['freeze  0', '5', 'unfreeze  23'] and (ax.get_xlabel(), ax.get_ylabel()) == ('weight', 'step')
    assert ax.get_title() == '1' and ax.get_legend() is None and len({c for *_, c, _ in drawn}) == 3 # the colour shows the time


def test_runs_with_different_edges_and_lengths(rec, other):
    short = replace(other, edges=other.edges*1.5).sel(step=range(20))
    ax = plot_ridge({'a': rec, 'b': short}, layer=1, steps=[2, 19])
    assert [c for *_, c, _ in outlines(ax)] == [VERMILION.lower(), BLUE.lower()]*2
    (a, ea, *_), (b, eb, *_), *_ = outlines(ax)
    assert (eb == ea*1.5).all()
    np.testing.assert_allclose(a[4]/b[4], density(rec, 2)[4]/(other.hist[2, 1]/100/np.diff(short.edges[1]))[4])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['a', 'b']
    assert steps(plot_ridge(rec, short, layer=1))[-1] == '19' # the last that both have
    np.testing.assert_array_equal(common_rows(rec, short), np.arange(20)[:, None].repeat(2, 1))


def test_layers_are_found_by_name(rec, other):
    reordered = other.sel(layers=['2.weight', '1.weight'])
    for ax in (plot_ridge(rec, reordered, layer='2.weight', steps=[3]), plot_ridge(rec, other, layer=2, steps=[3])):
        (a, *_), (b, *_) = outlines(ax)
        np.testing.assert_allclose(a/a.max(), density(rec, 3, 2)/density(rec, 3, 2).max())
        np.testing.assert_allclose(b/b.max(), density(other, 3, 2)/density(other, 3, 2).max())


def test_phases_of_one_run_are_paired_by_place(rec):
    f, u = rec.sel(phase='freeze'), rec.sel(phase='unfreeze')
    ax = plot_ridge(f, u, layer=0, steps=[0, 7])
    assert ax.get_ylabel() == "step of 'freeze'" and steps(ax) == ['0', '7']
    (_, _, _, _), (b, *_), *_ = outlines(ax)
    np.testing.assert_allclose(b/b.max(), density(rec, 8, 0)/density(rec, 8, 0).max())
    thinned = make(fits=(('freeze', 2), ('unfreeze', 4)), P=3, every=5)
    assert steps(plot_ridge(rec, thinned, layer=0, steps=99)) == ['freeze  0', '5', 'unfreeze  10', '15', '20']


def test_a_glob_that_matches_several_layers_is_refused(rec):
    for draw in (plot_ridge, plot_hist):
        with pytest.raises(ValueError, match=r"must select one layer. '\*' matches 3: 0.weight, 1.weight, 2.weight. Pass one"):
            draw(rec, layer='*')
    with pytest.raises(ValueError, match='matches 2: 0.weight, 2.weight'): plot_ridge(rec-rec, layer='[02].*')
    assert plot_ridge(rec, layer='1.*').get_title() == '1'


def test_difference(rec, other):
    d = rec-other
    ax = plot_ridge(d, layer=1, steps=[0, 23], labels=['left', 'right'])
    more, less, *_ = outlines(ax)
    want = rec.hist[0, 1]/100-other.hist[0, 1]/100
    scale = max(np.abs(rec.hist[t, 1]/100-other.hist[t, 1]/100).max() for t in (0, 23))
    np.testing.assert_allclose(more[0]+less[0], want/scale, atol=1e-12)
    assert (more[0] >= 0).all() and (less[0] <= 0).all() and more[2] != less[2] and len(outlines(ax)) == 4
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['more in left', 'more in right'] and ax.get_ylabel() == 'step'
    assert f'at most {100*scale:.2g}%' in ax.texts[0].get_text()
    phases = plot_ridge(rec.sel(phase='unfreeze', epoch=range(2))-rec.sel(phase='freeze'), layer=0)
    assert phases.get_ylabel() == "step of 'unfreeze'" and steps(phases)[0] == '8'
    assert [t.get_text() for t in plot_ridge(rec-rec, layer=0).get_legend().get_texts()] == ['more in the first', 'more in the second']
    with pytest.raises(ValueError, match=r"must name the 2 recordings of the difference. Found 1: \['x'\]"):
        plot_ridge(d, layer=0, labels=['x'])


def test_what_is_not_drawn_is_said(rec):
    note = plot_ridge(rec, layer=1, steps=1).texts[0].get_text()
    beyond = (rec.under+rec.over)[0, 1]/100
    assert f'Up to {100*beyond:.0f}% of the elements lie outside' in note and 'density' in note
    bad = replace(rec, hist=rec.hist*0, under=rec.under*0, over=rec.over*0, nonfinite=rec.numel)
    assert 'Up to 100%' in plot_ridge(bad, layer=1).texts[0].get_text()


def test_rows_without_data(rec):
    gone = (rec.step == 5)[:, None]
    counts = {k: getattr(rec, k) for k in ('hist', 'under', 'over', 'numel')}
    r = replace(rec, **{k: np.where(gone if c.ndim == 2 else gone[..., None], 0, c) for k, c in counts.items()})
    ax = plot_ridge(r, layer=0, steps=[0, 5, 6])
    assert [y for *_, y in outlines(ax)] == [0, 2]
    for never in (replace(rec, edges=rec.edges*np.nan), replace(r, **{k: c*0 for k, c in counts.items()})):
        assert 'no data' in [t.get_text() for t in plot_ridge(never, layer=0).texts]
        assert 'no data' in [t.get_text() for t in plot_ridge(never-never, layer=0).texts]


def test_only_the_range_with_elements_is_drawn(rec):
    hist = np.zeros_like(rec.hist)
    hist[..., 4] = rec.numel
    ax = plot_ridge(replace(rec, hist=hist, under=rec.under*0, over=rec.over*0), layer=0)
    lo, hi = ax.get_xlim()
    assert rec.edges[0, 4] > lo > rec.edges[0, 3] and rec.edges[0, 5] < hi < rec.edges[0, 6]


def test_refused_ridges(rec, other):
    for bad, said in ((dict(steps=0), 'at least 1, or a list of their numbers. Found 0'), (dict(steps=[]), 'Found '),
                      *((dict(steps=s), 'must be how many') for s in (True, -1, 2.5, 'a', [.5], [True], None)),
                      (dict(steps=[0, 77]), 'Step 77 has no row that all recordings share. The nearest: 22, 23. Negative'),
                      (dict(steps=[-99]), 'Step -99'), (dict(layer='x'), "No layer matches 'x'"), (dict(labels=['a']), 'each of the 2')):
        with pytest.raises(ValueError, match=said): plot_ridge(rec, other, **{'layer': 0, **bad})
    with pytest.raises(ValueError, match="'b' has no layer '0.weight', which 'a' has"):
        plot_ridge({'a': rec, 'b': other.sel(layers=1)}, layer=0)
    with pytest.raises(ValueError, match='one quantity. Found updates and weights'):
        plot_ridge(rec, replace(other, meta={'quantity': 'updates'}), layer=0)
    with pytest.raises(ValueError, match=r'no row at the same place.*Select the phases'):
        plot_ridge(rec.sel(epoch=0), rec.sel(epoch=1), layer=0)
    with pytest.raises(ValueError, match='has 0 rows'): plot_ridge(empty_recording(['a'], [[0, 1, 2]]), layer=0)
    with pytest.raises(TypeError, match='Found str'): plot_ridge(rec, '0.weight', layer=0)
    with pytest.raises(TypeError, match="'layer'"): plot_ridge(rec)
    with pytest.raises(ValueError, match='draws 1 to 15 recordings. Found 0'): plot_ridge(layer=0)


def test_axes_of_your_own_and_fifteen_runs(rec):
    fig, ax = plt.subplots()
    assert plot_ridge(rec, layer=0, ax=ax, title='mine') is ax and ax.get_title() == 'mine'
    drawn = plot_ridge({f'run {i}': rec for i in range(15)}, layer=0, steps=2)
    looks = {(c, p.get_linestyle()) for (*_, c, _), p in zip(outlines(drawn), [p for p in drawn.patches if not p.fill])}
    assert len(looks) == len(drawn.get_legend().get_texts()) == 15


def band(ax, label):
    line, = (l for l in ax.get_lines() if l.get_label() == label)
    low, high = (l.get_ydata() for l in ax.get_lines()[ax.get_lines().index(line)-2:][:2])
    return line.get_xdata(), line.get_ydata(), low, high


def test_mean_and_band(rec, other):
    thinned = make(fits=(('freeze', 2), ('unfreeze', 4)), P=3, seed=1, every=5)
    fig = plot_mean({'a': rec, 'b': thinned}, title='a title')
    for p, ax in enumerate(panels(fig)):
        for label, r in (('a', rec), ('b', thinned)):
            x, y, low, high = band(ax, label)
            np.testing.assert_array_equal(x, r.step)
            np.testing.assert_array_equal(y, r.mean[:, p])
            np.testing.assert_allclose((high-low)/2, np.sqrt(r.var[:, p]))
            np.testing.assert_allclose((high+low)/2, r.mean[:, p], atol=1e-12)
        vertical = sorted({l.get_xdata()[0] for l in ax.get_lines() if len(l.get_xdata()) == 2 and l.get_xdata()[0] == l.get_xdata()[1]})
        assert vertical == sorted(np.concatenate(borders(rec))-.5)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ['a', 'b']
    said = [t.get_text() for t in fig.texts]
    assert 'step' in said and 'weight' in said and 'mean ± standard deviation' in said and fig.get_suptitle() == 'a title'


def test_runs_without_names_are_numbered_and_bands_do_not_hide_each_other(rec, other):
    fig = plot_mean(rec, other)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ['run 1', 'run 2']
    assert not any(ax.collections for ax in panels(fig)) and panels(plot_mean(rec))[0].collections
    assert [t.get_text() for t in plot_ridge(rec, other, layer=0).get_legend().get_texts()] == ['run 1', 'run 2']
    mixed = plot_mean(rec.sel(fit=0), rec.sel(fit=1), rec.sel(fit=0))
    assert [t.get_text() for t in mixed.legends[0].get_texts()] == ['run 1', 'run 2', 'run 3']


def test_phases_have_a_common_start(rec):
    fig = plot_mean(rec.sel(phase='freeze'), rec.sel(phase='unfreeze'))
    ax = panels(fig)[0]
    np.testing.assert_array_equal(band(ax, 'unfreeze')[0], np.arange(16))
    assert 'step since the first row' in [t.get_text() for t in fig.texts] and ax.get_xlim() == (-.5, 15.5)
    alone = panels(plot_mean(rec.sel(phase='unfreeze')))[0]
    assert alone.get_xlim() == (7.5, 23.5) and band(alone, 'unfreeze')[0][0] == 8


def test_means_of_few_and_of_missing_values(rec):
    one = panels(plot_mean(rec.sel(step=3)))[0].get_lines()[2]
    assert one.get_marker() == '.' and len(one.get_xdata()) == 1
    odd = replace(rec, mean=rec.mean*np.where(rec.step < 9, 1, np.nan)[:, None], var=rec.var*np.where(rec.step < 4, 1, np.inf)[:, None])
    for r in (odd, replace(rec, mean=rec.mean*np.nan, var=rec.var*np.nan)):
        fig = plot_mean(r)
        fig.canvas.draw()
        assert {ax.get_xlim() for ax in panels(fig)} == {(-.5, 23.5)}
    selected = panels(plot_mean(rec.sel(step=[0, 10, 20])))[0].get_lines()[2]
    assert selected.get_xdata().tolist() == [0, 10, 20]


def test_a_refused_picture_leaves_no_figure(rec):
    with pytest.raises(ValueError, match="'b' has no layer '1.weight'"): plot_mean({'a': rec, 'b': rec.sel(layers=[0, 2])})
    with pytest.raises(ValueError, match='one quantity'): plot_mean(rec, replace(rec, meta={'quantity': 'outputs'}))
    with pytest.raises(TypeError, match='difference of two recordings'): plot_mean(rec-rec)
    with pytest.raises(ValueError, match='ncols must be at least 1'): plot_mean(rec, ncols=0)
    assert not plt.get_fignums()
    assert len(panels(plot_mean(rec, layers=[0, 2], ncols=1))) == 2
