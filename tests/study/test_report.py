"""The report of a study: its numbers agree with NumPy, its HTML with its Markdown, and it works in a real browser"""
import csv
import html
import json
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from forks import command, run
from test_claims import table as invented
from test_verdicts import diverge

from fastai_bnstats.compare import holm
from fastai_bnstats.study import report as R
from fastai_bnstats.recording import Recording
from fastai_bnstats.study.arms import GRID, POST_ARMS
from fastai_bnstats.study.captions import num, over_runs
from fastai_bnstats.study.claims import CHECKS, CLAIMS, GRID_CLAIMS
from fastai_bnstats.study.readings import READINGS
from fastai_bnstats.study.report_tables import brief, chance_text, detectable_text, divergence_table, effect_text
from fastai_bnstats.study.report_headline import headline
from fastai_bnstats.study.report_text import checks_section, control_section, policy_section, report_blocks, sweep_section
from fastai_bnstats.study.report_words import DIFFERENT, FAIR, HOW, HOW_FEW
from fastai_bnstats.study.merge import copy_results
from fastai_bnstats.study.verdicts import judge, study_table, study_units
from fastai_bnstats.study.report_blocks import Heading, escape_markdown, plain, to_markdown
from fastai_bnstats.study.figures import FIGURES
from fastai_bnstats.study.report import report_html, write_report
from fastai_bnstats.study.results import load_run, load_study, run_dir, sources, study_about

PICTURES = 16 # the overview, 14 figures, and the picture of the claims
PHRASES = ('Measured here:', 'Batch Norm has a clear smoothing effect', 'One seed shows what happened once',
           'still has 6 batch norm layers', 'torch', 'One source checkpoint')


def copy_of(study, out): return Path(shutil.copytree(study, out))


def update_json(file, **values): file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_the_page_is_complete_and_self_contained(study):
    page, text = (study/'report.html').read_text(), (study/'report.md').read_text()
    assert page.count('data:image/png;base64,') == PICTURES and 'http://' not in page and 'https://' not in page
    for c in CLAIMS: assert f'({c.key}) {c.title}' in page and escape_markdown(c.title) in text
    for arm in POST_ARMS: assert f'<code>{arm}</code>' in page and f'`{arm}`' in text
    for phrase in PHRASES: assert phrase in page and phrase in text
    assert page.count('class="closer"') == 8
    assert set(re.findall(r'!\[[^\]]*\]\(([^)]+)\)', text)) == {p.name for p in study.glob('*.png')} # every picture exists
    assert [f for f in FIGURES if f'href="#fig{f}"' in page] == [f for f in FIGURES if f'id="fig{f}"' in page] == list(FIGURES)
    sections = [*(f'id="fig{n}"' for n in range(1, 10)), 'More figures', 'id="fig1g"', 'Readings</h2>']
    places = [page.index(x, page.index('</nav>')) for x in sections]
    assert places == sorted(places)
    assert page.count('class="measured"') == len(FIGURES) and page.count('<blockquote>') == len(FIGURES)+len(CLAIMS)
    assert set(FAIR) == {c.key for c in CLAIMS} and HOW_FEW == [p for p in HOW if p in HOW_FEW]
    for words in HOW_FEW+DIFFERENT: assert words[-1].words in html.unescape(page) # the last words of each paragraph


def test_few_seeds_begin_with_what_they_show(study):
    text = (study/'report.md').read_text()
    first, rest = text.split('## The figures')
    run = json.loads((study/'source0/seed0/naive_bn/result.json').read_text())
    loss, accuracy, moved = run['epochs'][-1]['train_loss'], run['epochs'][-1]['accuracy'], run['readings']['moved']
    assert first.index('## What these runs show') < first.index('](overview.png)') < first.index('**Top, Fig. 4.**') < first.index('1 seed')
    assert f'ends at {accuracy:.1%}' in first and f'at least {moved:.1%} of the weights changed bin' in first and '| :--' not in first
    final = run['readings']['final_train']
    assert f"goes from {run['readings']['first_loss']:.3g} to {final:.3g}" in first and final == pytest.approx(loss, rel=.2)
    assert '## Readings' in rest and '95% interval' not in text


