"""In pictures of more minibatches than pixels no single minibatch is lost, at any size, resolution or zoom"""
from dataclasses import replace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given, strategies as st
from matplotlib.colors import to_rgba
from test_heatmaps import panels

from fastai_bnstats.plot import plot_hist, plot_hist_diff, plot_hists, plot_losses, plot_var_change
from fastai_bnstats.plot.columns import group_starts, largest
from fastai_bnstats.plot.style import TRAIN, VALID
from fastai_bnstats.recording import DIMS, NORMS, Recording, empty_recording

SPIKE = 3000 # of the 5,000 elements lie above the last bin in one minibatch
EQUAL, UNEQUAL = np.linspace(-2, 2, 11), np.r_[-2:0:6j, .1, .4, .9, 1.5, 2]


def long(T, at=None, edges=EQUAL, nan=False):
    "T minibatches of a layer with 5,000 elements, which lie in the bins, but for those of the minibatch `at`"
    row, spike = np.zeros(10, int), np.zeros(T, int)
    row[4:6] = 4800, 200
    if at is not None: spike[at] = 5000 if nan else SPIKE
    hist = np.tile(row, (T, 1, 1))
    hist[:, 0, 4] -= np.minimum(spike, 4800)
    hist[:, 0, 5] -= np.maximum(spike-4800, 0)
    zero, loss = np.zeros((T, 1), int), np.full(T, .5)+.1*np.sin(np.arange(T))
    if at is not None: loss[at] = 4.
    over, nonfinite = (zero, spike[:, None]) if nan else (spike[:, None], zero)
    one, empty = np.arange(T), empty_recording(['w'], [edges])
    place = {f'{p}{k}': v for p in ('', 'loss_', 'valid_') for k, v in dict(step=one, fit=0*one, epoch=0*one, batch=one).items()}
    counts = dict(hist=hist, under=zero, over=over, nonfinite=nonfinite, numel=hist.sum(-1)+over+nonfinite)
    return replace(empty, **counts, **place, **dict.fromkeys(NORMS), mean=zero*0., var=zero+1., phase=np.full(T, 'a'), stepped=one >= 0,
                   trainable=zero == 0, lr=zero+.1, loss=loss, valid_loss=loss, valid_n=one*0+8, meta={'phases': ['a']})


def pixels(fig, dpi=100):
    "(height, width, RGBA) of a figure, from the bottom up"
    fig.set_dpi(dpi)
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[::-1]/255


def shows(ax, colour, y0, y1, dpi=100, tolerance=.02):
    "Does a pixel of the axes between the data coordinates y0 and y1 have this colour?"
    image = pixels(ax.figure.figure, dpi)
    (left, low), (right, high) = (ax.transData.transform((x, y)) for x, y in zip(ax.get_xlim(), (y0, y1)))
    part = image[round(low)+1:round(high)-1, round(left):round(right)+1]
    return bool((np.abs(part-colour).max(-1) < tolerance).any())


DRAW = { # picture -> function of (recording with a spike, without) -> axes
    'plot_hist': lambda a, b: plot_hist(a, 0), 'change of one': lambda a, b: plot_hist(a, 0, change=True),
    'plot_hists': lambda a, b: panels(plot_hists(a))[0], 'change': lambda a, b: panels(plot_hists(a, change=True))[0],
    'both': lambda a, b: panels(plot_hists(a, change='both'))[1], 'more': lambda a, b: panels(plot_hist_diff(a-b))[0],
    'fewer': lambda a, b: panels(plot_hist_diff(b-a))[0]}


def expected(ax, count):
    im = (*ax.images, *(c for c in ax.collections if c.get_array() is not None))[0]
    return im.cmap(im.norm(np.sign(count)*np.log1p(abs(count))))


