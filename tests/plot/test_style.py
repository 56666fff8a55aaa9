"""All pictures share the choice of layers, the note about hidden layers, sizes, names and numbers"""
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import make
from matplotlib.text import Text

from fastai_bnstats.plot import (plot_bands, plot_hist, plot_hist_diff, plot_hists, plot_losses, plot_mean, plot_overview, plot_ridge,
                                 plot_rms, plot_sweep, plot_update_ratio, plot_var_change)
from fastai_bnstats.plot.style import (OnceFigure, PanelGrid, borders, hidden_note, new_figure, quantity_name, ratio_ticks, row_label,
                                       short_number, shown_layers)
from fastai_bnstats.recording import empty_recording

NAMES = np.array(['0.conv.weight', '0.idpath.0.weight', '0.5.0.downsample.0.weight'])
NOTE = "2 shortcut convolutions not shown (layers='*' shows all)"


def updates(rec): return replace(rec, norm=rec.var, step_norm=rec.var/99, start_norm=rec.var, meta={'quantity': 'updates'})
def difference(rec): return rec.sel(phase='unfreeze', epoch=range(2))-rec.sel(phase='freeze')


DRAW = { # each figure that leaves out shortcut convolutions, as a Figure
    'plot_hist_diff': lambda r, **kw: plot_hist_diff(difference(r), **kw), 'plot_var_change': plot_var_change,
    'plot_mean': plot_mean,
    'plot_rms': lambda r, **kw: plot_rms(r, **kw).figure}
ALL = DRAW | {
    'plot_hists': plot_hists, 'counts': lambda r: plot_hists(r, change=False), 'both': lambda r: plot_hists(r, change='both', title='x'),
    'plot_overview': plot_overview, 'plot_hist': lambda r: plot_hist(r, 0).figure, 'plot_losses': lambda r: plot_losses(r).figure,
    'plot_ridge': lambda r: plot_ridge(r, layer=0).figure, 'ridge of a difference': lambda r: plot_ridge(difference(r), layer=0).figure,
    'plot_update_ratio': lambda r: plot_update_ratio(updates(r)).figure,
    'plot_bands': lambda r: plot_bands({'a': np.ones((2, 3))}, ylabel='y').figure,
    'plot_sweep': lambda r: plot_sweep({'a': {1: [1, 2]}, 'b': {1: [1]}})}


def texts(fig):
    "All texts of a figure, its subfigures and its axes"
    return [t for f in (fig, *fig.findobj(lambda a: hasattr(a, 'texts'))) for t in f.texts if t.get_text()]


def notes(fig): return [t.get_text() for t in set(texts(fig)) if 'not shown' in t.get_text()]


def test_shortcuts_are_left_out_unless_asked_for(rec):
    r = replace(rec, names=NAMES)
    assert shown_layers(r).tolist() == [0] and shown_layers(r, '0.idpath.*').tolist() == [1] and shown_layers(r, '*').tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"leaves shortcut convolutions out.*no other layers. Pass layers='\*'"):
        shown_layers(r.sel(layers=[1, 2]))


@pytest.mark.parametrize('draw', DRAW.values(), ids=DRAW)
def test_a_figure_says_what_it_hides(rec, draw):
    r = replace(rec, names=NAMES)
    assert notes(draw(r)) == [NOTE]
    assert notes(draw(rec)) == notes(draw(r, layers='*')) == notes(draw(r, layers=[0])) == []


def test_the_note_names_what_is_hidden(rec):
    names = np.array(['0.conv.weight', '0.idpath.0.weight', '0.idpath.1.weight'])
    r = replace(rec, names=names, kind=np.array(['weight', 'weight', 'gamma']))
    assert hidden_note(r) == NOTE.replace('convolutions', 'tensors')
    assert hidden_note(r.sel(layers=[0, 1])) == "1 shortcut convolution not shown (layers='*' shows all)"


@pytest.mark.parametrize('draw', DRAW.values(), ids=DRAW)
@pytest.mark.parametrize('shown', [1, 3])
def test_the_note_stays_on_the_page_and_off_the_labels(rec, draw, shown):
    names = np.array(['0.conv.weight', '0.idpath.0.weight', '1.conv.weight' if shown > 1 else '1.downsample.weight'])
    fig = draw(replace(rec, names=names))
    fig.canvas.draw()
    boxes = {t: t.get_window_extent() for t in fig.findobj(Text) if t.get_text() and t.get_visible()}
    note, = (b for t, b in boxes.items() if 'not shown' in t.get_text())
    assert fig.bbox.x0 <= note.x0 and note.x1 <= fig.bbox.x1 and fig.bbox.y0 <= note.y0
    assert not [t.get_text() for t, b in boxes.items() if b is not note and b.overlaps(note)]
    assert not [ax for ax in fig.axes if ax.get_window_extent().overlaps(note)]