def test_many_seeds_begin_with_the_verdicts(ten):
    text = markdown(ten)
    assert text.index('## Verdicts') < text.index('## The figures') and 'What these runs show' not in text


def test_without_naive_bn_another_arm_is_shown(study, tmp_path, monkeypatch):
    monkeypatch.setattr(R, 'draw_figures', lambda folder: {}) # slow, and tested above
    out = copy_of(study, tmp_path/'out')
    shutil.rmtree(out/'source0/seed0/naive_bn')
    write_report(out)
    text = (out/'report.md').read_text()
    assert '**The arm** `freeze_non_bn`. **Top, the loss.**' in text and (out/'overview.png').exists()


def test_the_overview_shows_an_arm_that_did_not_diverge(study, tmp_path, monkeypatch):
    monkeypatch.setattr(R, 'draw_figures', lambda folder: {})
    out = copy_of(study, tmp_path/'out')
    update_json(out/'source0/seed0/naive_bn/result.json', diverged='a validation loss is not finite')
    write_report(out)
    assert '**The arm** `freeze_non_bn`.' in (out/'report.md').read_text()
    for arm in ('freeze_non_bn', 'freeze', 'naive_fold', 'naive_nobn'): shutil.rmtree(out/'source0/seed0'/arm)
    write_report(out)
    text = (out/'report.md').read_text().split('## The figures')[0]
    assert '**The arm** `naive_bn`.' in text and 'This run diverged: a validation loss is not finite.' in text
    assert 'not defined' not in text and (out/'overview.png').exists()


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


def test_below_the_number_of_seeds_that_can_decide_there_is_no_p_and_no_verdict(study):
    text = (study/'report.md').read_text()
    assert '**1 seed: readings, no verdicts.**' in text and 'take at least 10 seeds (`--seeds 10`)' in text
    assert not re.search(r'\| (p|p .*|verdict|would find) \|', text) and '## Verdicts' not in text and '## Readings' in text
    assert not re.search(r'supported|contradicted|negligible|undecided|p value|significant ', text)
    assert 'class="verdict' not in (study/'report.html').read_text()


def test_all_readings_are_saved(study):
    with (study/'measures.csv').open() as f: rows = list(csv.DictReader(f))
    table = study_table(study)
    assert len(rows) == len(table) == 5
    for row in zip(rows, table):
        saved, computed = ([float(r[k]) for k in READINGS] for r in row)
        np.testing.assert_array_equal(saved, computed)


def test_a_report_is_drawn_again_without_training(study, tmp_path):
    out = copy_of(study, tmp_path/'copy')
    for name in ('report.html', 'fig5.png'): (out/name).unlink()
    printed = run(command, 'bnstats-report', out).stdout
    assert 'report.html' in printed and (out/'fig5.png').stat().st_size > 10_000
    assert (out/'report.md').read_text() == (study/'report.md').read_text()


@pytest.fixture
def ten(study, tmp_path):
    "Results of the study's runs, which look like ten seeds of all arms from two sources"
    out, rng = tmp_path/'ten', np.random.default_rng(0)
    copy_results(study, out)
    shutil.copytree(out/'source0', out/'source1')
    for k, s, a in product(range(2), range(1, 10), POST_ARMS): copy_of(study/'source0/seed0'/a, out/f'source{k}/seed{s}'/a)
    update_json(out/'source1/pretrained/result.json', source=1)
    for f in out.glob('source*/seed*/*/result.json'):
        run, (source, seed, arm, _) = json.loads(f.read_text()), f.relative_to(out).parts
        odds = (4 if arm == 'naive_nobn' else 1)*.05*np.exp(.1*rng.normal())
        update_json(f, source=int(source[6:]), seed=int(seed[4:]), readings={**run['readings'], 'error_odds': float(odds)})
        for r in f.parent.glob('*.npz'): r.unlink()
    update_json(out/'study.json', seeds=10, sources=2)
    return out


