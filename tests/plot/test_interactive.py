"""Interactive heat maps contain every count, and the read-out describes the cell under the pointer"""
import base64
import json
import re
import zlib
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from forks import LIMIT, wait_for
from helpers import make

from fastai_bnstats.plot.interactive import HeatMap, heat_assets, heat_html, time_columns
from fastai_bnstats.plot.style import CHANGES, COUNTS
from fastai_bnstats.recording import DIMS, Recording, empty_recording

ROWS, LOSS, VALID = ([n for n, d in DIMS.items() if d[0] == k] for k in 'TNV')


def content(html): return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.S)[1])


def decode(d, i):
    "(B+4,C) sums of a layer, computed from the page only"
    raw = zlib.decompress(base64.b64decode(d['layers'][i]['data']))
    cols = len(d['starts'])-1
    z = sum(p.astype(np.int64)<<(8*k) for k, p in enumerate(np.frombuffer(raw, np.uint8).reshape(-1, d['rows'], cols)))
    return np.cumsum((z>>1)^-(z&1), 1)


def rows_of(rec, i): return np.c_[rec.under[:, i], rec.hist[:, i], rec.over[:, i], rec.nonfinite[:, i], rec.numel[:, i]]


def test_every_count_is_in_the_page(rec):
    for r in (rec, rec.sel(phase='unfreeze', epoch=range(2))-rec.sel(phase='freeze')):
        d = content(heat_html(r))
        assert d['starts'] == list(range(len(r)+1))
        assert d['note'] == 'Each column is one minibatch.'
        assert [l['name'] for l in d['layers']] == r.names.tolist()
        for i, l in enumerate(d['layers']):
            assert (decode(d, i) == rows_of(r, i).T).all()
            assert l['edges'] == r.edges[i].tolist() and l['top'] == abs(rows_of(r, i)[:, :-2]).max()
            first = rows_of(r, i)[0, :-2]
            assert l['first'] == first.tolist() and l['change'] == abs(rows_of(r, i)[:, :-2]-first).max()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 50))
def test_columns_average_rows_of_one_fit(batches, max_cols):
    parts = [make(fits=(('a', 1),), P=1, batches=n, seed=k) for k, n in enumerate(batches)]
    fit = np.repeat(np.arange(len(parts)), batches)
    every = {n: np.concatenate([getattr(p, n) for p in parts]) for n in {*ROWS}-{'fit', 'step', 'phase'}}
    r = replace(parts[0], **every, fit=fit, step=np.arange(len(fit)), phase=np.array(list('abcd'))[fit])
    d = content(heat_html(r, max_cols=max_cols))
    starts = np.array(d['starts'])
    assert starts[0] == 0 and starts[-1] == len(r) and (np.diff(starts) > 0).all()
    assert len(starts)-1 <= max(max_cols, len(batches))
    assert set(np.cumsum(batches)) <= set(starts) # no column crosses a border
    n = time_columns(fit, max_cols)[1]
    assert max(np.diff(starts)) == min(n, max(batches)) and (n == 1 or f'the mean of {n} minibatches' in d['note'])
    means = np.stack([rows_of(r, 0)[a:b].astype(float).mean(0) for a, b in zip(starts, starts[1:])], 1)
    np.testing.assert_allclose(decode(d, 0)/np.diff(starts), means, rtol=1e-15, atol=0)


def test_counts_beyond_32_bits(rec):
    r = replace(rec, hist=rec.hist.astype(np.int64)*2**40, numel=rec.numel*2**40, under=rec.under*2**40, over=rec.over*2**40)
    d = content(heat_html(r, max_cols=3))
    assert (decode(d, 1) == np.add.reduceat(rows_of(r, 1), d['starts'][:-1]).T).all()


def test_names_and_titles_are_text(rec):
    evil = ['</script><script>alert(1)</script>', '<b>bold', '"\'&\u2028']
    h = heat_html(replace(rec, names=np.array(evil), phase=np.array(['<i>freeze', '<i>unfreeze'])[rec.fit]), title='</noscript><u>title')
    assert [l['name'] for l in content(h)['layers']] == evil and content(h)['title'] == '</noscript><u>title'
    assert not any(t in h for t in ('<b>', '<i>', '<u>', '<script>alert'))


