"""The picture of landscapes shows each measure that they have, and compares only what was probed alike"""
import numpy as np
import pytest
from dataclasses import replace

from fastai_bnstats.plot import plot_landscape
from fastai_bnstats.recording import ARRAYS, Landscape


def landscape(along='update', points=(.5, 1, 2), T=5):
    rng, size = np.random.default_rng(0), dict(T=T, K=len(points), G=2)
    arrays = {n: rng.random([size[d] for d in dims])+.1 for n, (dims, kind) in ARRAYS.items() if kind == 'f'}
    ints = {n: np.arange(T) if n == 'step' else np.zeros(T, int) for n, (dims, kind) in ARRAYS.items() if kind == 'i'}
    words = dict(names=np.array(['all', 'norm']), phase=np.array(['a']*T, dtype='U1'))
    return Landscape(**{**arrays, **ints, **words, 'points': np.array(points)}, meta=dict(along=along))


def titles(fig): return [ax.get_title() for ax in fig.axes if ax.get_title()]


def test_a_panel_for_each_measure_and_a_line_for_each_network():
    a = landscape()
    fig = plot_landscape(a, replace(a, loss=a.loss*2), labels=['with', 'without'])
    assert titles(fig) == ['loss', 'relative change of the gradient', 'turn of the gradient, 1 − cosine', 'relative β (large: not smooth)',
                           'change of the loss / linear prediction', 'critical step / length of the weights']
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ['with', 'without']
    assert all(len([l for l in ax.lines if l.get_label()[0] != '_']) == 2 for ax in fig.axes)
    np.testing.assert_array_equal(fig.axes[0].lines[0].get_ydata(), a.loss.max(1))
    assert fig._suptitle.get_text() == 'all weights, at 0.5, 1, 2 times the update'
    assert len(titles(plot_landscape(landscape('distance')))) == 5
    assert titles(plot_landscape(a, group='norm')) == titles(fig)[1:4]


def test_points_that_are_not_finite_leave_a_gap():
    a = landscape()
    fig = plot_landscape(replace(a, change=np.where(np.arange(5)[:, None, None] == 2, np.nan, a.change)))
    assert fig.axes[1].lines[0].get_xdata().tolist() == [0, 1, 3, 4]


@pytest.mark.parametrize('others, text', [
    ([landscape('distance')], 'same kind of points. Found 0.5, 1, 2 lengths of the weights along the gradient and 0.5, 1, 2 times the'),
    ([landscape(points=(1., 2.))], 'only at the same kind of points'),
    ([landscape(T=0)], 'has no probes. Train with the callback attached')])
def test_what_can_not_be_compared(others, text):
    with pytest.raises(ValueError, match=text): plot_landscape(landscape(), *others)


def test_wrong_arguments():
    with pytest.raises(TypeError, match='such as learn.landscape.recording. Found none'): plot_landscape()
    with pytest.raises(TypeError, match='Found str'): plot_landscape('run.npz')
    with pytest.raises(ValueError, match='labels= must name each of the 1 landscapes'): plot_landscape(landscape(), labels=['a', 'b'])


def test_what_is_beyond_an_edge_is_marked_there():
    a = landscape()
    fig = plot_landscape(replace(a, censored=np.array([1, 0, -1, 0, 1])), a)
    top, bottom = [l for l in fig.axes[5].lines if l.get_marker() == '^'][0], [l for l in fig.axes[5].lines if l.get_marker() == 'v'][0]
    assert top.get_xdata().tolist() == [0, 4] and bottom.get_xdata().tolist() == [2] and fig.axes[5].get_xlim() == (0, 4)
    fig.draw_without_rendering() # a warning would be an error: the layout must not collapse
    never = plot_landscape(replace(a, censored=np.ones(5, int)))
    assert titles(never) == titles(fig)


def test_the_linear_prediction_has_a_linear_axis_where_its_numbers_are_small():
    a = landscape()
    near = replace(a, loss=a.start[:, None]+a.slope*.9)
    far = replace(a, loss=a.start[:, None]+a.slope*np.array([1, 1, -50]))
    assert [plot_landscape(l).axes[4].get_yscale() for l in (near, far)] == ['linear', 'symlog']
