"""The page of a training: what it contains is what was recorded, and it is small, whole and harmless"""
import base64
import json
import re
import zlib
from dataclasses import replace
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from forks import LIMIT, wait_for
from helpers import make, tiny_learner
from test_interactive import LOSS, ROWS, VALID, decode, long, rows_of

from fastai_bnstats.compare import diagnose, update_ratio
from fastai_bnstats.plot.interactive import time_columns
from fastai_bnstats.plot.page import page_html
from fastai_bnstats.plot.page_data import bands, in_run, layer_keys, pack_floats
from fastai_bnstats.record import GradHistCallback, UpdateHistCallback, WeightHistCallback
from fastai_bnstats.recording import empty_recording

NORMS = ('norm', 'step_norm', 'fit_norm', 'start_norm')


def data(page): return json.loads(re.search(r'id="run-data">(.*?)</script>', page, re.S)[1])


def words(page):
    "The text of a page as a reader sees it, without its data and script"
    return unescape(re.sub(r'\s+', ' ', re.sub(r'<[^>]+>', ' ', re.sub(r'<(script|style).*?</\1>', '', page, flags=re.S))))


def unpack(text):
    k = int(text[0])
    planes = np.frombuffer(zlib.decompress(base64.b64decode(text[1:])), np.uint8).reshape(k, -1)
    return np.ascontiguousarray(planes.T).view(f'<f{k}').ravel()


def of(rec, quantity, **arrays): return replace(rec, meta={**rec.meta, 'quantity': quantity}, **arrays)


@pytest.fixture(scope='module')
def rec(): return make(P=3, batches=8)


@pytest.fixture(scope='module')
def updates(rec):
    rng = np.random.default_rng(1)
    return of(rec, 'updates', **{n: rng.uniform(.1, 2, rec.mean.shape) for n in NORMS})


# what the page contains

def test_counts_and_curves_are_those_of_the_recordings(rec, updates):
    d = data(page_html(rec, updates))
    assert [l['name'] for l in d['layers']] == ['0', '1', '2'] and [l['of'] for l in d['layers']] == [[i, i] for i in range(3)]
    for r, q in zip((rec, updates), d['quantities'], strict=True):
        assert q['heat']['steps'] == [*rec.step.tolist(), len(rec)]
        for i in range(3): assert (decode(q['heat'], i) == rows_of(r, i).T).all()
    weights, change = ([unpack(v).reshape(-1, len(rec)) for v in q['values']] for q in d['quantities'])
    for i in range(3):
        np.testing.assert_allclose(weights[i], [rec.mean[:, i], rec.var[:, i]**.5], rtol=1e-6)
        np.testing.assert_allclose(change[i][2], update_ratio(updates)[:, i], rtol=1e-6)
        np.testing.assert_allclose(change[i][3], updates.fit_norm[:, i]/updates.start_norm[:, i], rtol=1e-6)
    np.testing.assert_allclose(unpack(d['losses']['train']), rec.loss, rtol=1e-6)
    np.testing.assert_allclose(unpack(d['lr']['data']), rec.lr[:, 0], rtol=1e-6)


def test_columns_hold_exact_sums_and_the_range_of_their_rows(rec):
    d = data(page_html(rec, max_cols=9))
    starts = np.array(d['quantities'][0]['heat']['starts'])
    assert starts.tolist() == time_columns(rec.fit, 9)[0].tolist() and len(starts) < 11
    for i in range(3):
        assert (decode(d['quantities'][0]['heat'], i) == np.add.reduceat(rows_of(rec, i), starts[:-1]).T).all()
        mean = unpack(d['quantities'][0]['values'][i]).reshape(2, 3, -1)[0]
        parts = [rec.mean[a:b, i] for a, b in zip(starts, starts[1:])]
        np.testing.assert_allclose(mean, [[f(p) for p in parts] for f in (np.mean, np.min, np.max)], rtol=1e-6)


def test_what_was_thinned_is_written_on_the_page(rec):
    assert 'Nothing was thinned' in words(page_html(rec))
    text = words(page_html(rec, max_cols=9))
    assert '40 rows, one for each step, in 9 columns of up to 5 rows of one fit' in text and 'Nothing was thinned' not in text
    assert 'Line: the loss of each training minibatch' in text
    thin = replace(make(every=4), meta={'every': 4, 'phases': ['freeze', 'unfreeze']})
    assert 'one for each 4 steps' in words(page_html(thin)) and 'Recorded at one step in 4' in words(page_html(thin))