def test_many_seeds_and_sources(ten, monkeypatch):
    monkeypatch.setattr(R, 'draw_figures', lambda folder: {}) # slow, and tested above
    write_report(ten)
    text = (ten/'report.md').read_text()
    assert '2 source checkpoints' in text and 'no verdicts' not in text and 'seeds.png' in text
    assert words_of_html((ten/'report.html').read_text()) == words_of_markdown(text)
    line = next(l for l in text.splitlines() if l.startswith('|') and 'odds of an error, deleted' in l)
    assert '✔ supported' in line and '| 10 |' in line
    assert 'The parts of claim (a) do not agree.' in text and 'Claim (a) depends on ' in text
    table = study_table(ten)
    def logs(arm, source): return np.array([np.log(r['error_odds']) for r in table if (r['arm'], r['source']) == (arm, source)])
    ratio = np.exp(np.mean([logs('naive_nobn', k)-logs('naive_bn', k) for k in (0, 1)]))
    assert escape_markdown(f'{ratio:.3g} [') in line
    for arm in ('naive_nobn', 'naive_bn'): # absolute numbers stand beside the ratio
        assert f'| {num(float(np.exp(np.mean([logs(arm, k) for k in (0, 1)]))))} |' in line


ABOUT = dict(args={}, sources=1, names=list(POST_ARMS))
def headlines(table, about=ABOUT, **kw):
    about = dict(about, seeds=about.get('seeds') or 1+max(r['seed'] for r in table))
    return headline(judge(table, units=study_units(about)), table, about, **kw)


def test_the_headline_shows_claims_that_depend_on_how_batch_norm_was_removed():
    def found(words, **kw): return next((p for p in headlines(invented(**kw)) if words in plain(p)), None)
    split = dict(error_odds__naive_nobn=4, error_odds__naive_fold=.2)
    text = found('(a) depends on how batch norm was removed', **split)
    assert text[0].style == 'strong' and [s.words for s in text if s.style == 'verdict'] == ['supported', 'contradicted']
    assert 'odds of an error, deleted against folded: 20.0 [19.5, 20.4]. Deleting it also' in plain(text)
    assert found('The parts of claim (a) do not agree', **split)
    same = dict(error_odds__naive_nobn=4, error_odds__naive_fold=9) # they differ from each other, but not in what they say
    assert not found('depends on how', **same) and not found('do not agree', **same)
    by_reading = dict(roughness__naive_nobn=4, roughness__naive_fold=8, output_roughness__naive_nobn=.1, output_roughness__naive_fold=.2)
    assert found('The parts of claim (c) do not agree', **by_reading) and not found('depends on how', **by_reading)


def test_two_different_verdicts_do_not_show_that_the_two_ways_differ():
    "One way may just miss what the other finds"
    results = judge(invented(error_odds__naive_nobn=1.8, error_odds__naive_fold=1.6, noise=.25, seed=1))
    a = results[0]
    assert {p.verdict for p in a.parts} == {'supported', 'undecided'} and a.between[0].p > .05 and not a.depends
    clear = judge(invented(error_odds__naive_nobn=4))[0]
    assert clear.depends == clear.between and clear.between[0].p < .05
    raw = [b.result.p for r in results for b in r.between]
    assert [b.p for r in results for b in r.between] == holm(raw).tolist()


def test_the_headline_says_how_many_seeds_are_needed():
    few = [plain(p) for p in headlines(invented(9))]
    assert any(p.startswith('9 seeds: readings, no verdicts. Verdicts on 14 comparisons take at least 10 seeds (--seeds 10).') for p in few)
    assert not any('seeds: readings' in p for p in map(plain, headlines(invented(10))))
    two = [plain(p) for p in headlines(invented(2), pretrained=[dict(source=k, diverged='') for k in range(3)])]
    assert '3 source checkpoints' in two[-1] and '--paired-sources' in two[-1]
    paired = dict(args=dict(paired_sources=True), seeds=2, sources=2)
    assert 'One source checkpoint for each seed' in plain(headlines(invented(2), paired)[-1])


