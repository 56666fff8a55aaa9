"""The report of a study: its numbers agree with NumPy, its HTML with its Markdown, and it works in a real browser"""
import csv
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from test_claims import table as invented

from fastai_bnstats.study import report as R
from fastai_bnstats.recording import Recording
from fastai_bnstats.study.arms import GRID, POST_ARMS
from fastai_bnstats.study.claims import CLAIMS, GRID_CLAIMS, METRICS, judge, run_metrics, study_table
from fastai_bnstats.study.captions import num, over_runs
from fastai_bnstats.study.report_text import DIFFERENT, HOW, _brief, control_section, headline, policy_section, report_blocks
from fastai_bnstats.study.report_blocks import escape_markdown, plain, to_markdown
from fastai_bnstats.study.figures import FIGURES
from fastai_bnstats.study.report import report_html, write_report
from fastai_bnstats.study.results import load_run, load_runs, load_study, run_dir, sources

SHOWN = 20 # layers in the figures; shortcuts are hidden
PICTURES = 15 # 14 figures, and the picture of the claims
PHRASES = ('Measured here:', 'Batch Norm has a clear smoothing effect', 'One seed shows what happened once',
           'still has 6 batch norm layers', 'torch', 'One source checkpoint')


def npz(folder, arm, quantity, seed=0):
    with np.load(folder/f'source0/seed{seed}'/arm/f'{quantity}.npz') as z: return {k: z[k] for k in z.files}


def mean_log(x): return float(np.exp(np.log(x).mean()))


def copy_of(study, out): return Path(shutil.copytree(study, out))


def update_json(file, **values): file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_metrics_are_those_of_plain_numpy(study):
    "Computed from the files of the study with NumPy only"
    for arm in ('naive_bn', 'freeze'):
        r = run_metrics(study, arm, 0, 0, load_runs(study)[arm][0])
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
        loss_var = (np.diff(loss)**2).mean()/2
        assert r['loss_var'] == pytest.approx(loss_var) and r['loss_var_rel'] == pytest.approx(loss_var/loss.mean()**2)
        assert r['first_loss'] == loss[0] and r['final_train'] == pytest.approx(loss.mean()) # one epoch
        ulast = (u['fit'] == u['fit'].max()) & (u['epoch'] < 3)
        body = np.array([n.startswith('0.') and k == 'weight' and '.idpath' not in n for n, k in zip(u['names'], u['kind'])])
        norm = np.array([n.startswith('0.') and k in ('gamma', 'beta') for n, k in zip(u['names'], u['kind'])])
        head = u['names'] == '1.2.weight'
        assert body.sum() == 19 and norm.sum() == 44
        for part, sel in (('body', body), ('head', head)):
            assert r[f'path_{part}'] == pytest.approx(mean_log((u['step_norm']/u['norm'])[ulast][:, sel].sum(0)))
            assert r[f'displacement_{part}'] == pytest.approx(mean_log((u['fit_norm'][ulast][-1]/u['start_norm'][ulast][-1])[sel]))
        assert r['accuracy'] == json.loads((study/f'source0/seed0/{arm}/run.json').read_text())['epochs'][-1]['accuracy']


def test_paired_arms_start_with_the_same_head(study):
    "Paired by seed, so that only the body differs at the first step"
    norms = {a: npz(study, a, 'updates') for a in ('naive_bn', 'freeze', 'freeze_non_bn')}
    first = {a: u['start_norm'][0][list(u['names']).index('1.2.weight')] for a, u in norms.items()}
    assert len(set(first.values())) == 1


def test_the_page_is_complete_and_self_contained(study):
    page, text = (study/'report.html').read_text(), (study/'report.md').read_text()
    assert page.count('data:image/png;base64,') == PICTURES and 'http://' not in page and 'https://' not in page
    for c in CLAIMS: assert f'({c.key}) {c.title}' in page and escape_markdown(c.title) in text
    for arm in POST_ARMS: assert f'<code>{arm}</code>' in page and f'`{arm}`' in text
    for phrase in PHRASES: assert phrase in page and phrase in text
    assert page.index('Verdicts</h2>') < page.index('id="fig1"') and page.count('class="closer"') == 8
    assert set(re.findall(r'!\[[^\]]*\]\(([^)]+)\)', text)) == {p.name for p in study.glob('*.png')} # every picture exists
    assert set(re.findall(r'class="verdict ([\w-]+)"', page)) == {'undecided'} # one seed
    assert [f for f in FIGURES if f'href="#fig{f}"' in page] == [f for f in FIGURES if f'id="fig{f}"' in page] == list(FIGURES)
    assert page.count('class="measured"') == len(FIGURES) and page.count('<blockquote>') == len(FIGURES)+len(CLAIMS)
    for words in HOW+DIFFERENT: assert words[-1].words in html.unescape(page) # the last words of each paragraph