def test_nothing_is_fetched_and_assets_can_be_left_out(rec):
    h, bare = heat_html(rec), heat_html(rec, assets=False)
    assert h == heat_assets()+bare and h.isascii() and '<style' not in bare
    assert 'http' not in heat_assets() and 'http:' not in bare and 'https:' not in bare and ' id=' not in h
    assert '<noscript>' in bare and len(heat_assets()) < 25_000


def test_errors_say_what_to_do(rec):
    with pytest.raises(ValueError, match='No layer matches .conv.*There are: 0.weight, 1.weight'): heat_html(rec, 'conv')
    with pytest.raises(ValueError, match='no rows.*select more rows'): heat_html(rec.sel(epoch=99))
    with pytest.raises(TypeError, match='Found list'): heat_html([1])
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match='max_cols'): heat_html(rec, max_cols=bad)


def test_layers_kinds_and_thinning_are_mentioned(rec):
    r = replace(rec, kind=np.array(['weight', 'gamma', 'beta']), meta={**rec.meta, 'every': 5})
    d = content(heat_html(r, [0, 1]))
    assert [l['what'] for l in d['layers']] == ['weight', 'value']
    assert d['bar'] == 'values in a bin'
    assert d['xlabel'] == 'minibatch (every 5th recorded)'
    assert content(heat_html(r, 0))['bar'] == 'weights in a bin'


def test_notebook_shows_it(rec):
    m = HeatMap(rec, [0, 2], title='Mine')
    assert m._repr_html_() == heat_html(rec, [0, 2], 'Mine') and repr(m).startswith('HeatMap: 2 layers, 24 rows (Mine)')


# in a browser

PAGE = '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><body>'

COPY = '''const at = (c, ...box) => { // of a copy: Chromium complains of a canvas that is read more than once
    const k = Object.assign(document.createElement('canvas'), { width: c.width, height: c.height })
    const g = k.getContext('2d', { willReadFrequently: true })
    g.drawImage(c, 0, 0)
    return g.getImageData(...box).data }
'''


class View:
    "A page with heat maps, its errors and its requests"
    def __init__(self, browser, html, **kwargs):
        self.page = browser.new_page(viewport=kwargs.pop('viewport', {'width': 1000, 'height': 800}), **kwargs)
        self.wrong, self.urls = [], []
        self.page.on('console', lambda m: self.wrong.append(m.text))
        self.page.on('pageerror', lambda e: self.wrong.append(str(e)))
        self.page.on('request', lambda r: self.urls.append(r.url))
        self.page.set_default_timeout(LIMIT*1000)
        self.page.set_content(PAGE+html)
        for k in range(html.count('class="bnheat"')): self.ready(k)

    def map(self, k=0): return self.page.locator('.bnheat').nth(k)
    def ready(self, k=0, layer=0):
        drawn = '([k, l]) => document.querySelectorAll(".bnheat")[k].dataset.layer == l'
        self.page.wait_for_function(drawn, arg=[k, str(layer)])
    def read(self, k=0): return self.map(k).locator('.bnheat-read').inner_text().split('\n')
    def choose(self, layer, k=0):
        self.map(k).locator('[role=option]').nth(layer).click()
        self.ready(k, layer)
    def point(self, rec, row, b, k=0):
        "Put the pointer on the middle of bin `b` at `row`; 'below' and 'above' are the strips"
        c = self.map(k).locator('canvas')
        c.scroll_into_view_if_needed()
        x, y, w, h = map(float, c.get_attribute('data-plot').split(','))
        B = rec.hist.shape[-1]
        py = {'below': y+h+10, 'above': y-10}.get(b) or y+h*(1-(b+.5)/B)
        o = c.bounding_box()
        self.page.mouse.move(o['x']+x+(row+.5)/len(rec)*w, o['y']+py)
        return self.read(k)
    def colour(self, x, y):
        "Red, green and blue at a place of the plot, each 0 to 255; `x` and `y` are shares, `y` from the top"
        js = "const [x, y, w, h] = c.dataset.plot.split(',').map(Number); return [...at(c, x + fx * w, y + fy * h, 1, 1)].slice(0, 3)"
        return self.map().locator('canvas').evaluate('(c, [fx, fy]) => {'+COPY+js+'}', [x, y])
    def pixels(self, k=0): return self.map(k).locator('canvas').evaluate('c => c.toDataURL()')
    def ink(self):
        "Mean of red, green and blue where the picture's text is most opaque, left of the plot"
        return self.map().locator('canvas').evaluate('c => {'+COPY+'''
            const p = at(c, 0, 0, c.dataset.plot.split(',')[0] * devicePixelRatio - 6, c.height)
            let best = 0
            for (let i = 0; i < p.length; i += 4) if (p[i + 3] > p[best + 3]) best = i
            return (p[best] + p[best + 1] + p[best + 2]) / 3 }''')
    def close(self):
        self.page.close()
        assert not self.wrong and not [u for u in self.urls if u != 'about:blank']


