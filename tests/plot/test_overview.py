"""The overview shows losses and layers; the live one appears once per cell of a notebook, and its failure stops nothing"""
import sys
import types
import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import make, tiny_learner
from matplotlib.figure import Figure

from fastai_bnstats.plot import overview, plot_overview
from fastai_bnstats.plot.style import OnceFigure
from fastai_bnstats.record import ActivationHistCallback, WeightHistCallback
from fastai_bnstats.recording import empty_recording


def panels(fig): return [ax for ax in fig.axes if ax.get_title()]


def test_losses_on_top_and_the_layers_that_changed_most_below(rec):
    fig = plot_overview(rec, n=2)
    assert isinstance(fig, Figure) and len(panels(fig)) == 2
    loss = next(ax for ax in fig.axes if ax.get_ylabel() == 'loss')
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), rec.loss)
    assert loss.get_window_extent().y0 > max(ax.get_window_extent().y1 for ax in panels(fig))
    assert any("+1 more layer (plot_hists(rec, '*') shows all)." in t.get_text() for t in fig.texts)


def test_a_recording_without_losses_has_only_heat_maps(rec):
    empty = {n: getattr(rec, n)[:0] for n in ('loss', 'loss_step', 'loss_fit', 'loss_epoch', 'loss_batch', 'valid_loss', 'valid_step',
                                              'valid_fit', 'valid_epoch', 'valid_batch', 'valid_n')}
    assert not [ax for ax in plot_overview(replace(rec, **empty)).axes if ax.get_ylabel() == 'loss']


def test_refusals(rec):
    with pytest.raises(ValueError, match='has 0 rows.*Train with the callback attached'): plot_overview(empty_recording(['a'], [[0, 1, 2]]))
    with pytest.raises(ValueError, match='has 0 rows'): WeightHistCallback().plot()


def test_a_callback_draws_its_recording():
    learn = tiny_learner(cbs=[WeightHistCallback(), ActivationHistCallback()])
    learn.fit(1)
    assert len(panels(learn.weight_hist.plot())) == 3 and len(panels(learn.weight_hist.plot(n=1))) == 1
    fig = learn.activation_hist.plot()
    assert any(ax.get_ylabel() == 'outputs in a bin' for ax in fig.axes)


@pytest.fixture
def notebook(monkeypatch):
    "Pretend to be in a notebook; `shown` gets the arguments with which figures are shown"
    shown, shell = [], types.SimpleNamespace(execution_count=1)
    monkeypatch.setattr(overview, 'in_notebook', lambda: True)
    monkeypatch.setitem(sys.modules, 'IPython', types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(OnceFigure, 'show', lambda self, **kw: shown.append(kw))
    return types.SimpleNamespace(shown=shown, shell=shell)


def test_one_picture_for_each_cell_drawn_again_at_each_epoch(notebook):
    learn = tiny_learner(cbs=WeightHistCallback(live=True))
    learn.fit(2)
    learn.fit(1)
    learn.validate()
    notebook.shell.execution_count = 2
    learn.fit(1)
    assert [s['update'] for s in notebook.shown] == [False, True, True, False]
    ids = [s['display_id'] for s in notebook.shown]
    assert len(set(ids[:3])) == 1 and ids[3] != ids[0]
    assert plt.get_fignums() == []


def test_nothing_is_drawn_in_a_terminal(monkeypatch):
    monkeypatch.setattr(overview, 'plot_overview', lambda *a: pytest.fail('drawn'))
    learn = tiny_learner(cbs=WeightHistCallback(live=True))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learn.fit(1)
    assert len(learn.weight_hist.recording) == 4


def test_a_picture_that_fails_is_named_once_and_stops_nothing(notebook, monkeypatch):
    def fail(*a): raise RuntimeError('no font.')
    monkeypatch.setattr(overview, 'plot_overview', fail)
    learn = tiny_learner(cbs=WeightHistCallback(live=True))
    text = r"The live picture can't be drawn \(RuntimeError: no font\)\. Training and recording go on\."
    with pytest.warns(UserWarning, match=text) as w:
        learn.fit(3)
    assert len(w) == 1 and len(learn.weight_hist.recording) == 12


def test_weights_are_the_same_with_a_live_picture(notebook):
    def trained(**kw):
        learn = tiny_learner(cbs=WeightHistCallback(**kw))
        learn.fit(2)
        return learn.model.state_dict()
    a, b = trained(), trained(live=True)
    assert len(notebook.shown) == 2 and all(a[k].equal(b[k]) for k in a)


def test_a_learner_with_a_live_picture_can_be_exported(notebook, tmp_path):
    from fastai.basics import load_learner
    learn = tiny_learner(cbs=WeightHistCallback(live=True))
    learn.fit(1)
    learn.export(tmp_path/'x.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # fastai warns that pickle is not safe
        assert load_learner(tmp_path/'x.pkl').weight_hist.live is not None


@pytest.mark.parametrize('n', [0, -1, 'a', 2.5])
def test_a_number_of_layers_that_makes_no_sense(n):
    with pytest.raises(ValueError, match='n must be a whole number of layers, at least 1. Found n='): plot_overview(make(), n)