def words_of_html(page):
    page = re.sub(r'<details class="closer">.*?</details>', '', page, flags=re.S)
    return re.sub(r'\W+', '', html.unescape(re.sub(r'<[^>]+>', ' ', page[page.index('</nav>'):])))


def words_of_markdown(text):
    lines = [l for l in text.splitlines()[1:] if not l.startswith(('![', '| :--'))] # in HTML, the title comes before the links
    return re.sub(r'\W+', '', '\n'.join(lines))


def test_html_and_markdown_say_the_same(study):
    "They have the same words in the same order"
    page, text = words_of_html((study/'report.html').read_text()), words_of_markdown((study/'report.md').read_text())
    assert page == text and len(text) > 8000


def test_all_metrics_are_saved(study):
    with (study/'measures.csv').open() as f: rows = list(csv.DictReader(f))
    table = study_table(study)
    assert len(rows) == len(table) == 5
    for row in zip(rows, table):
        saved, computed = ([float(r[k]) for k in METRICS] for r in row)
        np.testing.assert_array_equal(saved, computed)


def test_a_report_is_drawn_again_without_training(study, tmp_path):
    out = copy_of(study, tmp_path/'copy')
    for name in ('report.html', 'fig5.png'): (out/name).unlink()
    printed = subprocess.run(['bnstats-report', str(out)], capture_output=True, text=True, check=True).stdout
    assert 'report.html' in printed and (out/'fig5.png').stat().st_size > 10_000
    assert (out/'report.md').read_text() == (study/'report.md').read_text()


@pytest.fixture
def eight(study, tmp_path):
    "Copies of the study's runs, which look like eight seeds of two arms from two sources"
    out, rng = copy_of(study, tmp_path/'eight'), np.random.default_rng(0)
    shutil.copytree(study/'source0', out/'source1')
    for k, s, a in product(range(2), range(1, 8), ('naive_nobn', 'naive_bn')):
        d = copy_of(study/'source0/seed0'/a, out/f'source{k}/seed{s}'/a)
        epochs = json.loads((d/'run.json').read_text())['epochs']
        epochs[-1]['accuracy'] = float((.5 if a == 'naive_nobn' else .9)+.01*rng.normal())
        update_json(d/'run.json', seed=s, epochs=epochs)
    return out


def test_many_seeds_and_sources(eight, monkeypatch):
    monkeypatch.setattr(R, 'draw_figures', lambda folder: {}) # slow, and tested above
    write_report(eight)
    text = (eight/'report.md').read_text()
    assert '2 source checkpoints' in text and 'no verdict is possible' not in text and 'seeds.png' in text
    assert words_of_html((eight/'report.html').read_text()) == words_of_markdown(text)
    line = next(l for l in text.splitlines() if l.startswith('|') and 'accuracy, deleted' in l)
    assert '✔ supported' in line and '| 8 |' in line
    assert '**The parts of claim (a) disagree.**' in text and text.index('disagree') < text.index('In short')
    assert 'the answer depends on' not in text # the arm with folded batch norm has only one seed
    assert 'mean of 16 runs' in text
    table = study_table(eight)
    def logs(arm, source): return np.array([np.log(r['accuracy']) for r in table if (r['arm'], r['source']) == (arm, source)])
    ratio = np.exp(np.mean([logs('naive_nobn', k)-logs('naive_bn', k) for k in (0, 1)]))
    assert escape_markdown(f'{ratio:.3g} [') in line


def test_the_headline_starts_with_verdicts_that_depend_on_how_batch_norm_was_removed():
    first = lambda **kw: headline(judge(invented(**kw)))[0]
    split = first(accuracy__naive_nobn=.7, accuracy__naive_fold=1.3)
    assert split[0].words == 'The parts of claim (a) disagree.' and split[0].style == 'strong'
    assert 'the answer depends on how batch norm was removed' in plain(split)
    assert [s.words for s in split if s.style == 'emphasis'] == ['how']
    assert [s.words for s in split if s.style == 'verdict'] == ['supported', 'contradicted']
    assert 'In short' in plain(first(accuracy__naive_nobn=.7, accuracy__naive_fold=.7, seed=1))