@pytest.fixture
def view(browser):
    views = []
    def open_(html, **kwargs):
        views.append(View(browser, html, **kwargs))
        return views[-1]
    yield open_
    for v in views: v.close()


def count_text(rec, i, t, b):
    n = {'below': rec.under, 'above': rec.over}[b][t, i] if isinstance(b, str) else rec.hist[t, i, b]
    return f'count {n:,}, '


def test_read_out_agrees_with_the_recording(view, rec):
    v = view(heat_html(rec, title='A title'))
    assert v.page.locator('.bnheat-title').inner_text() == 'A title' and v.map().get_attribute('data-decoded') == '1'
    assert 'arrow keys' in v.read()[0]
    for t, b in ((0, 0), (3, 7), (13, 5), (23, 9)):
        where, what = v.point(rec, t, b)
        assert where == f'{rec.phase[t]} · epoch {rec.epoch[t]} · minibatch {rec.batch[t]} · step {rec.step[t]}'
        assert count_text(rec, 0, t, b) in what and what.endswith(f'% of {rec.numel[t, 0]:,}')
        lo, hi = (float(x.replace('\u2212', '-')) for x in re.match(r'(\S+) to (\S+):', what).groups())
        np.testing.assert_allclose([lo, hi], rec.edges[0, b:b+2], atol=1e-3)
    v.page.mouse.move(1, 1)
    assert 'arrow keys' in v.read()[0]


def test_strips_show_counts_outside_the_edges(view, rec):
    some = replace(rec, under=rec.under+np.array([5, 0, 0]), over=rec.over*0+np.array([7, 0, 0]), numel=rec.numel+12)
    some = replace(some, under=some.under*np.array([1, 0, 0]))
    v = view(heat_html(some))
    for b, n in (('below', some.under[2, 0]), ('above', 7)):
        what = v.point(some, 2, b)[1]
        assert what.startswith(b) and f'count {n:,}' in what
    v.choose(1)
    for b in ('below', 'above'): assert 'arrow keys' in v.point(some, 2, b)[0]


def test_another_layer_is_unpacked_when_it_is_chosen(view, rec):
    v = view(heat_html(rec))
    first = v.pixels()
    v.choose(2)
    assert v.pixels() != first and v.map().get_attribute('data-decoded') == '2'
    assert count_text(rec, 2, 5, 9) in v.point(rec, 5, 9)[1]
    v.choose(0)
    assert v.pixels() == first and v.map().get_attribute('data-decoded') == '2'


def test_averaged_columns_say_so(view, rec):
    v = view(heat_html(rec, max_cols=6))
    assert 'Each column is the mean of 4 minibatches.' in v.map().inner_text()
    where, what = v.point(rec, 9, 4)
    mean = rec.hist[8:12, 0, 4].mean()
    assert f'count {mean:,.2f}'.rstrip('0').rstrip('.')+' (mean of 4 minibatches)' in what
    assert where == 'unfreeze · epoch 0 · minibatches 0 to 3 · steps 8 to 11'