@pytest.mark.slow
def test_the_headline_counts_seeds_for_all_numbers_of_finished_runs():
    pairs = [('naive_nobn', 'naive_bn'), ('naive_fold', 'naive_bn'), ('freeze', 'freeze_non_bn')]
    for n, dropped in product((1, 2, 10), product((0, 1, 99), repeat=5)):
        rows = [r for r in invented(n) if r['seed'] < n-dict(zip(POST_ARMS, dropped))[r['arm']]] # the last seeds are not finished
        done = {a: sum(r['arm'] == a for r in rows) for a in POST_ARMS}
        most = max(min(done[a], done[b]) for a, b in pairs)
        if not rows: continue
        text = ' '.join(map(plain, headlines(rows)))
        expected = {0: 'No verdict is possible: there is no seed with all the arms that a claim compares',
                    1: '1 seed: readings, no verdicts. One seed shows what happened once', 10: 'In short'}
        assert expected.get(most, f'{most} seeds: readings') in text and '0 seeds:' not in text.replace('10 seeds', ''), (done, text)


def test_missing_runs_are_named():
    rows = [r for r in invented(11) if (r['seed'], r['arm']) not in ((4, 'naive_bn'), (5, 'freeze'))]
    text = ' '.join(map(plain, headlines(rows)))
    assert 'Missing: naive_bn (seed 4, source 0), freeze (seed 5, source 0). Seeds with a missing run are left out' in text
    many = ' '.join(map(plain, headlines([r for r in invented(30) if r['arm'] != 'freeze' or r['seed'] < 10])))
    assert 'and 8 more' in many and 'Missing' not in ' '.join(map(plain, headlines(invented(10))))
    some = ' '.join(map(plain, headlines([r for r in rows if r['arm'] != 'naive_fold'], dict(ABOUT, names=['naive_nobn', 'naive_bn']))))
    assert 'Not part of this study: freeze, freeze_non_bn, naive_fold, which claims need. Add them with --arms.' in some
    assert 'naive_fold (seed' not in some and 'Missing: naive_bn (seed 4, source 0). ' in some
    again = dict(ABOUT, names=['scratch_bn', *POST_ARMS], aa=2) # arms and seeds that no claim needs are named too
    text = ' '.join(map(plain, headlines(invented(2), again)))
    assert 'scratch_bn (seed 0, source 0), scratch_bn (seed 1, source 0), naive_bn (seed 2, source 0), naive_bn (seed 3, source 0)' in text


def control_lines(t, arms):
    return [plain(p) for p in headlines(t, dict(ABOUT, names=arms), checks=judge(t, CHECKS)) if 'ontrol' in plain(p)]


def test_the_headline_says_what_the_controls_have_shown():
    arms = [*POST_ARMS, 'scratch_bn', 'freeze_lr_half']
    half = dict(moved_since_freeze__freeze_lr_half=.5, angle_body__freeze_lr_half=.5)
    assert control_lines(invented(arms=arms, **half), arms) == [
        'Controls: Pretrained weights help: ≈ negligible; Half the learning rates show: ✔ supported.']
    blind = control_lines(invented(arms=arms), arms)
    assert 'Half the learning rates show: ≈ negligible' in blind[0] and blind[1].startswith('(e) is negligible, but no control has shown')
    assert control_lines(invented(), POST_ARMS)[0].startswith('(e) is negligible, but no control has shown')
    assert control_lines(invented(angle_body__freeze=2, moved_since_freeze__freeze=2), POST_ARMS) == []