def test_panels_have_one_size():
    def panel(grid):
        fig = plt.figure(figsize=grid.size)
        return [ax.get_window_extent().size/fig.dpi for ax in grid.axes(fig)]
    for grid in (PanelGrid(1), PanelGrid(7, 3), PanelGrid(4, 4, bar=False), PanelGrid(2, note='a note', title='a title', lines=2)):
        np.testing.assert_allclose(panel(grid), [(1.9, 1.3)]*grid.n, rtol=1e-6)
    for ncols in (5, 8):
        grid = PanelGrid(20, ncols)
        assert grid.size[0] == pytest.approx(10.4) and grid.panel[0] < 1.9
        np.testing.assert_allclose(panel(grid), [grid.panel]*20, rtol=1e-6)
    with pytest.raises(ValueError, match='ncols must be at least 1. Found 0'): PanelGrid(2, 0)


def test_names(rec):
    kinds = replace(rec, kind=np.array(['weight', 'gamma', 'weight']))
    assert [quantity_name(kinds, ps) for ps in ([0], [0, 2], [0, 1], [1])] == ['weight', 'weight', 'value', 'value']
    def label(every): return row_label(replace(rec, meta={'every': every}))
    assert label(1) == 'minibatch'
    for n, nth in ((2, '2nd'), (3, '3rd'), (5, '5th'), (11, '11th'), (21, '21st'), (112, '112th')):
        assert label(n) == f'minibatch (every {nth} recorded)'
    assert row_label(difference(rec)) == 'minibatch of the phase'


def test_borders_of_epochs_and_fits(rec):
    epochs, fits = borders(rec)
    assert epochs.tolist() == [4, 12, 16, 20] and fits.tolist() == [8]


def test_tick_labels_are_plain_numbers():
    def ticks(lo, hi): return [short_number(t, 4) for t in ratio_ticks(lo, hi)]
    assert ticks(.4, 2.4) == ['0.5', '1', '2'] and ticks(1e-3, 1e3) == ['0.001', '0.01', '0.1', '1', '10', '100', '1000']
    assert ticks(.93, 1.08) == ['0.95', '1', '1.05'] and ticks(.05, 20) == ['0.1', '0.3', '1', '3', '10']
    assert ticks(1e-9, 1e12) == ['1e−9', '1e−6', '0.001', '1', '1000', '1e6', '1e9', '1e12']
    assert [short_number(x) for x in (0., 1234., .5, -.25, 1e-7, 2.5e8, 1.)] == ['0', '1200', '0.5', '−0.25', '1e−7', '2.5e8', '1']


def test_refusals(rec):
    e = empty_recording(['a'], [[0, 1, 2]])
    with pytest.raises(ValueError, match='has 0 rows, and the picture needs 1. Train with the callback attached, or select more rows'):
        plot_hists(e)
    with pytest.raises(ValueError, match='needs 2'): plot_var_change(e)
    with pytest.raises(TypeError, match='draw it with plot_hist_diff'): plot_losses(difference(rec))
    with pytest.raises(TypeError, match='learn.weight_hist.recording.*Found str'): plot_losses('run.npz')


@pytest.mark.parametrize('draw', ALL.values(), ids=ALL)
def test_drawing_opens_no_window_and_leaves_no_figure_open(rec, monkeypatch, draw):
    monkeypatch.setattr(plt, 'show', lambda *a, **k: pytest.fail('plt.show was called'))
    fig = draw(rec)
    assert plt.get_fignums() == [] and fig.canvas.get_renderer() is not None


def test_a_figure_that_can_be_shown_in_a_window_is_left_to_pyplot(monkeypatch):
    import matplotlib as mpl
    monkeypatch.setattr(mpl, 'get_backend', lambda: 'TkAgg')
    fig = new_figure((2, 2))
    assert [plt.figure(n) for n in plt.get_fignums()] == [fig]


@pytest.mark.slow
@pytest.mark.parametrize('draw', ALL.values(), ids=ALL)
def test_text_can_be_read_at_the_width_of_a_notebook(draw):
    rec = make(fits=(('freeze', 2), ('unfreeze', 4)), P=12)
    names = np.array([f'0.{i}.0.convpath.0.0.weight' for i in range(11)]+['0.4.0.idpath.0.weight'])
    fig = draw(replace(rec, names=names))
    fig.canvas.draw()
    scale = 900/max(900, fig.get_figwidth()*fig.dpi)*fig.dpi/72 # a notebook makes a wider figure smaller
    sizes = {t.get_text(): t.get_fontsize()*scale for t in fig.findobj(Text) if t.get_text() and t.get_visible()}
    assert sizes and not {text: px for text, px in sizes.items() if px < 7}