def test_keys(view, rec):
    v = view(heat_html(rec))
    v.page.keyboard.press('Tab')
    assert v.page.evaluate('document.activeElement.getAttribute("role")') == 'option'
    v.page.keyboard.press('ArrowDown')
    v.ready(layer=1)
    assert v.map().locator('[aria-selected=true]').inner_text() == '1.weight' == v.page.evaluate('document.activeElement.textContent')
    v.page.keyboard.press('End')
    v.ready(layer=2)
    canvas = v.map().locator('canvas')
    assert canvas.get_attribute('aria-label').startswith('Heat map of 2.weight: minibatch')
    canvas.focus()
    for k in ('End', 'ArrowLeft', 'ArrowLeft', 'ArrowUp'): v.page.keyboard.press(k)
    assert 'step 21' in v.read()[0] and count_text(rec, 2, 21, 5) in v.read()[1] # begins in the middle
    assert v.page.evaluate('getComputedStyle(document.activeElement).outlineStyle') == 'solid'
    v.page.keyboard.press('Escape')
    assert 'arrow keys' in v.read()[0]


def test_touch(view, rec):
    v = view(heat_html(rec), has_touch=True)
    o, (x, y, w, h) = v.map().locator('canvas').bounding_box(), map(float, v.map().locator('canvas').get_attribute('data-plot').split(','))
    v.page.touchscreen.tap(o['x']+x+w*4.5/24, o['y']+y+h*.5+1)
    assert 'step 4' in v.read()[0] and count_text(rec, 0, 4, 4) in v.read()[1]


def with_zeros(rec, rows, *names):
    "A recording with the arrays `names` set to 0 in the chosen `rows`"
    arrays = {n: getattr(rec, n).copy() for n in names}
    for a in arrays.values(): a[rows] = 0
    return replace(rec, **arrays)


def test_rows_without_elements_are_grey_and_mentioned(view, rec):
    r = with_zeros(rec, rec.fit == 0, 'hist', 'under', 'over', 'nonfinite', 'numel')
    last = rec.step == 23
    r = replace(with_zeros(r, last, 'hist', 'under', 'over'), nonfinite=np.where(last[:, None], r.numel, r.nonfinite))
    v = view(heat_html(r))
    assert v.point(r, 3, 4)[1].endswith(': no elements')
    assert v.point(r, 23, 4)[1].endswith(f'all {r.numel[23, 0]:,} NaN or infinite')
    assert 'count' in v.point(r, 9, 4)[1]
    assert v.colour(3.3/24, .52) == [0xbb]*3 != v.colour(12.3/24, .52)
    never = replace(rec, edges=np.full_like(rec.edges, np.nan))
    v = view(heat_html(never))
    assert 'arrow keys' in v.point(never, 3, 4)[0]


def test_uneven_bins_are_placed_at_their_values(view, rec):
    e = np.sort(np.r_[-2., np.random.default_rng(0).uniform(-2, 2, 9), 2.])
    r = replace(rec, edges=np.stack([e]*3))
    v = view(heat_html(r))
    for value in (-1.9, -.3, .2, 1.7):
        b = np.searchsorted(e, value)-1
        assert count_text(r, 0, 6, b) in v.point(r, 6, (value+2)/4*10-.5)[1]


def test_difference_is_signed(view, rec):
    d = rec.sel(phase='unfreeze', epoch=range(2))-rec.sel(phase='freeze')
    v = view(heat_html(d))
    for t, b in ((1, 5), (5, 3), (7, 4)):
        where, what = v.point(d, t, b)
        n = d.hist[t, 0, b]
        assert f'difference {n:+,}, '.replace('-', '\u2212').replace('+0', '0') in what
        assert f'step {d.step[t, 0]} minus step {d.step[t, 1]}' in where
        assert where.startswith('unfreeze minus freeze')


