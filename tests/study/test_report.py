"""The page of a study: numbers against NumPy, Markdown and HTML that say the same, and a real browser"""
import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from test_claims import table as invented

from fastai_bnstats.study import report as R
from fastai_bnstats.study.claims import CLAIMS, METRICS, judge, read_run, study_table
from fastai_bnstats.recording import Recording
from fastai_bnstats.study.report import markdown_html, report_html, write_report
from fastai_bnstats.study.results import load_run, load_runs, load_study, run_dir, sources
from fastai_bnstats.study.text import esc, headline, md_table, report_markdown

SHOWN = 20 # layers, without the shortcuts
PICTURES = 15 # figures, companions and the picture of the claims


def npz(folder, arm, quantity, seed=0):
    with np.load(folder/f'source0/seed{seed}'/arm/f'{quantity}.npz') as z: return {k: z[k] for k in z.files}


def mean_log(x): return float(np.exp(np.log(x).mean()))


def test_readings_are_those_of_plain_numpy(study):
    "From the files alone, without any code of ours"
    for arm in ('naive_bn', 'freeze'):
        r = read_run(study, arm, 0, 0, load_runs(study)[arm][0])
        w, g, u = (npz(study, arm, q) for q in ('weights', 'gradients', 'updates'))
        last = w['fit'] == w['fit'].max()
        shown = np.array(['idconv' not in n and '.idpath' not in n for n in w['names']])
        assert shown.sum() == SHOWN
        change = np.diff(np.log(w['var'][last][:, shown]), axis=0)
        assert r['change_size'] == pytest.approx(mean_log(np.median(np.abs(change), 0)))
        assert r['roughness'] == pytest.approx(mean_log([((d[1:]-d[:-1])**2).mean()/d.var() for d in change.T]))
        rms = np.sqrt(g['mean']**2+g['var'])[last][:, shown]
        assert r['grad_depth'] == pytest.approx(mean_log(np.exp(np.median(np.log(rms[:, 1:]/rms[:, :1]), 0))))
        loss = w['loss'][w['loss_fit'] == w['loss_fit'].max()]
        assert r['loss_var'] == pytest.approx((np.diff(loss)**2).mean()/2) and r['loss_var_rel'] == pytest.approx((np.diff(loss)**2).mean()/2/loss.mean()**2)
        assert r['first_loss'] == loss[0] and r['final_train'] == pytest.approx(loss.mean()) # one epoch
        ulast = (u['fit'] == u['fit'].max()) & (u['epoch'] < 3)
        body = np.array([n.startswith('0.') and k == 'weight' and '.idpath' not in n for n, k in zip(u['names'], u['kind'])])
        norm = np.array([n.startswith('0.') and k in ('gamma', 'beta') for n, k in zip(u['names'], u['kind'])])
        assert body.sum() == 19 and norm.sum() == 44
        for part, sel in (('body', body), ('head', np.array([n == '1.2.weight' for n in u['names']]))):
            assert r[f'path_{part}'] == pytest.approx(mean_log((u['step_norm']/u['norm'])[ulast][:, sel].sum(0)))
            assert r[f'displacement_{part}'] == pytest.approx(mean_log((u['fit_norm'][ulast][-1]/u['start_norm'][ulast][-1])[sel]))
        assert r['accuracy'] == json.loads((study/f'source0/seed0/{arm}/run.json').read_text())['epochs'][-1]['accuracy']


def test_the_head_is_the_same_in_paired_arms_at_the_start(study):
    "A seed gives all arms the same new head: its first loss differs only by the body"
    norms = {a: npz(study, a, 'updates') for a in ('naive_bn', 'freeze', 'freeze_non_bn')}
    first = {a: u['start_norm'][0][list(u['names']).index('1.2.weight')] for a, u in norms.items()}
    assert len(set(first.values())) == 1


def test_the_page_has_everything_inside(study):
    page, text = (study/'report.html').read_text(), (study/'report.md').read_text()
    assert page.count('data:image/png;base64,') == PICTURES and 'http://' not in page and 'https://' not in page
    for c in CLAIMS: assert f'({c.key}) {c.title}' in page and esc(c.title) in text
    for arm in ('naive_nobn', 'naive_fold', 'naive_bn', 'freeze', 'freeze_non_bn'): assert f'<code>{arm}</code>' in page and f'`{arm}`' in text
    for said in ('Measured here:', 'Batch Norm has a clear smoothing effect', 'One seed shows what happened once', 'still has 6 batch norm layers', 'torch', 'About one source checkpoint'): assert said in page and said in text
    assert page.index('Verdicts</h2>') < page.index('id="fig1"') and page.count('class=closer') == 8
    assert set(re.findall(r'!\[[^\]]*\]\(([^)]+)\)', text)) == {p.name for p in study.glob('*.png')} # every link has its picture
    assert {v for v in re.findall(r'class="v (\w+)"', page)} == {'undecided'} # one seed


