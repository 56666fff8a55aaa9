"""Pictures of paired seeds show the right numbers, and no text is cut off"""
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from fastai_bnstats.compare import bootstrap_band, paired_test
from fastai_bnstats.plot import forest, plot_bands, plot_forest
from fastai_bnstats.plot.style import COLOURS

rng = np.random.default_rng(0)
def result(centre=0., sd=.3, n=8, **kw):
    return paired_test(dict(enumerate(np.exp(rng.normal(centre, sd, n)).tolist())), dict.fromkeys(range(n), 1.), **kw)
def gone(): return paired_test({0: math.nan, **{s: 1.+s for s in range(1, 7)}}, dict.fromkeys(range(7), 1.))


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def lines(ax, marker): return [l for l in ax.lines if l.get_marker() == marker and len(l.get_xdata())]
def texts(ax): return [t.get_text() for t in ax.texts]


def on_the_page(ax):
    "Every text is inside the figure, and none overlaps another column"
    fig = ax.figure
    fig.canvas.draw()
    r = fig.canvas.get_renderer()
    shown = [t for t in ax.get_xticklabels() if ax.viewLim.x0 <= t.get_position()[0] <= ax.viewLim.x1]
    inside = [*ax.get_yticklabels(), *shown, *ax.texts, ax.xaxis.label, *(ax.get_legend().get_texts() if ax.get_legend() else [])]
    for t in inside:
        if not t.get_text(): continue
        b = t.get_window_extent(r)
        assert b.x0 >= -1 and b.y0 >= -1 and b.x1 <= fig.bbox.x1+1 and b.y1 <= fig.bbox.y1+1, t.get_text()
    boxes = sorted((t.get_window_extent(r) for t in ax.texts), key=lambda b: -b.y1)
    for a, b in zip(boxes, boxes[1:]): assert b.y1 <= a.y0+1.5, 'texts at the right overlap'
    ticks = sorted((t.get_window_extent(r) for t in shown), key=lambda b: b.x0)
    for a, b in zip(ticks, ticks[1:]): assert b.x0 > a.x1, 'tick labels overlap'
    labels = sorted((t.get_window_extent(r) for t in ax.get_yticklabels()), key=lambda b: -b.y1)
    for a, b in zip(labels, labels[1:]): assert b.y1 <= a.y0+1.5, 'labels overlap'
    assert ax.get_window_extent(r).width > .35*fig.bbox.width
    return True


def test_a_row_shows_seeds_mean_interval_margin_and_the_line_of_no_effect():
    rs = [result(.5), result(-.5, margin=(.5, 2))]
    _, ax = plt.subplots(layout='constrained')
    assert plot_forest(rs, ['up', 'down'], ['supported', 'contradicted'], ax) is ax and ax.get_xscale() == 'log'
    for y, (r, dots, diamond, zone) in enumerate(zip(rs, lines(ax, 'o'), lines(ax, 'D'), ax.patches)):
        np.testing.assert_allclose(dots.get_xdata(), np.exp(r.differences))
        assert len(set(dots.get_ydata())) == 1 and abs(dots.get_ydata()[0]-y) < .5 and dots.get_alpha() < 1
        assert diamond.get_xdata()[0] == pytest.approx(r.effect) and abs(diamond.get_ydata()[0]-y) < .5
        assert (zone.get_x(), zone.get_x()+zone.get_width()) == pytest.approx(tuple(np.exp(r.margin)))
        assert (zone.get_y(), zone.get_height()) == (y-.5, 1)
    bars = [l for l in ax.lines if l.get_linewidth() == 2 and len(l.get_xdata())]
    assert [tuple(b.get_xdata()) for b in bars] == [r.interval for r in rs] and [b.get_color() for b in bars] == ['#0072B2', '#D55E00']
    assert any(np.allclose(l.get_xdata(), 1) and l.get_color() == 'black' for l in ax.lines)
    assert [t.get_text() for t in ax.get_yticklabels()] == ['up', 'down']
    assert ax.get_ylim() == (1.5, -.5)
    assert ax.get_xlabel() == 'ratio a / b'
    assert texts(ax)[::2] == ['supported', 'contradicted'] and '[' in texts(ax)[1]
    assert on_the_page(ax)


def test_differences_have_a_linear_axis_and_the_line_of_no_effect_at_0():
    r = paired_test(dict(enumerate(rng.normal(0, 1, 8))), dict.fromkeys(range(8), 0.), 'difference', (-.5, .5))
    ax = plot_forest(r)
    assert ax.get_xscale() == 'linear' and any(list(l.get_xdata()) == [0, 0] for l in ax.lines) and ax.get_xlabel() == 'difference a − b'
    np.testing.assert_allclose(lines(ax, 'o')[0].get_xdata(), r.differences)
    assert on_the_page(ax)