def test_divergence_stands_first():
    each = 'In each arm, with the exact 95% interval of the chance: 0 of 10 (0% to 31%)'
    assert plain(headlines(invented(10))[0]) == f'No run diverged, of 50 runs on the target. {each}.'
    more = [r for r in invented(20) if r['arm'] == 'naive_bn' or r['seed'] < 10]
    assert plain(headlines(more, dict(ABOUT, seeds=10))[0]).endswith(f'{each} or 0 of 20 (0% to 17%).')
    rows = diverge(diverge(invented(10), [1, 4], 'freeze'), [0], 'naive_bn')
    assert plain(headlines(rows)[0]) == ('Runs that diverged, with the exact 95% interval of the chance: naive_bn: 1 of 10 (0% to 45%); '
                                         'freeze: 2 of 10 (3% to 56%).')
    sources = [dict(source=k, diverged='the loss is not finite' if k == 1 else '') for k in range(2)]
    crossed = plain(headlines(rows, pretrained=sources)[0]) # runs that share a source are not independent
    assert crossed.startswith('Runs that diverged: naive_bn: 1 of 10; freeze: 2 of 10.')
    assert crossed.endswith('Pretraining diverged too: source 1. All runs that start from it are suspect.')
    assert chance_text(8, 8) == '8 of 8 (63% to 100%)'
    table = to_markdown([Heading('T', 1), divergence_table(rows)])
    assert 'the loss of minibatch 3 of 90 is not finite' in table and '| `naive_nobn` | 0 of 10' in table
    results = judge(rows)
    loss = next(p for r in results for p in r.parts if p.contrast.reading == 'loss_var')
    assert effect_text(loss).startswith('ranks, because runs diverged; the other 8 seeds: ') and detectable_text(loss.result) == '–'
    angle = next(p for r in results for p in r.parts if p.contrast.reading == 'angle_body')
    assert effect_text(angle) == 'not defined in 2 of 10 seeds'


def test_a_study_of_one_arm_has_a_headline_without_a_number_of_seeds(study, tmp_path):
    out = copy_of(study, tmp_path/'out')
    for arm in POST_ARMS:
        if arm != 'naive_bn': shutil.rmtree(run_dir(out, arm))
    text = markdown(out)
    assert 'Number of runs on the target: 1 (seed 0)' in text and '**No verdict is possible:**' in text and '0 seeds' not in text
    gone = text[text.index('**Missing:**'):].split('.')[0]
    assert all(f'{arm} (seed 0, source 0)'.replace('_', r'\_') in gone for arm in POST_ARMS if arm != 'naive_bn')


def markdown(folder):
    table = study_table(folder)
    return to_markdown(report_blocks(folder, table, judge(table, units=study_units(study_about(folder)))))


def test_the_control_has_a_section(ten):
    update_json(ten/'study.json', aa=4)
    text = markdown(ten)
    part = text[text.index('### Control: the same arm twice'):text.index('## Arms')]
    assert '`naive_bn` with seeds 4 to 7 is compared with `naive_bn` with seeds 0 to 3' in part
    assert 'There are too few seeds for a test.' in part and 'adjusted p' not in part and 'undecided' not in part
    update_json(ten/'study.json', aa=10)
    assert 'These runs are not finished.' in markdown(ten)


def control(t): return to_markdown([Heading('T', 1), *control_section([{**r, 'arm': 'naive_bn'} for r in t if r['arm'] == 'naive_bn'], 10)])


def test_the_control_speaks_of_luck():
    luck = 'By luck alone, {} in at most 5% of such controls.'
    assert f"No reading is different. {luck.format('at least one would be called different')}" in control(invented(20))
    text = control([{**r, 'error_odds': r['error_odds']*(1+(r['seed'] >= 10))} for r in invented(20)])
    assert f"**1 of 8 readings are different.** {luck.format('this happens')}" in text
    assert 'do not rely on the verdicts above' in text and text.count('✘ different') == 1 and 'supported' not in text


def test_the_checks_have_a_section():
    arms = 'scratch_bn', 'scratch_nobn', 'naive_bn', 'freeze', 'freeze_lr_half', 'naive_bn_lr0'
    t = invented(arms=arms, error_odds__scratch_bn=5, moved_since_freeze__freeze_lr_half=.5, angle_body__freeze_lr_half=.5)
    for r in t: r['farthest'] = 0. if r['arm'] == 'naive_bn_lr0' else 1.
    text = to_markdown([Heading('T', 1), *checks_section(t, judge(t, CHECKS))])
    assert text.count('✔ supported') == 5 and 'With learning rates of 0, in 10 runs, no parameter moved by one bit.' in text
    t[-1]['farthest'] = .25
    moved = to_markdown([Heading('T', 1), *checks_section(t, judge(t, CHECKS))])
    assert 'the farthest parameter moved by 0.25 of its norm: this is an error' in moved
    weak = invented(arms=arms)
    failed = to_markdown([Heading('T', 1), *checks_section(weak, judge(weak, CHECKS))])
    assert '**This study has not shown that:** Pretrained weights help; Half the learning rates show.' in failed and 'not shown' not in text
    assert checks_section([], judge(invented(), CHECKS)) == []