@settings(max_examples=60)
@given(arrays(float, st.tuples(st.integers(1, 30), st.integers(1, 3)),
              elements=st.one_of(st.floats(-1e3, 1e3, allow_subnormal=False), st.just(np.nan), st.just(np.inf), st.just(-np.inf))),
       st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_bands_agree_with_numpy(x, sizes):
    starts = np.unique(np.minimum(np.cumsum([0, *sizes, 99]), len(x)))
    got = bands(x, starts)
    if len(starts)-1 == len(x): return np.testing.assert_array_equal(got, x[None])
    for c, (a, b) in enumerate(zip(starts, starts[1:])):
        for k in range(x.shape[1]):
            v = x[a:b, k][~np.isnan(x[a:b, k])]
            with np.errstate(invalid='ignore'): want = [v.mean(), v.min(), v.max()] if len(v) else [np.nan]*3
            np.testing.assert_allclose(got[:, c, k], want, rtol=1e-12, atol=1e-9)


@settings(max_examples=100)
@given(arrays(float, st.integers(0, 20)))
def test_packed_floats_keep_value_and_kind(a):
    got = unpack(pack_floats(a))
    finite = np.isfinite(a)
    np.testing.assert_allclose(got[finite], a[finite], rtol=1e-6, atol=0)
    assert (np.isnan(got) == np.isnan(a)).all() and (got[np.isinf(a)] == a[np.isinf(a)]).all()


def test_nan_and_infinite_losses_and_values_survive(rec):
    loss = rec.loss.copy()
    loss[[3, 4, 5]] = np.nan, np.inf, -np.inf
    mean, var = rec.mean.copy(), rec.var.copy()
    mean[10:, 1] = var[10:, 1] = np.nan
    hist, zero = rec.hist.copy(), np.zeros_like(rec.numel)
    hist[10:, 1] = 0
    lost = np.where((np.arange(len(rec)) >= 10)[:, None] & (np.arange(3) == 1), rec.numel, zero)
    r = replace(rec, loss=loss, mean=mean, var=var, hist=hist, under=np.where(lost, 0, rec.under), over=np.where(lost, 0, rec.over),
                nonfinite=lost)
    page = page_html(r)
    d = data(page)
    train = unpack(d['losses']['train'])
    assert np.isnan(train[3]) and train[4] == np.inf and train[5] == -np.inf and d['losses']['bad'] == [[3, 1], [4, 1], [5, 1]]
    assert 'NaN or infinite, 3 of 40' in words(page)
    assert np.isnan(unpack(d['quantities'][0]['values'][1]).reshape(2, -1)[:, 10:]).all()
    assert (decode(d['quantities'][0]['heat'], 1)[-2, 10:] == r.numel[10:, 1]).all()


def test_many_losses_are_thinned_to_a_range_and_a_count_of_nan():
    r = make(fits=(('a', 1), ('b', 1)), batches=3000, every=1000)
    loss = r.loss.copy()
    loss[[10, 11, 4000]] = np.nan, np.inf, np.nan
    r = replace(r, loss=loss)
    page = page_html(r)
    d = data(page)['losses']
    starts, C = np.array(d['axis']['starts']), len(d['axis']['starts'])-1
    mean, low, high = unpack(d['train']).reshape(3, C)
    assert C == 2000 and 3000 in starts and '6,000 training minibatches in 2,000 columns' in words(page)
    parts = [loss[a:b][np.isfinite(loss[a:b])] for a, b in zip(starts, starts[1:])]
    np.testing.assert_allclose([mean, low, high], [[f(p) for p in parts] for f in (np.mean, np.min, np.max)], rtol=1e-6)
    want = [[c, n] for c, (a, b) in enumerate(zip(starts, starts[1:])) if (n := int((~np.isfinite(loss[a:b])).sum()))]
    assert d['bad'] == want and sum(n for _, n in want) == 3


def test_a_validation_is_a_mean_over_items_where_it_took_place(rec):
    n = 5 # minibatches of each validation; the last is small
    valid = dict(valid_loss=np.arange(5*n)*1., valid_n=np.tile([8, 8, 8, 8, 2], 5), valid_batch=np.tile(np.arange(n), 5))
    valid |= {f'valid_{k}': np.repeat(getattr(rec, f'valid_{k}'), n) for k in ('step', 'fit', 'epoch')}
    valid['valid_loss'][7] = np.nan
    d = data(page_html(replace(rec, **valid)))['losses']['valid']
    assert d['x'] == [8, 16, 24, 32, 40] and d['n'] == [5]*5 and d['bad'] == [0, 1, 0, 0, 0]
    loss = np.ma.masked_invalid(valid['valid_loss'])
    want = np.ma.average(loss.reshape(5, n), axis=1, weights=valid['valid_n'].reshape(5, n))
    np.testing.assert_allclose(unpack(d['mean']), want, rtol=1e-6)
    np.testing.assert_array_equal(unpack(d['dots']), valid['valid_loss'].astype(np.float32))


def test_the_table_ranks_as_the_figures_do(rec, updates):
    text = page_html(updates, rec) # the weights rank, whatever comes first
    moved = rec.moved()[-1]
    order = np.argsort(-moved)
    found = re.findall(r'data-go-layer="(\d+)">(\w+)</a></td>\s*<td class="share"><i style="[^"]*"></i>([\d.]+)%', text)
    assert [int(i) for i, *_ in found] == order.tolist() and [n for _, n, _ in found] == [str(i) for i in order]
    np.testing.assert_allclose([float(p) for *_, p in found], moved[order]*100, atol=.05)
    assert [l['moved'] for l in data(text)['layers']] == pytest.approx(moved.tolist(), abs=1e-6)
    assert len(re.findall('<polyline', text)) == 3 and 'update : weight' in words(text)


def test_the_head_says_what_was_trained(rec):
    meta = dict(fastai='2.8', torch='2.9', numpy='2.1', python='3.11', trained={'0': [2, 5], '1': [5, 5]},
                overhead=dict(seconds=1.25, share=.034))
    text = words(page_html(replace(rec, meta={**rec.meta, **meta}), title='My run'))
    assert 'Trained in 2 phases, 5 epochs, 40 steps: freeze (2 epochs, 16 steps, 2 of 5 parameter tensors trained), then unfreeze' in text
    assert 'weights of 3 tensors. fastai 2.8, torch 2.9, NumPy 2.1, Python 3.11. Recording took 1.2 s, 3.4% of the training.' in text
    assert text.startswith(' My run')
    short = replace(rec, meta={**rec.meta, 'overhead': dict(seconds=.1, share=1.07)}) # a share that says nothing
    assert 'Recording took 0.1 s. ' in words(page_html(short))
    thin = rec.sel(step=range(0, 40, 8))
    outputs = replace(thin, meta={**rec.meta, 'quantity': 'outputs', 'every': 8}, **{k: getattr(rec, k) for k in LOSS})
    assert 'Recorded at each step: weights and outputs (one step in 8) of 3 tensors.' in words(page_html(rec, outputs))
    assert data(page_html(outputs, rec))['lr']['quantity'] == 1 # the one with a row for each step
    many = make(fits=tuple((f'p{i}', 1) for i in range(6)), batches=2)
    assert 'Trained in 6 phases, 6 epochs, 12 steps: first p0' in words(page_html(many))


def test_running_statistics_are_not_ranked(rec):
    r = replace(rec, kind=np.array(['weight', 'running_mean', 'weight']))
    text = page_html(r)
    assert re.findall(r'data-go-layer="(\d)"', text) == ['0', '2'] and 'Running statistics are left out.' in words(text)
    assert '<table>' not in page_html(replace(rec, kind=np.array(['running_var']*3)))


# several recordings of one training

def test_layers_are_linked_by_name(rec):
    outputs = replace(of(rec, 'outputs'), names=np.array(['0', '2', 'other']), kind=np.array(['output']*3))
    layers = data(page_html(rec, outputs))['layers']
    assert {l['name']: l['of'] for l in layers} == {'0': [0, 0], '1': [1, None], '2': [2, 1], 'other': [None, 2]}
    assert layer_keys(replace(rec, names=np.array(['a', 'a.weight', 'b.weight']))) == ['a', 'a.weight', 'b']
    bn = replace(rec, names=np.array(['1.weight', '1.bias', '1.running_mean']), kind=np.array(['gamma', 'beta', 'running_mean']))
    assert layer_keys(bn) == ['1 gamma', '1 beta', '1.running_mean']


def test_a_callback_that_came_later_is_placed_by_its_losses(rec):
    late = of(rec, 'gradients').sel(fit=1)
    numbers = {f'{p}{k}': getattr(late, f'{p}{k}')-{'step': 16, 'fit': 1}[k] for p in ('', 'loss_', 'valid_') for k in ('step', 'fit')}
    late = replace(late, **numbers, meta={'quantity': 'gradients', 'phases': ['unfreeze']})
    assert in_run(late, rec).step.tolist() == list(range(16, 40)) and set(in_run(late, rec).fit) == {1}
    heat = data(page_html(late, rec))['quantities'][0]['heat'] # the order does not matter
    assert heat['steps'] == list(range(16, 41))
    twice = replace(late, loss=np.r_[rec.loss[16:39], np.nan])
    assert in_run(twice, replace(rec, loss=np.r_[rec.loss[:39], np.nan])).step.tolist() == list(range(16, 40))


def test_recordings_of_two_trainings_are_refused(rec):
    other = of(make(P=3, batches=8, seed=1), 'gradients')
    with pytest.raises(ValueError, match="the gradients were recorded in another than the weights: the losses of 'freeze' differ"):
        page_html(rec, other)


def test_recordings_of_one_quantity_get_names_of_their_own(rec):
    assert [q['name'] for q in data(page_html(rec, rec.sel(layers=1)))['quantities']] == ['weights', 'weights 2']


# odd recordings

def test_empty_recordings_have_a_page():
    text = page_html(empty_recording([], np.zeros((0, 41))))
    assert 'Nothing was trained while recording' in words(text) and 'No training loss was recorded' in words(text)
    assert data(text)['layers'] == [] and '<table>' not in text and 'id="layer"' not in text
    named = page_html(empty_recording(['a.weight'], np.linspace(-1, 1, 5)[None]))
    assert 'No row was recorded' in words(named) and data(named)['quantities'][0]['heat'] is None


@pytest.mark.parametrize('fits,batches', [((('a', 1),), 1), ((('a', 1), ('b', 1)), 1), ((('a', 2), ('a', 1), ('c', 3)), 3)])
def test_few_rows_and_several_fits(fits, batches):
    r = make(fits=fits, batches=batches)
    text = page_html(r)
    d = data(text)
    assert len(d['losses']['axis']['where']) == len(r) and [n for _, n in d['losses']['axis']['fits']] == [p for p, _ in fits]
    assert ('What changed most' in words(text)) == (len(r) > 1)


def test_without_validation_losses_or_rows(rec):
    def without(names): return replace(rec, **{k: getattr(rec, k)[:0] for k in names})
    no_valid = without(VALID)
    assert data(page_html(no_valid))['losses']['valid']['x'] == [] and 'validation' not in words(page_html(no_valid))
    text = page_html(without(LOSS))
    assert 'No training loss was recorded' in words(text) and '2 phases, 5 epochs, 40 steps' in words(text)
    text = page_html(without(ROWS))
    assert data(text)['lr'] is None and '2 phases, 5 epochs, 40 steps' in words(text) and 'No row was recorded' in words(text)


def test_a_layer_without_any_value(rec):
    zero = np.zeros_like(rec.numel)
    nothing = of(rec, 'gradients', hist=rec.hist*0, under=zero, over=zero, numel=zero, mean=rec.mean*np.nan, var=rec.var*np.nan,
                 edges=rec.edges*np.nan)
    d = data(page_html(rec, nothing))
    assert d['quantities'][1]['heat']['layers'][0]['edges'] is None and np.isnan(unpack(d['quantities'][1]['values'][0])).all()
    assert 'What changed most' in words(page_html(rec, nothing)) and '<table>' not in page_html(nothing)


# findings

def finding(**kwargs): return SimpleNamespace(**{**dict(kind='not finite', step=None, layer=None, text='The loss is NaN.'), **kwargs})


def test_findings_become_warnings_with_links(rec):
    still = finding(kind='did not move', layer='1.weight', step=3, text='<b>1.weight</b> stood still.')
    text = page_html(rec, findings=[finding(step=7), still, finding(layer='gone')])
    assert 'Warnings (3)' in text and 'not finite' in text and '&lt;b&gt;1.weight' in text
    links = [('losses', 'data-go-step="7"'), ('layers', 'data-go-layer="1" data-go-step="3"')]
    assert re.findall(r'<a href="#(\w+)" +([^>]*)>Show', text) == links
    assert 'Nothing suspicious' in page_html(rec, findings=[])


def test_findings_are_those_of_diagnose(rec, updates):
    loss = rec.loss.copy()
    loss[20] = np.nan
    one_stays = {n: getattr(updates, n)*[1, 0, 1] for n in ('step_norm', 'fit_norm')}
    r, still = replace(rec, loss=loss), replace(updates, loss=loss, **one_stays)
    text, found = words(page_html(r, still)), diagnose(r, still)
    assert {f.kind for f in found} == {'not finite', 'did not move'}
    for f in found: assert f.text in text and f'step {f.step}' in text
    for what in (*found.looked, *found.missed): assert what in text
    assert 'data-go-layer="1" data-go-quantity="1" data-go-step="0">Show' in page_html(r, still)
    assert 'Warnings (' not in page_html(empty_recording([], np.zeros((0, 41))))
    assert 'Warnings (' in page_html(r, r, of(r, 'something_else')) # which diagnose alone would refuse


# from a learner

def test_report_has_the_recordings_of_all_callbacks(tmp_path):
    cbs = WeightHistCallback(), GradHistCallback(layers='0.*')
    learn = tiny_learner(cbs=cbs)
    learn.fit(1)
    learn.add_cb(UpdateHistCallback(every=2)) # later than the others
    learn.fit(2)
    text = learn.weight_hist.report(tmp_path/'run.html', title='Mine').read_text()
    d = data(text)
    assert [q['name'] for q in d['quantities']] == ['weights', 'gradients', 'updates'] and 'Mine' in words(text)
    assert d['quantities'][2]['heat']['steps'][0] == len(learn.dls.train) == 4
    linked = {l['name']: l['of'] for l in d['layers']}
    assert linked['0.0'] == [0, 0, 0] and linked['0.3'][1] is not None
    assert linked['1.3'] == [2, None, 2] and linked['0.1 gamma'][::2] == [None, None]
    assert [q['name'] for q in data(learn.grad_hist.report(tmp_path/'g').read_text())['quantities']][0] == 'gradients'
    alone = learn.weight_hist
    learn.remove_cb(alone)
    assert len(data(alone.report(tmp_path/'alone.html').read_text())['quantities']) == 1
    new = tiny_learner(cbs=WeightHistCallback())
    assert 'Nothing was trained' in words(new.weight_hist.report(tmp_path/'none.html').read_text())


# the file

EVIL = ['</script><script>alert(1)</script>', '<img src=x onerror=alert(1)>', '"\'&{{ 7*7 }}\u2028']


def test_names_are_text(rec):
    phases = ['<i>freeze', '<i>unfreeze']
    r = replace(rec, names=np.array(EVIL), phase=np.array(phases)[rec.fit], meta={'phases': phases})
    text = page_html(r, title='</title><u>', findings=[finding(kind='<s>', layer=EVIL[0], text='<s>')])
    assert [l['name'] for l in data(text)['layers']] == EVIL
    assert not any(t in text for t in ('<i>', '<u>', '<s>', '<script>alert', '<img')) and text.count('</script>') == 2


def test_nothing_is_fetched(rec):
    text = page_html(rec)
    assert not re.search(r'https?:|//\w|@import|url\(', re.sub(r'(?<=run-data">).*?(?=</script>)|// .*', '', text))
    assert "default-src 'none'" in text and 'src="' not in text
    assert re.findall(r'href="([^#"][^"]*)"', text) == ['data:,']


def test_a_file_is_written_whole_and_linked(rec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = rec.to_html('new folder/run', title='Mine')
    assert path.name == 'run.html' and path.read_text() == page_html(rec, title='Mine')
    assert path._repr_html_() == '<a href="new%20folder/run.html" target="_blank">new folder/run.html</a> (0.1 MB)'
    with pytest.raises(ValueError): rec.to_html(path, make(seed=5))
    assert path.read_text() == page_html(rec, title='Mine') and len(list(path.parent.iterdir())) == 1
    monkeypatch.chdir(path.parent)
    assert rec.to_html(tmp_path/'other.html')._repr_html_().startswith(str(tmp_path))


def test_errors_say_what_to_do(rec):
    with pytest.raises(TypeError, match="needs the file to write first, such as 'run.html'. Found Recording"): rec.to_html(rec)
    with pytest.raises(TypeError, match='needs a Recording.*Found str'): page_html(rec, 'run.html')
    with pytest.raises(TypeError, match='difference'): page_html(rec-rec)
    with pytest.raises(ValueError, match='at least one Recording'): page_html()
    with pytest.raises(ValueError, match='max_cols'): page_html(rec, max_cols=0)


def large():
    "60 layers, 5,000 steps and 40 bins, with losses and numbers that no compression can shorten"
    rng, r, t, v = np.random.default_rng(0), long(), np.arange(5000), np.arange(500)
    losses = dict(loss=rng.random(5000), loss_step=t, loss_fit=r.fit, loss_epoch=r.epoch, loss_batch=r.batch)
    valid = dict(valid_loss=rng.random(500), valid_step=v//25*250+249, valid_fit=v//250, valid_epoch=v//25%10, valid_batch=v%25,
                 valid_n=np.full(500, 8))
    hist = rng.integers(0, 40_000, r.hist.shape, dtype=np.int32)
    return replace(r, hist=hist, numel=hist.sum(-1, dtype=np.int64), mean=rng.normal(size=r.mean.shape), var=rng.random(r.var.shape),
                   **losses, **valid)


def test_sixty_layers_of_five_thousand_steps_are_below_ten_megabytes():
    r = large()
    text = page_html(r)
    assert 1e6 < len(text.encode()) < 8e6
    heat = data(text)['quantities'][0]['heat']
    assert 500 < len(heat['where']) <= 600 and (decode(heat, 59).sum(1) == rows_of(r, 59).sum(0)).all()


def test_several_recordings_share_the_columns():
    r = long(T=600)
    def columns(*recs): return [len(q['heat']['where']) for q in data(page_html(*recs))['quantities']]
    assert columns(r) == [600] and columns(r, of(r, 'gradients'), of(r, 'outputs')) == [200]*3


# in a browser

class Page:
    "A page that was opened from its file, its errors and its requests"
    def __init__(self, browser, path, **kwargs):
        self.page = browser.new_page(viewport=kwargs.pop('viewport', {'width': 1280, 'height': 900}), **kwargs)
        self.wrong, self.urls = [], []
        self.page.on('console', lambda m: self.wrong.append(m.text))
        self.page.on('pageerror', lambda e: self.wrong.append(str(e)))
        self.page.on('request', lambda r: self.urls.append(r.url))
        self.page.set_default_timeout(LIMIT*1000)
        self.address = path.resolve().as_uri()
        self.page.goto(self.address)
        self.page.wait_for_selector('body[data-ready]')
        if self.page.locator('#layer').count(): self.layer(0)

    def layer(self, i): self.page.wait_for_selector(f'#layer[data-layer="{i}"]')
    def chart(self, title): return self.page.locator('.chart').filter(has=self.page.locator('b', has_text=re.compile(f'^{title}$')))
    def value(self, title): return self.chart(title).locator('.value').inner_text()
    def heat(self): return self.page.locator('#heats .bnheat:not([hidden])')
    def read(self): return self.heat().locator('.bnheat-read').inner_text().split('\n')
    def point(self, title, share):
        "Put the pointer on a chart, at a share of its width between the first and the last minibatch"
        box = self.chart(title).locator('.curves')
        box.scroll_into_view_if_needed()
        b = box.bounding_box()
        self.page.mouse.move(b['x']+54+share*(b['width']-64), b['y']+b['height']/2)
    def point_heat(self, row, rows, b, bins):
        c = self.heat().locator('canvas')
        c.scroll_into_view_if_needed()
        x, y, w, h = map(float, c.get_attribute('data-plot').split(','))
        o = c.bounding_box()
        self.page.mouse.move(o['x']+x+(row+.5)/rows*w, o['y']+y+h*(1-(b+.5)/bins))
    def cursors(self): return self.page.locator('.cursor:not([style*="none"])').count()
    def close(self):
        self.page.close()
        assert not self.wrong and {u for u in self.urls if not u.startswith('data:')} == {self.address}


@pytest.fixture
def opened(browser, tmp_path):
    pages = []
    def open_(*recs, view=None, **kwargs):
        pages.append(Page(browser, recs[0].to_html(tmp_path/f'{len(pages)}.html', *recs[1:], **kwargs), **(view or {})))
        return pages[-1]
    yield open_
    for p in pages: p.close()


def number(text): return float(text.replace('\u2212', '-').replace(',', ''))


def test_pointing_reads_loss_count_and_curves_of_one_step(opened, rec, updates):
    p = opened(rec, updates)
    p.point('loss', 13.5/40)
    assert number(p.value('loss').split()[1]) == pytest.approx(rec.loss[13], rel=1e-3)
    assert p.value('loss').endswith('validation after it 1')
    assert number(p.value('mean of the weights')) == pytest.approx(rec.mean[13, 0], rel=1e-3)
    ratio = 'update : weight, ratio of the norms'
    assert number(p.value(ratio)) == pytest.approx(update_ratio(updates)[13, 0], rel=1e-3)
    assert p.read()[0] == 'freeze · epoch 1 · minibatch 5 · step 13' == p.page.locator('#when').inner_text() and p.cursors() == 8
    p.point_heat(21, 40, 5, 10)
    assert f'count {rec.hist[21, 0, 5]}, ' in p.read()[1]
    assert number(p.value('standard deviation of the weights')) == pytest.approx(rec.var[21, 0]**.5, rel=1e-3)
    assert number(p.value('loss').split()[1]) == pytest.approx(rec.loss[21], rel=1e-3)
    p.page.keyboard.press('Escape')
    p.page.mouse.move(1, 1)
    wait_for(lambda: p.cursors() == 0 and p.value('loss') == '')


def test_changes_and_other_quantities(opened, rec, updates):
    p = opened(rec, replace(updates, hist=rec.hist[:, ::-1][..., ::-1].copy(), edges=-rec.edges[:, ::-1]))
    p.page.get_by_text('change since the first minibatch').first.click()
    p.point_heat(30, 40, 4, 10)
    n = int(rec.hist[30, 0, 4])-int(rec.hist[0, 0, 4])
    assert f'change {n:+d}, '.replace('-', '\u2212').replace('+0', '0') in p.read()[1]
    p.page.get_by_role('radio', name='updates').check()
    p.point_heat(30, 40, 4, 10)
    assert f'count {rec.hist[30, 2, 5]}, ' in p.read()[1]


def test_searching_sorting_and_links_choose_a_layer(opened):
    many = make(fits=(('a', 1),), P=30, batches=6)
    p = opened(many, findings=[finding(layer='17.weight', step=4)])
    search, options = p.page.get_by_label('search layers'), p.page.locator('[role=option]:visible')
    search.fill('2')
    assert options.count() == 12 # 2, 12, 20 to 29
    search.press('Enter')
    p.layer(2)
    assert p.page.locator('#layer-name').inner_text() == '2' and p.heat().locator('b').first.inner_text() == '2.weight'
    p.page.keyboard.press('ArrowDown')
    p.layer(12)
    search.press('Escape')
    assert options.count() == 30
    p.page.get_by_label('order').select_option('moved')
    order = np.argsort(-many.moved()[-1], kind='stable')
    assert [o.split('\n')[0] for o in options.all_inner_texts()] == [str(i) for i in order]
    p.page.locator('#moved a').first.click()
    p.layer(order[0])
    p.page.get_by_text('Show', exact=True).click()
    p.layer(17)
    assert number(p.value('mean of the weights')) == pytest.approx(many.mean[4, 17], rel=1e-3)
    assert p.page.locator('[aria-selected=true]').first.is_visible()


def test_keys_move_the_cursor(opened, rec):
    p = opened(rec)
    p.chart('loss').locator('.curves').focus()
    for key in ('End', 'ArrowLeft', 'Shift+ArrowLeft'): p.page.keyboard.press(key)
    assert number(p.value('loss').split()[1]) == pytest.approx(rec.loss[28], rel=1e-3)
    assert p.page.evaluate('getComputedStyle(document.activeElement).outlineStyle') == 'solid'
    p.page.keyboard.press('Escape')
    assert p.value('loss') == '' and p.cursors() == 0
    p.page.locator('body').evaluate('b => { b.tabIndex = -1; b.focus() }')
    seen = set()
    for _ in range(30):
        p.page.keyboard.press('Tab')
        seen.add(p.page.evaluate("document.activeElement.className || document.activeElement.tagName || ''"))
    assert {'A', 'curves', 'CANVAS', 'BUTTON', 'INPUT', 'SELECT'} <= seen


@pytest.mark.parametrize('dark', [False, True])
@pytest.mark.parametrize('width', [1280, 400])
def test_it_fits_and_can_be_read(opened, rec, updates, width, dark):
    long_names = replace(rec, names=np.array(['a.very.long.name.'*5+str(i) for i in range(3)]))
    p = opened(long_names, updates, title='T'*80, findings=[finding(text='x'*200)],
               view=dict(viewport={'width': width, 'height': 800}, color_scheme='dark' if dark else 'light'))
    assert p.page.evaluate('document.documentElement.scrollWidth') <= width
    def light(css): return p.page.evaluate('css => { const c = document.createElement("canvas").getContext("2d"); c.fillStyle = '
                                           'getComputedStyle(document.body)[css]; return parseInt(c.fillStyle.slice(1, 3), 16) }', css)
    assert (light('backgroundColor') < 60) == dark and (light('color') > 200) == dark
    boxes = [p.page.locator(s).bounding_box() for s in ('#layer-side', '#layer-main')]
    assert (boxes[0]['x']+boxes[0]['width'] <= boxes[1]['x']) == (width == 1280)


def test_losses_that_are_not_finite_are_marked_and_read(opened, rec):
    loss = rec.loss.copy()
    loss[[3, 20]] = np.nan, np.inf
    p = opened(replace(rec, loss=loss))
    assert p.chart('loss').locator('.bad').count() == 2
    p.point('loss', 3.5/40)
    assert p.value('loss').startswith('training NaN')
    p.point('loss', 20.5/40)
    assert p.value('loss').startswith('training ∞')
    q = opened(make(fits=(('a', 1),), batches=1))
    assert q.chart('mean of the weights').locator('circle').count() == 1 # a line of one point can be seen
    q.point('loss', .5)
    assert number(q.value('loss').split()[1]) > 0


def test_thinned_curves_say_their_range(opened, rec):
    p = opened(rec, max_cols=5)
    p.point('mean of the weights', 2/40)
    a, b = (number(x) for x in re.search(r'\((\S+) to (\S+)\)', p.value('mean of the weights')).groups())
    n = data(page_html(rec, max_cols=5))['quantities'][0]['heat']['starts'][1]
    np.testing.assert_allclose([a, b], [rec.mean[:n, 0].min(), rec.mean[:n, 0].max()], rtol=1e-3)


def test_a_page_without_layers_and_one_of_strange_names(opened, rec):
    opened(empty_recording([], np.zeros((0, 41))))
    p = opened(replace(rec, names=np.array(EVIL)), title='</title><u>')
    assert [o.split('\n')[0] for o in p.page.locator('[role=option]').all_inner_texts()][:2] == EVIL[:2]


def test_the_largest_page_opens(opened):
    p = opened(large())
    p.page.get_by_label('search layers').fill('59')
    p.page.keyboard.press('Enter')
    p.layer(59)
    p.point_heat(2500, 5000, 10, 40)
    assert '(mean of 9 minibatches)' in p.read()[1]


def test_each_curve_has_two_ticks_at_least(opened, rec):
    wave = np.where(np.arange(len(rec)) % 2, .3, -.3)[:, None]+0*rec.mean # 0 alone would be a tick
    p = opened(replace(rec, mean=wave, var=1.1+.15*wave, lr=0*rec.lr+.01))
    def ticks(title): return p.chart(title).locator('.grid').count()
    for title in ('mean of the weights', 'learning rate', 'loss'): assert ticks(title) > 1, title
    for box in p.page.locator('.chart input[type=checkbox]').all(): box.check() # logarithmic
    assert all(p.page.locator('.chart').nth(i).locator('.grid').count() > 1 for i in range(p.page.locator('.chart').count()))