def test_too_few_seeds_and_diverged_ones_are_shown_with_the_reason():
    few, one = result(.3, n=4), result(.3, n=1)
    ax = plot_forest({'few': few, 'one': one, 'gone': gone()}, verdicts=['undecided']*3)
    t = texts(ax)
    assert '4 seeds: too few for an interval' in t[1]
    assert '1 seed: too few' in t[3]
    assert t[5].replace('\n', ' ') == 'seed 0: not a positive finite number (a=nan, b=1)'
    assert [len(l.get_xdata()) for l in lines(ax, 'o')] == [4, 1, 6]
    assert [l.get_markerfacecolor() for l in lines(ax, 'D')] == ['white', 'white']
    assert not [l for l in ax.lines if l.get_linewidth() == 2 and len(l.get_xdata())]
    assert on_the_page(ax)
    all_diverged = paired_test(dict.fromkeys(range(6), math.nan), dict.fromkeys(range(6), 1.)) # no dot at all, and a long reason
    assert on_the_page(plot_forest([all_diverged]))


LONG = 'the change of the variance of layer4.1.conv2 during the first three epochs of the unfreeze phase, by the median'


@pytest.mark.parametrize('rows', [1, 2, 12])
@pytest.mark.parametrize('spread', [.02, .3, 7.])
@pytest.mark.parametrize('label', ['x', LONG])
def test_nothing_is_cut_off_with_few_or_many_rows_and_huge_ratios(rows, spread, label):
    rs = [result(c, .1*spread) for c in np.linspace(-spread, spread, rows)]
    ax = plot_forest(rs, [f'{label} {i}' for i in range(rows)], ['contradicted']*rows)
    assert on_the_page(ax)
    ticks = ax.get_xticks()
    assert 3 <= len(ticks) <= 9
    assert 1 in ticks.round(12)
    assert not any('{' in t.get_text() or '$' in t.get_text() for t in ax.get_xticklabels())
    lo, hi = ax.get_xlim()
    for l in lines(ax, 'o'): assert lo < l.get_xdata().min() and l.get_xdata().max() < hi


def test_notes_have_enough_digits_to_distinguish_interval_and_mean():
    assert forest._note(result(math.log(1.03), .005)).startswith('1.0')


@pytest.mark.parametrize('call, error, text', [
    (lambda: plot_forest([result(), paired_test({0: 1., 1: 2.}, {0: 0., 1: 1.}, 'difference', (-1, 1))]), ValueError,
     'ratios or differences, not both, and no ranks. Found ratio, difference: draw one picture for each scale'),
    (lambda: plot_forest([]), ValueError, 'at least one result'),
    (lambda: plot_forest([1.]), TypeError, 'draws results of paired_test. Found float'),
    (lambda: plot_forest([result()], ['a', 'b']), ValueError, 'labels= must have one text for each of the 1 results'),
    (lambda: plot_forest([result()], 'a'), ValueError, 'labels='),
    (lambda: plot_forest([result()], verdicts=[]), ValueError, 'verdicts= must have one text'),
    (lambda: plot_bands([np.zeros((2, 3))]), ValueError, 'Found list'),
    (lambda: plot_bands({}), ValueError, 'Found 0 groups'),
    (lambda: plot_bands({i: np.zeros((2, 3)) for i in range(9)}), ValueError, '1 to 8 groups. Found 9'),
    (lambda: plot_bands({'a': np.zeros(3)}), ValueError, r"Group 'a' must be \(seeds, T\).*Found shape \(3,\)"),
    (lambda: plot_bands({'a': np.zeros((2, 3))}, x=[1, 2]), ValueError, "the 3 places of group 'a'"),
    (lambda: plot_bands({'a': np.zeros((2, 3))}, labels='a'), ValueError, 'must name each of the 1 groups')])
def test_errors_say_what_to_do(call, error, text):
    with pytest.raises(error, match=text): call()


def test_bands_show_mean_and_bootstrap_band():
    groups = {'a': rng.normal(size=(6, 30)), 'b': rng.normal(5, 1, (5, 30))}
    _, ax = plt.subplots(layout='constrained')
    x = np.arange(30)*10
    assert plot_bands(groups, x, ['first', 'second'], 'loss', ax=ax, xlabel='step') is ax
    for g, line, band, c in zip(groups.values(), ax.lines, ax.collections, COLOURS):
        np.testing.assert_allclose(line.get_xdata(), x)
        np.testing.assert_allclose(line.get_ydata(), g.mean(0))
        low, high = bootstrap_band(g)
        ends = band.get_paths()[0].get_extents()
        assert (ends.y0, ends.y1) == pytest.approx((low.min(), high.max())) and line.get_color() == c
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['first  (6 seeds)', 'second  (5 seeds)']
    assert (ax.get_xlabel(), ax.get_ylabel()) == ('step', 'loss')
    assert len(COLOURS) == len(set(COLOURS)) == 8


def test_bands_with_gaps_one_seed_and_a_log_axis():
    g = np.exp(rng.normal(size=(4, 20)))
    g[0, 10:], g[:, 5] = np.nan, np.nan
    ax = plot_bands({'gaps': g, 'one': np.full((1, 8), 2.), 'not positive': np.full((3, 8), -1.)}, log=True)
    assert ax.get_yscale() == 'log'
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ['gaps  (4 seeds, 4 with gaps)', 'one  (1 seed)', 'not positive  (3 seeds)']
    y = ax.lines[0].get_ydata()
    assert np.isnan(y[5]) and y[12] == pytest.approx(g[1:, 12].mean()) and np.isnan(ax.lines[2].get_ydata()).all()
    assert on_the_page(ax)
    plot_bands({'nothing': np.full((2, 3), np.nan)}, log=True).figure.canvas.draw()