def test_the_headline_says_how_many_seeds_are_needed():
    seven = '7 seeds: after the correction for 5 claims the smallest possible p is 0.08. At least 8 seeds are needed'
    assert any(plain(p).startswith(seven) for p in headline(judge(invented(7))))
    two = [plain(p) for p in headline(judge(invented(2)), 3)]
    assert any(p.startswith('2 seeds: no verdict is possible. With fewer than 6 seeds') and '--seeds 8' in p for p in two)
    assert '3 source checkpoints' in two[-1]


def test_the_headline_counts_seeds_for_all_numbers_of_finished_runs():
    pairs = [('naive_nobn', 'naive_bn'), ('naive_fold', 'naive_bn'), ('freeze', 'freeze_non_bn')]
    for n, dropped in product((1, 2, 5, 6, 7, 8), product((0, 1, 99), repeat=5)):
        rows = [r for r in invented(n) if r['seed'] < n-dict(zip(POST_ARMS, dropped))[r['arm']]] # the last seeds are not finished
        done = {a: sum(r['arm'] == a for r in rows) for a in POST_ARMS}
        most = max(min(done[a], done[b]) for a, b in pairs)
        text = ' '.join(map(plain, headline(judge(rows)))) if rows else ''
        if not rows: continue
        expected = {0: 'No verdict is possible: there is no seed with all the arms that a claim compares',
                    1: '1 seed: no verdict is possible. One seed shows what happened once', 8: 'In short'}
        assert expected.get(most, f'{most} seeds: ') in text and '0 seeds' not in text, (done, text)


def test_a_study_of_one_arm_has_a_headline_without_a_number_of_seeds(study, tmp_path):
    out = copy_of(study, tmp_path/'out')
    for arm in POST_ARMS:
        if arm != 'naive_bn': shutil.rmtree(run_dir(out, arm))
    text = markdown(out)
    assert 'Number of runs on the target: 1 (seed 0)' in text and '**No verdict is possible:**' in text and '0 seeds' not in text


def markdown(folder):
    table = study_table(folder)
    return to_markdown(report_blocks(folder, table, judge(table)))


def test_the_control_has_a_section(eight):
    update_json(eight/'study.json', aa=4)
    text = markdown(eight)
    part = text[text.index('## Control: the same arm twice'):text.index('## Arms')]
    assert '`naive_bn` with seeds 4 to 7 is compared with `naive_bn` with seeds 0 to 3' in part
    assert 'No metric is different.' in part and part.count('undecided') == 6
    update_json(eight/'study.json', aa=8)
    assert 'These runs are not finished.' in markdown(eight)


def test_a_difference_in_the_control_is_a_warning():
    t = [{**r, 'arm': 'naive_bn', 'accuracy': r['accuracy']*(1+(r['seed'] >= 8))} for r in invented(16) if r['arm'] == 'naive_bn']
    text = to_markdown(control_section(t, 8))
    assert '**1 of 6 metrics are different: do not trust the verdicts above.**' in text
    assert text.count('✘ different') == 1 and 'supported' not in text


def test_the_grid_has_a_section():
    t = [{**r, 'arm': a} for r in invented(8) if r['arm'] == 'freeze' for a in GRID]
    text = to_markdown(policy_section(t, judge(t, GRID_CLAIMS)))
    assert '## Which batch norm policy?' in text and text.count('≈ equivalent') == 6 # three in the text, three in the table
    rows = [l.split(' | ') for l in text.splitlines() if l.startswith(('| follow', '| held', '| recalibrated'))]
    assert len(rows) == 3 and all(len(r) == 5 and '%' in r[1] and '%' in r[3] for r in rows)


def test_text_from_the_data_is_escaped(study, tmp_path):
    out = copy_of(study, tmp_path/'odd')
    about = json.loads((out/'study.json').read_text())
    evil = '<b>|evil|</b> *star* _x_ [a](http) {name} `code` &lt; <script>alert(1)</script>'
    about['about']['name'] = evil
    about['about']['source']['skipped'] = [evil]
    about['versions'] = {evil: '1'}
    (out/'study.json').write_text(json.dumps(about))
    table = study_table(out)
    blocks = report_blocks(out, table, judge(table))
    page, text = report_html(out, blocks), to_markdown(blocks)
    assert '<script>alert' not in page and html.unescape(page).count(evil) == 4 # window title, name, skipped, versions
    assert '<script>' not in text and text.count(escape_markdown(evil)) == 3 and r'\<b\>\|evil\|' in text


