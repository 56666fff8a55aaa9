"""The picture of update ratios shows `update_ratio`, smoothed within each fit, and names each layer"""
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import make
from hypothesis import given, settings, strategies as st
from matplotlib.colors import to_hex

from fastai_bnstats.compare import update_ratio
from fastai_bnstats.plot import plot_update_ratio
from fastai_bnstats.plot.ratio import RULE, smooth_log_ratio
from fastai_bnstats.recording import NORMS, empty_recording


def updates(P=3, seed=0, **kwargs):
    "A recording with random norms"
    rec, rng = make(P=P, **kwargs), np.random.default_rng(seed)
    norms = {n: np.exp(rng.normal(size=rec.mean.shape))*(1e-3 if n == 'step_norm' else 1) for n in NORMS}
    return replace(rec, **norms, meta={**rec.meta, 'quantity': 'updates'})


def curves(ax): return [l for l in ax.get_lines() if len(l.get_xdata()) != 2]


def names(ax):
    bar, = (a for a in ax.figure.axes if a is not ax)
    return bar.get_yticklabels()


def test_without_smoothing_it_is_the_ratio():
    rec = updates()
    ax, r = plot_update_ratio(rec, window=1), update_ratio(rec)
    lines = curves(ax)
    assert len(lines) == 6 and ax.get_yscale() == 'log' and ax.get_ylabel() == '|step| / |weights|' and ax.get_xlabel() == 'step'
    for k, l in enumerate(lines): # fit by fit
        rows = rec.fit == k//3
        np.testing.assert_array_equal(l.get_xdata(), rec.step[rows])
        np.testing.assert_allclose(l.get_ydata(), r[rows, k%3], rtol=1e-10)
    assert [t.get_text() for t in names(ax)] == ['0', '1', '2'] and len({to_hex(l.get_color()) for l in lines}) == 3
    assert RULE in [l.get_ydata()[0] for l in ax.get_lines()] and 'rule of thumb' in ax.texts[0].get_text()


@given(st.integers(0, 99), st.integers(1, 15))
@settings(max_examples=30)
def test_smoothing_is_a_centred_mean_within_a_fit(seed, window):
    rec = updates(seed=seed)
    zero = np.random.default_rng(seed).random(rec.norm.shape) < .3
    rec = replace(rec, step_norm=np.where(zero, 0, rec.step_norm))
    r, got = update_ratio(rec), smooth_log_ratio(rec, window)
    for fit in (0, 1):
        rows = np.flatnonzero(rec.fit == fit)
        for k, t in enumerate(rows):
            half = min(k, len(rows)-1-k, (window-1)//2)
            for p in range(3):
                near = [np.log10(r[s, p]) for s in rows[k-half:k+half+1] if r[s, p] > 0]
                if r[t, p] > 0: np.testing.assert_allclose(got[t, p], np.mean(near), rtol=1e-9)
                else: assert np.isnan(got[t, p])


def test_zeros_and_frozen_layers():
    rec = updates()
    still = (rec.fit == 0)[:, None] & (np.arange(3) > 0) | (np.arange(3) == 2)
    ax = plot_update_ratio(replace(rec, step_norm=np.where(still, 0, rec.step_norm)), window=1)
    ax.figure.canvas.draw()
    assert [len(l.get_xdata()) for l in curves(ax)] == [8, 0, 0, 12, 12, 0]
    texts = names(ax)
    assert [t.get_text() for t in texts] == ['0', '1', '2 (did not move)'] and to_hex(texts[2].get_color()) == '#666666'
    turns = replace(rec, step_norm=np.where(rec.step[:, None]%2 == 0, 0, rec.step_norm)) # every second step moves nothing
    assert curves(plot_update_ratio(turns, window=1))[0].get_xdata().tolist() == [1, 3, 5, 7]
    with pytest.raises(ValueError, match='No layer moved, so there is no ratio to draw'):
        plot_update_ratio(replace(rec, step_norm=rec.step_norm*0))
    for bad in (np.nan, np.inf): plot_update_ratio(replace(rec, norm=np.where(rec.step[:, None] > 3, bad, rec.norm))).figure.canvas.draw()


def test_many_layers_long_names_and_few_rows():
    rec = updates(P=70)
    rec = replace(rec, names=np.array([f'encoder.layers.{i}.self_attention.block.out_projection.weight' for i in range(70)]))
    ax = plot_update_ratio(rec)
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in names(ax) if t.get_text()]
    assert 20 < len(boxes) <= 32 and not [a for a, b in zip(boxes, boxes[1:]) if a.overlaps(b)]
    assert max(b.x1 for b in boxes) <= ax.figure.bbox.x1 and boxes[0].y0 > boxes[-1].y0 # the first layer is at the top
    one = plot_update_ratio(updates().sel(step=3))
    assert [l.get_marker() for l in one.get_lines()][1:4] == ['.']*3 and one.get_xlim() == (2.5, 3.5)
    assert len(curves(plot_update_ratio(updates(every=3)))) == 6


def test_layers_and_axes(): # shortcut convolutions are left out
    rec = replace(updates(), names=np.array(['0.conv.weight', '0.idpath.0.weight', '1.weight']))
    ax = plot_update_ratio(rec)
    assert [t.get_text() for t in names(ax)] == ['0.conv', '1'] and '1 shortcut convolution not shown' in ax.texts[0].get_text()
    fig, ax = plt.subplots(layout='constrained')
    assert plot_update_ratio(rec, layers=[0], title='mine', ax=ax) is ax and ax.get_title() == 'mine'


def test_refusals():
    with pytest.raises(ValueError, match='Expected a recording of updates. Found one of weights'): plot_update_ratio(make())
    with pytest.raises(ValueError, match='has 0 rows'): plot_update_ratio(empty_recording(['a'], [[0, 1, 2]], quantity='updates'))
    for w in (0, 2.5):
        with pytest.raises(ValueError, match='window must be a whole number'): plot_update_ratio(updates(), window=w)
    assert not plt.get_fignums()