def test_the_sweep_has_a_section(monkeypatch):
    from fastai_bnstats.study import report_text
    scores = dict(freeze={.1: [.8, .82], 1.: [.9, .92]}, naive_bn={.1: [.7], 1.: [.5]})
    monkeypatch.setattr(report_text, 'sweep_runs', lambda folder: dict(any={}))
    monkeypatch.setattr(report_text, 'sweep_scores', lambda runs: scores)
    epochs = dict(freeze={.1: {100: 4, 101: float('inf')}, 1.: {100: 2, 101: 3}}, naive_bn={1.: {101: 3}})
    monkeypatch.setattr(report_text, 'sweep_epochs', lambda runs: epochs)
    monkeypatch.setattr(report_text, 'is_complete', lambda runs: done)
    done = True
    text = to_markdown([Heading('T', 1), *sweep_section('', [], invented())])
    assert 'at its best learning rates' not in text
    assert 'the accuracy that `naive_bn` has after 3 epochs' in text
    assert '| `freeze` | 4, never | 2, 3 |' in text and '| `naive_bn` | not run, not run | not run, 3 |' in text
    assert '`freeze` ×1, `naive_bn` ×0.1 are best.' in text
    assert 'seeds 100 and 101 and source checkpoints that the comparison does not use' in text
    assert '| `freeze` | 81.0% (80.0% to 82.0%) | **91.0% (90.0% to 92.0%)** |' in text and '**70.0%**' in text
    t = invented(arms=(*POST_ARMS, 'naive_bn@0.1'), noise=.002, **{'roughness__naive_bn@0.1': .25})
    text = to_markdown([Heading('T', 1), *sweep_section('', [], t)])
    row = next(l for l in text.splitlines() if l.startswith('| roughness, weights, deleted'))
    assert '### The claims, with each arm at its best learning rates' in text and 'supported' in row and '| 4.0' in row
    assert '≈ negligible' in next(l for l in text.splitlines() if l.startswith('| odds of an error, deleted'))
    assert 'see `--arms`' not in text
    some = to_markdown([Heading('T', 1), *sweep_section('', [], [r for r in t if r['arm'] != 'naive_fold'])])
    assert '**Missing:** `naive_fold`, see `--arms`.' in some
    done = False
    assert 'at its best' not in to_markdown([Heading('T', 1), *sweep_section('', [], t)]) # the best of half a sweep may not be the best
    done, scores['naive_bn'] = True, {1.: [.5]}
    assert 'So each arm is at its best in the comparison above.' in to_markdown([Heading('T', 1), *sweep_section('', [], t)])
    other = invented(arms=(*POST_ARMS, 'naive_bn@3'), noise=.002)
    assert 'at its best learning' not in to_markdown([Heading('T', 1), *sweep_section('', [], other)])


def test_the_grid_has_a_section():
    t = invented(arms=GRID, noise=.002)
    text = to_markdown([Heading('T', 1), *policy_section(t, judge(t, GRID_CLAIMS))])
    assert '## Which batch norm policy?' in text and text.count('≈ negligible') == 9 # in the text, and for each claim and its part
    rows = [l.split(' | ') for l in text.splitlines() if l.startswith(('| follow', '| held', '| recalibrated'))]
    assert len(rows) == 3 and all(len(r) == 5 and '%' in r[1] and '%' in r[3] for r in rows)
    few = invented(3, arms=GRID)
    assert 'negligible' not in to_markdown([Heading('T', 1), *policy_section(few, judge(few, GRID_CLAIMS))])