def test_a_diverged_run_is_reported_as_such(study, tmp_path):
    out = copy_of(study, tmp_path/'out')
    f = out/'source0/seed0/naive_nobn/weights.npz'
    r = Recording.load(f)
    nan = {n: np.full(getattr(r, n).shape, np.nan) for n in ('loss', 'valid_loss', 'var', 'mean')}
    counts = dict(hist=np.zeros_like(r.hist), under=0*r.under, over=0*r.over, nonfinite=r.numel)
    replace(r, **nan, **counts).save(f)
    page = write_report(out).read_text()
    assert page.count('data:image/png;base64,') >= PICTURES-2 and 'not a number' in page and 'naive_nobn' in page


def test_an_accuracy_of_nan_is_counted_and_never_left_out_silently(eight):
    f = eight/'source0/seed3/naive_bn/run.json'
    epochs = json.loads(f.read_text())['epochs']
    update_json(f, epochs=[*epochs[:-1], {**epochs[-1], 'accuracy': float('nan')}])
    text = markdown(eight)
    row = next(l for l in text.splitlines() if l.startswith('| `naive_bn` |'))
    assert '| 16 |' in row and '; 1 of 16 not a number)' in row and '%' in row.split('|')[6]
    assert 'mean of 15 runs' in text and 'not a number' in next(l for l in text.splitlines() if 'accuracy, deleted' in l)


@pytest.mark.parametrize('values, text', [
    ([], 'not run'), ([.5], '0.5'), ([np.nan], 'not a number'), ([1, 3], '2 (mean of 2 runs, 1 to 3)'),
    ([1, np.nan, 3], '2 (mean of 2 runs, 1 to 3; 1 of 3 not a number)'), ([np.inf, 1], '1 (mean of 1 runs, 1 to 1; 1 of 2 not a number)'),
    ([np.nan]*2, 'not a number in all 2 runs')])
def test_numbers_of_runs_that_diverged(values, text):
    assert over_runs(values) == text
    assert _brief(values, num) == ('–' if not values else 'not a number' if not np.isfinite(values).any() else
                                   text.replace('mean of 2 runs, ', '').replace('mean of 1 runs, 1 to 1; ', ''))


def test_a_run_that_is_not_whole_is_named_by_the_report(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(R, 'draw_figures', lambda folder: {})
    out = copy_of(study, tmp_path/'out')
    run = run_dir(out, 'naive_fold')
    (run/'run.json').unlink()
    write_report(out)
    assert f'{run} is not whole: run.json is missing. Repeat the bnstats-study command' in capsys.readouterr().err
    assert '`naive_fold`' not in (out/'report.md').read_text().split('## Arms')[1].split('##')[0]


def test_loading_refuses(study, tmp_path):
    with pytest.raises(ValueError, match='weights, gradients, updates, outputs. Found quantity='): load_study(study, quantity='x')
    with pytest.raises(FileNotFoundError, match='holds no study'): write_report(tmp_path)
    assert sources(study) == [0] and run_dir(study, 'pretrained').name == 'pretrained'
    assert load_run(study, 'pretrained', quantity='outputs') is None
    assert list(load_study(study, seeds=[5])) == ['pretrained'][:0]


def test_the_page_in_a_browser(study, browser):
    page = browser.new_page()
    errors, urls = [], []
    page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('request', lambda r: urls.append(r.url))
    page.goto((study/'report.html').as_uri())
    assert page.locator('#verdicts').is_visible() and page.locator('.verdict').first.is_visible()
    def overflow(): return page.evaluate('document.documentElement.scrollWidth-document.documentElement.clientWidth')
    assert overflow() <= 0
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
    colours = []
    for scheme in ('light', 'dark'):
        page.emulate_media(color_scheme=scheme)
        colours.append(page.evaluate('getComputedStyle(document.body).color'))
    assert colours[0] != colours[1]
    page.emulate_media(media='print')
    assert not page.locator('nav').is_visible() and page.locator('table').first.is_visible()
    page.set_viewport_size(dict(width=400, height=800))
    page.emulate_media(media='screen')
    assert overflow() <= 0
    assert not errors and all(u.startswith(('file:', 'data:', 'blob:')) for u in urls)
    page.close()