def test_the_label_of_a_short_colour_bar_has_two_lines(rec):
    fig = plot_hist_diff(difference(rec), [0])
    fig.canvas.draw()
    bar, = (ax for ax in fig.axes if 'minus' in ax.get_ylabel())
    label, box = bar.yaxis.label.get_window_extent(), bar.get_window_extent()
    assert label.height < 1.15*box.height and label.x1 <= fig.bbox.x1


def test_long_names_do_not_overlap(rec):
    names = np.array([f'encoder.layers.{i}.self_attention.block.out_projection.weight' for i in range(8)])
    fig = plot_hists(replace(make(fits=(('fit', 1),), P=8), names=names))
    fig.canvas.draw()
    titles = [ax.title.get_window_extent() for ax in fig.axes if ax.get_title()]
    assert not [(a, b) for i, a in enumerate(titles) for b in titles[:i] if a.overlaps(b)]


@pytest.mark.slow
@pytest.mark.parametrize('rows', [1, 3, 4, 10])
def test_every_part_of_a_tall_figure_has_ticks_and_a_colour_bar(rows):
    rec = make(fits=(('fit', 1),), P=4*rows)
    fig = plot_hists(replace(rec, hist=rec.hist*1000, under=rec.under*1000, over=rec.over*1000, numel=rec.numel*1000), '*')
    fig.canvas.draw()
    bars = [ax for ax in fig.axes if ax.get_ylabel() == 'change of the count']
    panels = [ax for ax in fig.axes if ax.get_title()]
    assert len(panels) == 4*rows and len(bars) == -(-rows//3)
    for ax in panels:
        labels = [t for t in ax.get_xticklabels() if t.get_text() and t.get_visible()]
        assert labels and any(b.get_window_extent().y0 <= ax.get_window_extent().y0+1 and
                              ax.get_window_extent().y1 <= b.get_window_extent().y1+1 for b in bars)
    assert max(b.get_window_extent().height for b in bars)/fig.dpi < 6
    for bar in bars:
        ticks = sorted((t.get_window_extent() for t in bar.get_yticklabels() if t.get_text()), key=lambda b: b.y0)
        assert len(ticks) >= 3 and not [a for a, b in zip(ticks, ticks[1:]) if a.overlaps(b)]




@pytest.fixture(scope='module')
def shell():
    from execnb.shell import CaptureShell
    s = CaptureShell()
    s.run('%matplotlib inline\nimport matplotlib.pyplot as plt\nfrom fastai_bnstats.plot import new_figure')
    yield s
    plt.switch_backend('agg')


NEW = 'fig = new_figure((2, 2)); fig.subplots()'


@pytest.mark.parametrize('code', [f'{NEW}\nfig', f'{NEW}\nfig;', f'{NEW};', 'fig', 'plt.close("all"); fig',
                                  f'{NEW}\nfig.savefig("x.png"); fig', 'g = plt.figure(); g.subplots(); None'])
def test_a_notebook_shows_a_figure_once(shell, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs = [o for o in shell.run(code) if 'image/png' in o.get('data', {})]
    assert len(outputs) == 1 and len(outputs[0]['data']['image/png']) > 1000
    assert shell.run('plt.get_fignums()')[0]['data']['text/plain'] in ('[]', ['[]'])


def test_the_formats_of_the_notebook_are_respected(shell):
    shell.run("""from matplotlib.figure import Figure
svg = get_ipython().display_formatter.formatters['image/svg+xml']
svg.for_type(Figure, lambda fig: ('<svg/>', dict(width=2)))""")
    shown = shell.run(f'{NEW}\nfig')[0]
    shell.run('svg.pop(Figure)')
    assert ''.join(shown['data']['image/svg+xml']) == '<svg/>' and shown['metadata']['image/svg+xml'] == dict(width=2)
    assert 'image/png' in shown['data']


def test_figures_of_this_library_are_shown_once():
    rec = make(fits=(('freeze', 2), ('unfreeze', 2)), P=2)
    figs = plot_hists(rec), plot_hists(rec, change=True), plot_hist_diff(difference(rec)), plot_var_change(rec), plot_sweep({'a': {1: [1]}})
    assert all(isinstance(f, OnceFigure) for f in figs)