def test_html_and_markdown_say_the_same(study):
    plain = lambda s: re.sub(r'\W+', '', s)
    text = (study/'report.md').read_text()
    body = re.sub(r'<details class=closer>.*?</details>', '', (study/'report.html').read_text(), flags=re.S)
    import html
    words = plain(html.unescape(re.sub(r'<[^>]+>', ' ', body[body.index('</nav>'):])))
    for line in text.splitlines()[1:]:
        if line.startswith('![') or line.startswith('| :--'): continue
        for cell in re.split(r'\||\*\*|`|“|”|\*', line.replace('\\', '')):
            assert plain(cell) in words, cell


def test_the_readings_lie_beside_it(study):
    with (study/'measures.csv').open() as f: rows = list(csv.DictReader(f))
    table = study_table(study)
    assert len(rows) == len(table) == 5
    for got, want in zip(rows, table): np.testing.assert_array_equal([float(got[k]) for k in METRICS], [float(want[k]) for k in METRICS])


def test_a_report_is_drawn_again_without_training(study, tmp_path):
    out = tmp_path/'copy'
    shutil.copytree(study, out)
    (out/'report.html').unlink(); (out/'fig5.png').unlink()
    said = subprocess.run(['bnstats-report', str(out)], capture_output=True, text=True, check=True).stdout
    assert 'report.html' in said and (out/'fig5.png').stat().st_size > 10_000
    assert (out/'report.md').read_text() == (study/'report.md').read_text()


@pytest.fixture
def eight(study, tmp_path):
    "A folder that looks like a study of eight seeds and a second source, made of the one that was run"
    out = tmp_path/'eight'
    shutil.copytree(study, out)
    rng = np.random.default_rng(0)
    for k in range(2):
        root = out/f'source{k}'
        if k: shutil.copytree(study/'source0', root)
        for s in range(1, 8):
            for a in ('naive_nobn', 'naive_bn'):
                d = root/f'seed{s}'/a
                shutil.copytree(study/'source0/seed0'/a, d)
                run = json.loads((d/'run.json').read_text())
                run['seed'] = s
                run['epochs'][-1]['accuracy'] = float((.5 if a == 'naive_nobn' else .9)+.01*rng.normal())
                (d/'run.json').write_text(json.dumps(run))
    return out


def test_many_seeds_and_sources_are_told(eight, monkeypatch):
    monkeypatch.setattr(R, 'draw_figures', lambda folder: {}) # takes longer than all the rest, and is tested above
    write_report(eight)
    text = (eight/'report.md').read_text()
    assert 'About 2 source checkpoints' in text and 'nothing can be decided' not in text and 'seeds.png' in text
    line = next(l for l in text.splitlines() if l.startswith('|') and 'accuracy, deleted' in l)
    assert '✔ supported' in line and '| 8 |' in line
    assert '**The parts of claim (a) disagree.**' in text and text.index('disagree') < text.index('In short') # folded: one seed only
    assert 'the answer depends on' not in text # one seed cannot say that
    assert 'mean of 16 runs' in text
    a, b = ([np.log(r['accuracy']) for r in study_table(eight) if r['arm'] == x and r['source'] == 0] for x in ('naive_nobn', 'naive_bn'))
    c, d = ([np.log(r['accuracy']) for r in study_table(eight) if r['arm'] == x and r['source'] == 1] for x in ('naive_nobn', 'naive_bn'))
    want = np.exp((np.array(a)-b+np.array(c)-d).mean()/2)
    assert f'{want:.3g} [' in line


def test_what_depends_on_how_batch_norm_was_removed_is_said_first():
    first = lambda **kw: headline(judge(invented(**kw)))[0]
    assert first(accuracy__naive_nobn=.7, accuracy__naive_fold=1.3).startswith('**The parts of claim (a) disagree.**')
    assert 'the answer depends on *how* batch norm was removed' in first(accuracy__naive_nobn=.7, accuracy__naive_fold=1.3)
    assert 'In short' in first(accuracy__naive_nobn=.7, accuracy__naive_fold=.7, seed=1)
    few = headline(judge(invented(7)))
    assert any(p.startswith('**7 seeds:** corrected for 5 claims, the smallest possible p is 0.08; it takes 8 seeds') for p in few)