@pytest.mark.parametrize('T', [200, 2000, 20000])
@pytest.mark.parametrize('draw', DRAW.values(), ids=DRAW)
def test_one_minibatch_is_seen_among_many(T, draw):
    for at in (T//3, T-1):
        ax = draw(long(T, at), long(T))
        colour = expected(ax, -SPIKE if draw is DRAW['fewer'] else SPIKE)
        for dpi in (50, 200): assert shows(ax, colour, 2, 2.4, dpi), (at, dpi)
        plt.close('all')


@pytest.mark.parametrize('edges', [EQUAL, UNEQUAL], ids=['equal bins', 'unequal bins'])
@pytest.mark.parametrize('width', [1, 2.3, 7, 30])
def test_at_every_width(edges, width):
    ax = plot_hist(long(3000, 1234, edges), 0, ax=plt.subplots(figsize=(width, 2))[1])
    for dpi in (37, 100): assert shows(ax, expected(ax, SPIKE), 2, ax.get_ylim()[1], dpi)


@pytest.mark.parametrize('edges', [EQUAL, UNEQUAL], ids=['equal bins', 'unequal bins'])
def test_zooming_in_shows_single_minibatches(edges):
    ax = plot_hist(long(20000, 10000, edges), 0)
    colour, top = expected(ax, SPIKE), ax.get_ylim()[1]
    ax.set_xlim(9995.5, 10005.5)
    column = pixels(ax.figure)[:, :, :3]
    left, right = (round(ax.transData.transform((x, 0))[0]) for x in (9999.5, 10000.5))
    row = round(ax.transData.transform((0, (2+top)/2))[1])
    hit = np.flatnonzero(np.abs(column[row]-colour[:3]).max(-1) < .02)
    assert abs(hit.min()-left) <= 1 and abs(hit.max()-right) <= 1


@pytest.mark.parametrize('edges', [EQUAL, UNEQUAL], ids=['equal bins', 'unequal bins'])
def test_a_minibatch_of_nan_is_seen_among_many(edges):
    ax = plot_hist(long(20000, 7777, edges, nan=True), 0)
    assert shows(ax, to_rgba('#bbbbbb'), -1.9, -1)
    odd, r = np.arange(20000)[:, None]%2, long(20000, edges=edges)
    r = replace(r, numel=r.numel*odd, hist=r.hist*odd[..., None]) # every second minibatch has no elements: the others are shown
    assert not shows(plot_hist(r, 0), to_rgba('#bbbbbb'), -1.9, -1)


@pytest.mark.slow
@pytest.mark.parametrize('T', [200, 2000, 20000])
@pytest.mark.parametrize('log', [False, True])
def test_one_loss_is_seen_among_many(T, log):
    for at in (0, T//3, T-1):
        ax = plot_losses(long(T, at), log=log)
        top = [a for a in ax.figure.axes if a is not ax][0]
        for dpi in (50, 200):
            for colour, other in ((TRAIN, top), (VALID, ax)): # one at a time, since one covers the other
                for line in other.get_lines(): line.set_visible(False)
                assert shows(ax, to_rgba(colour), 3, 4.1, dpi, tolerance=.6), (at, dpi)
                for line in other.get_lines(): line.set_visible(True)
        plt.close('all')


def test_a_long_recording_says_what_a_pixel_shows():
    def texts(fig): return ' '.join(t.get_text() for t in fig.findobj(mpl.text.Text))
    for draw, what in (('plot_hist', 'count'), ('change of one', 'change'), ('plot_hists', 'count'), ('both', 'count or change'),
                       ('more', 'difference')):
        note = f'Minibatches that share a pixel: the largest {what} is drawn.'
        assert note in texts(DRAW[draw](long(3000), long(3000)).figure.figure)
        assert 'share a pixel' not in texts(DRAW[draw](long(100), long(100)).figure.figure)


def two_layers(r, names):
    "A recording whose second layer equals the first"
    def double(n, d): return np.repeat(getattr(r, n), 2, d.index('P')) if 'P' in d else getattr(r, n)
    return Recording(**{**{n: double(n, d) for n, d in DIMS.items()}, 'names': np.array(names)}, meta=r.meta)


@pytest.mark.parametrize('draw', [lambda r: plot_hist(r, 0).figure, plot_hists], ids=['plot_hist', 'plot_hists'])
def test_the_notes_stay_on_the_page(draw):
    fig = draw(two_layers(long(3000), ['0.conv.weight', '0.idpath.0.weight']))
    fig.canvas.draw()
    boxes = {t: t.get_window_extent() for t in fig.findobj(mpl.text.Text) if t.get_text() and t.get_visible()}
    note, = (b for t, b in boxes.items() if 'share a pixel' in t.get_text())
    assert fig.bbox.x0 <= note.x0 and note.x1 <= fig.bbox.x1 and fig.bbox.y0 <= note.y0
    assert not [t.get_text() for t, b in boxes.items() if b is not note and b.overlaps(note)]
    assert not [ax for ax in fig.axes if ax.get_window_extent().overlaps(note)]


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=60), st.integers(1, 70))
def test_each_group_shows_its_largest_element(xs, n):
    starts = group_starts(len(xs), n)
    assert len(starts) == min(len(xs), n) and starts[0] == 0
    got = largest(np.array([xs], float), starts, 1)[0]
    for v, group in zip(got, np.split(xs, starts[1:])): assert len(group) and abs(v) == np.abs(group).max() and v in group


def test_all_panels_follow_when_one_is_zoomed(rec):
    "Without sharing an axis: matplotlib then visits all panels for each line of each panel, 70 s for 301 layers"
    for fig in (plot_hists(rec), plot_hists(rec, change='both'), plot_var_change(rec)):
        a, b, *_ = panels(fig)
        assert len(a.get_shared_x_axes().get_siblings(a)) == 1 and a.get_xlim() == b.get_xlim()
        a.set_xlim(2, 5)
        assert b.get_xlim() == (2, 5)