def test_text_from_the_data_is_escaped(study, tmp_path):
    out = copy_of(study, tmp_path/'odd')
    about = json.loads((out/'study.json').read_text())
    evil = '<b>|evil|</b> *star* _x_ [a](http) {name} `code` &lt; <script>alert(1)</script>'
    about['about']['name'] = evil
    about['about']['source']['skipped'] = [evil]
    (out/'study.json').write_text(json.dumps(about))
    for f in out.rglob('result.json'): update_json(f, versions={evil: '1'})
    table = study_table(out)
    blocks = report_blocks(out, table, judge(table))
    page, text = report_html(out, blocks), to_markdown(blocks)
    assert '<script>alert' not in page and html.unescape(page).count(evil) == 4 # window title, name, skipped, versions
    assert '<script>' not in text and text.count(escape_markdown(evil)) == 3 and r'\<b\>\|evil\|' in text


def test_a_diverged_run_is_reported_as_such(study, tmp_path):
    out = copy_of(study, tmp_path/'out')
    d = out/'source0/seed0/naive_nobn'
    r = Recording.load(d/'weights.npz')
    nan = {n: np.full(getattr(r, n).shape, np.nan) for n in ('loss', 'valid_loss', 'var', 'mean')}
    counts = dict(hist=np.zeros_like(r.hist), under=0*r.under, over=0*r.over, nonfinite=r.numel)
    replace(r, **nan, **counts).save(d/'weights.npz')
    update_json(d/'result.json', diverged='the loss of minibatch 1 of 8 is not finite',
                readings={k: None for k in READINGS if k != 'accuracy'} | dict(accuracy=.25))
    page = write_report(out).read_text()
    text = (out/'report.md').read_text()
    assert page.count('data:image/png;base64,') >= PICTURES-2
    assert '**Runs that diverged**: ' in text and '`naive_nobn`: 1 of 1' in text and '95% interval' not in text
    assert 'the loss of minibatch 1 of 8 is not finite' in text and 'not defined in 1 of 1 seeds' in text


def test_an_accuracy_of_nan_is_counted_and_never_left_out_silently(ten):
    f = ten/'source0/seed3/naive_bn/result.json'
    update_json(f, readings={**json.loads(f.read_text())['readings'], 'accuracy': None, 'error_odds': None})
    text = markdown(ten)
    row = next(l for l in text.splitlines() if l.startswith('| `naive_bn` |'))
    assert '| 20 |' in row and '; 1 of 20 not defined)' in row and '%' in row.split('|')[6]
    line = next(l for l in text.splitlines() if 'odds of an error, deleted' in l)
    assert 'mean of 19 runs' in text and 'not defined in 1 of 10 seeds' in line


@pytest.mark.parametrize('values, text', [
    ([], 'not run'), ([.5], '0.5'), ([np.nan], 'not defined'), ([1, 3], '2 (mean of 2 runs, 1 to 3)'),
    ([1, np.nan, 3], '2 (mean of 2 runs, 1 to 3; 1 of 3 not defined)'), ([np.inf, 1], '1 (mean of 1 runs, 1 to 1; 1 of 2 not defined)'),
    ([np.nan]*2, 'not defined in all 2 runs')])
def test_numbers_of_runs_that_diverged(values, text):
    assert over_runs(values) == text
    assert brief(values, num) == ('–' if not values else 'not defined' if not np.isfinite(values).any() else
                                   text.replace('mean of 2 runs, ', '').replace('mean of 1 runs, 1 to 1; ', ''))


def test_a_run_that_is_not_whole_is_named_by_the_report(study, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(R, 'draw_figures', lambda folder: {})
    out = copy_of(study, tmp_path/'out')
    run = run_dir(out, 'naive_fold')
    (run/'result.json').unlink()
    write_report(out)
    assert f'{run} is not whole: result.json is missing. Repeat the bnstats-study command' in capsys.readouterr().err
    assert '`naive_fold`' not in (out/'report.md').read_text().split('## Arms')[1].split('##')[0]


def test_loading_refuses(study, tmp_path):
    with pytest.raises(ValueError, match='weights, .*, outputs, output_gradients, landscape, forms. Found quantity='):
        load_study(study, quantity='x')
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
    assert page.locator('#verdicts').is_visible() and page.locator('table').first.is_visible()
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