@pytest.mark.parametrize('max_cols,signed', [(400, False), (6, False), (400, True), (4, True)])
def test_colours_agree_with_the_printed_figures(view, rec, max_cols, signed):
    r = rec.sel(phase='unfreeze', epoch=range(2))-rec.sel(phase='freeze') if signed else rec
    starts, _ = time_columns(r.fit, max_cols)
    means = np.add.reduceat(rows_of(r, 0)[:, :-2], starts[:-1])/np.diff(starts)[:, None]
    image = np.sign(means)*np.log1p(abs(means))
    top = abs(image).max()
    v = view(heat_html(r, max_cols=max_cols))
    for c, b in ((0, 4), (2, 3), (len(starts)-2, 6)):
        want = mpl.colormaps[CHANGES if signed else COUNTS]((image[c, b+1]/top+signed)/(1+signed))
        np.testing.assert_allclose(v.colour((starts[c]+.4)/len(r), 1-(b+.5)/10), np.array(want[:3])*255, atol=1)


def test_the_last_selected_layer_is_shown(view, rec):
    v = view(heat_html(rec))
    # layer 0 is unpacked already, layer 1 comes later
    v.page.evaluate("""async () => {
        const o = document.querySelectorAll('[role=option]'), unpacked = o[1].onclick()
        o[0].click()
        await unpacked }""")
    assert v.map().get_attribute('data-layer') == '0'
    assert v.map().locator('[aria-selected=true]').inner_text() == '0.weight'
    assert count_text(rec, 0, 5, 9) in v.point(rec, 5, 9)[1]


@pytest.mark.parametrize('width', [300, 500, 1300])
@pytest.mark.parametrize('gone', [False, True])
def test_one_minibatch_among_many_is_seen_at_every_width(view, width, gone):
    T, at = 5000, 3333
    r = make(fits=(('a', 1),), P=1, batches=T)
    spike = (np.arange(T) == at)[:, None]
    hist = r.hist*0+np.where(np.arange(10) == 4, 5000, 0)
    lost = np.where(spike, 5000 if gone else 3000, 0)
    hist[..., 4] -= lost
    zero = lost*0
    over, nonfinite = (zero, lost) if gone else (lost, zero)
    r = replace(r, hist=hist, under=zero, over=over, nonfinite=nonfinite, numel=zero+5000)
    v = view(heat_html(r, max_cols=T), viewport={'width': width, 'height': 700})
    x, y, w, h = map(float, v.map().locator('canvas').get_attribute('data-plot').split(','))
    assert w < T/3
    def colours(fy): return {tuple(v.colour((i+.5)/w, fy)) for i in range(int(at/T*w)-2, int(at/T*w)+3)}
    assert len(colours(.55 if gone else -10/h)) == 2 # grey in a bin with 5,000 elements, or the strip above the plot
    assert v.point(r, at, 4 if gone else 'above')[1].split(': ')[1].startswith('all 5,000 NaN' if gone else 'count 3,000')