def test_the_control_has_a_section(eight):
    about = json.loads((eight/'study.json').read_text())
    (eight/'study.json').write_text(json.dumps({**about, 'aa': 4}))
    table = study_table(eight)
    text = report_markdown(eight, table, judge(table))
    part = text[text.index('## Control: the same arm twice'):text.index('## Arms')]
    assert 'seeds 4 to 7 over itself with seeds 0 to 3' in part and 'Nothing did.' in part and part.count('undecided') == 6
    (eight/'study.json').write_text(json.dumps({**about, 'aa': 8}))
    assert 'These runs are not finished.' in report_markdown(eight, table, judge(table))


def test_other_people_s_text_stays_text(study, tmp_path):
    out = tmp_path/'odd'
    shutil.copytree(study, out)
    about = json.loads((out/'study.json').read_text())
    about['about']['name'] = '<b>|evil|</b> *star* _x_ [a](http) <script>alert(1)</script>'
    (out/'study.json').write_text(json.dumps(about))
    table = study_table(out)
    page = report_html(out, report_markdown(out, table, judge(table)))
    assert '<script>alert' not in page and '&lt;b&gt;|evil|&lt;/b&gt; *star* _x_ [a](http)' in page


def test_markdown_tables_and_verdicts():
    page = markdown_html(md_table(['a', 'b'], [[esc('x|y <z>'), '**✘ contradicted**'], ['⇄ parts disagree', '? undecided (within 0.9 to 1.11)']]))
    assert 'x|y &lt;z&gt;' in page and '<span class="v contradicted">✘ contradicted</span>' in page and 'class="v parts"' in page and 'class="v undecided"' in page


def test_a_diverged_run_is_reported_as_such(study, tmp_path):
    from dataclasses import replace
    out = tmp_path/'out'
    shutil.copytree(study, out)
    f = out/'source0/seed0/naive_nobn/weights.npz'
    r = Recording.load(f)
    nan = np.full(r.var.shape, np.nan)
    replace(r, loss=np.full(len(r.loss), np.nan), valid_loss=np.full(len(r.valid_loss), np.nan), var=nan, mean=nan, hist=np.zeros_like(r.hist), under=0*r.under, over=0*r.over, nonfinite=r.numel).save(f)
    page = write_report(out).read_text()
    assert page.count('data:image/png;base64,') >= PICTURES-2 and 'not a number' in page and 'naive_nobn' in page


def test_reading_back_refuses(study, tmp_path):
    with pytest.raises(ValueError, match='weights, gradients, updates, outputs. Found quantity='): load_study(study, quantity='x')
    with pytest.raises(FileNotFoundError, match='holds no study'): write_report(tmp_path)
    assert sources(study) == [0] and run_dir(study, 'pretrained').name == 'pretrained' and load_run(study, 'pretrained', quantity='outputs') is None
    assert list(load_study(study, seeds=[5])) == ['pretrained'][:0]


def test_the_page_in_a_browser(study, browser):
    page = browser.new_page()
    said, asked = [], []
    page.on('console', lambda m: said.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: said.append(str(e)))
    page.on('request', lambda r: asked.append(r.url))
    page.goto((study/'report.html').as_uri())
    assert page.locator('#verdicts').is_visible() and page.locator('.v').first.is_visible()
    wide = page.evaluate('document.documentElement.scrollWidth-document.documentElement.clientWidth')
    assert wide <= 0 # nothing makes the page scroll sideways
    d = page.locator('details.closer').first
    assert not d.locator('canvas').first.is_visible()
    d.locator('summary').first.click()
    c = d.locator('canvas').first
    c.scroll_into_view_if_needed()
    box = c.bounding_box()
    page.mouse.move(box['x']+box['width']*.4, box['y']+box['height']*.5)
    page.wait_for_function("[...document.querySelectorAll('.bnheat')][0].innerText.match(/count [0-9]/)")
    d.get_by_role('option').nth(3).click()
    page.wait_for_function("[...document.querySelectorAll('.bnheat')][0].dataset.layer=='3'")
    ink = {}
    for scheme in ('light', 'dark'):
        page.emulate_media(color_scheme=scheme)
        ink[scheme] = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.documentElement).colorScheme]")
    assert ink['light'][0] != ink['dark'][0]
    page.emulate_media(media='print')
    assert not page.locator('nav').is_visible() and page.locator('table').first.is_visible()
    page.set_viewport_size(dict(width=400, height=800))
    page.emulate_media(media='screen')
    assert page.evaluate('document.documentElement.scrollWidth-document.documentElement.clientWidth') <= 0
    assert not said and all(u.startswith(('file:', 'data:', 'blob:')) for u in asked)
    page.close()