def test_one_colour_scale_on_request(view, rec):
    small = replace(rec, hist=rec.hist//np.array([1, 1, 50])[:, None])
    v = view(heat_html(small))
    v.choose(2)
    own = v.pixels()
    v.page.get_by_text('same colours').click()
    assert v.pixels() != own


def test_dark_narrow_sharp_and_printed(view, rec):
    v = view(heat_html(rec))
    assert v.ink() < 60
    v.page.emulate_media(color_scheme='dark')
    wait_for(lambda: v.ink() > 200)
    for when, dark in (('beforeprint', False), ('afterprint', True)):
        v.page.evaluate('when => { dispatchEvent(new Event(when)) }', when)
        assert (v.ink() > 200) == dark
    v.page.emulate_media(color_scheme='dark', media='print')
    wait_for(lambda: v.ink() < 60)
    assert not v.map().locator('[role=listbox]').is_visible()
    assert not v.map().locator('.bnheat-read').is_visible()
    assert v.map().locator('canvas').is_visible()
    v.page.emulate_media(color_scheme='light', media='screen')
    v.page.set_viewport_size({'width': 400, 'height': 800})
    def fits():
        boxes = [v.map().locator(s).bounding_box() for s in ('[role=listbox]', 'canvas')]
        return boxes[0]['y']+boxes[0]['height'] <= boxes[1]['y'] and v.page.evaluate('document.documentElement.scrollWidth') <= 400
    wait_for(fits)
    assert count_text(rec, 0, 5, 9) in v.point(rec, 5, 9)[1]
    sharp = view(heat_html(rec), device_scale_factor=2)
    assert sharp.map().locator('canvas').evaluate('c => c.width / c.clientWidth') == 2
    assert count_text(rec, 0, 5, 9) in sharp.point(rec, 5, 9)[1]


def test_reading_does_not_move_the_page(view, rec):
    v = view(heat_html(rec))
    before = v.map().bounding_box()
    v.point(rec, 5, 9)
    assert v.map().bounding_box() == before


@pytest.mark.parametrize('order', ['first', 'last', 'each'])
def test_several_on_a_page(view, rec, order):
    a, b = (heat_html(rec, [0, 1], assets=order == 'each'), heat_html(rec.sel(phase='freeze'), [1, 2], assets=order == 'each'))
    v = view({'first': heat_assets(), 'last': '', 'each': ''}[order]+a+b+(heat_assets() if order == 'last' else ''))
    still = v.pixels(0)
    v.choose(1, k=1)
    assert v.pixels(0) == still and v.map(0).get_attribute('data-layer') == '0' and v.page.locator('canvas').count() == 2
    assert count_text(rec, 2, 3, 9) in v.point(rec.sel(phase='freeze'), 3, 9, k=1)[1]
    assert 'arrow keys' in v.read(0)[0]
    assert count_text(rec, 0, 20, 9) in v.point(rec, 20, 9, k=0)[1]


def test_inserted_by_a_notebook(view, rec):
    v = view('<div id="out"></div>')
    v.page.evaluate('''html => { const out = document.getElementById('out')
        out.innerHTML = html
        for (const old of out.querySelectorAll('script')) { // Jupyter runs the scripts that it inserts
            const s = document.createElement('script')
            for (const a of old.attributes) s.setAttribute(a.name, a.value)
            s.textContent = old.textContent
            old.replaceWith(s)
        } }''', HeatMap(rec)._repr_html_())
    v.ready()
    assert count_text(rec, 0, 5, 9) in v.point(rec, 5, 9)[1]


def test_hidden_at_first(view, rec):
    v = view(f'<details><summary>more</summary>{heat_html(rec)}</details>')
    v.page.get_by_text('more').click()
    v.page.wait_for_function('document.querySelector(".bnheat canvas").dataset.plot')
    assert count_text(rec, 0, 5, 9) in v.point(rec, 5, 9)[1]


def test_without_javascript(browser, rec):
    page = browser.new_page(java_script_enabled=False)
    page.set_content(PAGE+heat_html(rec, title='Mine'))
    assert 'Mine: switch JavaScript on' in page.locator('body').inner_text()
    page.close()


def long(T=5000, P=60, B=40):
    rng, names, edges = np.random.default_rng(0), [f'layers.{i}.weight' for i in range(P)], np.linspace([-1.]*P, [1.]*P, B+1, axis=1)
    hist = rng.integers(-3, 4, (T, P, B), dtype=np.int32)
    hist = np.cumsum(hist, 0, dtype=np.int32)+20_000
    zero, t, none = np.zeros((T, P), np.int64), np.arange(T), empty_recording(names, edges)
    counts = dict(hist=hist, under=zero, over=zero, nonfinite=zero, numel=hist.sum(-1, dtype=np.int64))
    rows = dict(step=t, fit=t//2500, epoch=t%2500//250, batch=t%250, phase=np.array(['freeze', 'unfreeze'])[t//2500])
    rest = dict(mean=zero*1., var=zero*1., trainable=zero == 0, stepped=t >= 0, lr=np.ones((T, 1)))
    return Recording(names=np.array(names), edges=edges, **counts, **rows, **rest, **{k: getattr(none, k) for k in (*LOSS, *VALID)})


def test_sixty_layers_of_five_thousand_minibatches(view):
    r = long()
    h = heat_html(r)
    v = view(h)
    assert v.map().get_attribute('data-decoded') == '1' and len(h) < 3_000_000
    v.choose(59)
    where, what = v.point(r, 2500, 10)
    assert where.startswith('unfreeze · epoch 0 · minibatches 0 to 12 ')
    assert f'count {round(r.hist[2500:2513, 59, 10].mean(), 2):,} (mean of 13 minibatches)' in what
