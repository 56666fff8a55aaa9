"""Every verdict, effect and interval of the README and the pages of the claims follows from the committed result files"""
import json
import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from fastai_bnstats.study.claims import AA, CHECKS, CLAIMS, GRID_CLAIMS, LANDSCAPE_CLAIMS
from fastai_bnstats.study.report_blocks import to_markdown
from fastai_bnstats.study.report_landscape import forms_table
from fastai_bnstats.study.report_tables import claim_table, effect_text, predicted_text
from fastai_bnstats.study.results import run_file, run_folders, sources, study_about, sweep_dir
from fastai_bnstats.study.sweep import sweep_runs, sweep_scores
from fastai_bnstats.study.verdicts import VERDICTS, aa_table, judge, judge_study, missing_runs, reading_values, study_table, study_units

ROOT = Path(__file__).parent.parent.parent
DIGITS = ROOT/'results/digits'
README = (ROOT/'README.md').read_text()
*PAGES, SMOOTHNESS = sorted((ROOT/'nbs/claims').glob('*.ipynb'))
LANDSCAPE = ROOT/'results/landscape'
PHOTOGRAPHS = ROOT/'results/photographs'
DESIGN = '205f8990f73848dfdde01dab78bc93db69677822dc193384b28fa4e3138d284c' # SHA-256, committed before the first run


@pytest.fixture(scope='module')
def results(): return judge_study(DIGITS)


@pytest.fixture(scope='module')
def table(): return study_table(DIGITS)


def readme_rows(results):
    "The rows of the README's table; the two ways to remove batch norm share a line"
    def lines(r):
        found = {}
        for p in r.parts:
            label, _, way = p.contrast.label.rpartition(', ')
            if way not in ('deleted', 'folded'): label, way = p.contrast.label, ''
            found.setdefault(label, []).append(f'{way} {effect_text(p)}'.strip())
        return '<br>'.join(f"{label}: {', '.join(effects)}" for label, effects in found.items())
    return [f'| ({r.claim.key}) {r.claim.title} | {lines(r)} | {r.verdict} |' for r in results]


def in_short(results):
    keys = {v: [f'({r.claim.key})' for r in results if r.verdict == v] for v in VERDICTS}
    return '; '.join(f"{v}: {', '.join(k)}" for v, k in keys.items() if k)


def test_the_table_of_the_readme(results):
    rows = [l for l in README.splitlines() if re.match(r'\| \([a-e]\) ', l)]
    assert rows == readme_rows(results)
    assert f'In short: {in_short(results)}.' in README.replace('\n', ' ')


def test_the_numbers_below_the_table(table):
    about = study_about(DIGITS)
    compared = [r for r in table if (r['source'],) == study_units(about).get(r['seed'])]
    first = {a: np.median(reading_values(compared, a, 'first_loss')) for a in ('naive_nobn', 'naive_bn', 'naive_fold')}
    sentence = 'the median first loss is {naive_nobn:,.0f}, against {naive_bn:.1f} with batch norm and {naive_fold:.1f}'.format(**first)
    assert sentence in (ROOT/'nbs/guides/06_study.ipynb').read_text()
    assert len({r['seed'] for r in compared}) == 10 and about['args']['paired_sources']
    assert 'Ten seeds, each with its own pretrained network' in README
    assert not any(r['diverged'] for r in table) and 'no run diverged' in README


def test_the_control_that_the_readme_mentions(table):
    about = study_about(DIGITS)
    parts = [p for r in judge(aa_table(table, about['aa']), AA, study_units(about)) for p in r.parts]
    assert about['aa'] == 9 and not missing_runs(about, table)
    assert all(p.result.n == 9 and p.verdict in ('negligible', 'undecided') for p in parts)
    assert 'an arm compared with itself on other seeds shows no difference' in README
    transfer, half = judge_study(DIGITS, CHECKS)
    effect = effect_text(transfer.parts[0])
    assert half.verdict == 'supported' and transfer.verdict == 'undecided'
    assert 'A check that must find a difference finds it: with half the learning rates, weights change less.' in README
    assert 'That pretraining helps is not shown' in README
    assert f'the odds of an error change by {effect} without it' in README


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_the_tables_on_the_pages_of_the_claims(page, results, table):
    claims = [*results, *judge_study(DIGITS, CHECKS)]
    want = [to_markdown([claim_table(r, table, study_units(study_about(DIGITS)))]) for r in claims]
    outputs = [o for c in json.loads(page.read_text())['cells'] for o in c.get('outputs', [])]
    shown = [''.join(o['data']['text/markdown']) for o in outputs if 'text/markdown' in o.get('data', {})]
    assert shown and all(s in want for s in shown) and shown[0] == want[PAGES.index(page)]
    printed = ''.join(''.join(o.get('text', '')) for o in outputs)
    r = results[PAGES.index(page)]
    assert f'({r.claim.key}) {r.claim.title}: {r.verdict}' in printed


def test_the_smoothness_of_the_loss():
    "The page about claims (f) and (g), and the sentence of the README"
    table, about = study_table(LANDSCAPE), study_about(LANDSCAPE)
    units, results = study_units(about), judge_study(LANDSCAPE, LANDSCAPE_CLAIMS)
    want = [to_markdown([t]) for t in (*(claim_table(r, table, units) for r in results), forms_table(table, units))]
    outputs = [o for c in json.loads(SMOOTHNESS.read_text())['cells'] for o in c.get('outputs', [])]
    assert [''.join(o['data']['text/markdown']) for o in outputs if 'text/markdown' in o.get('data', {})] == want
    printed = ''.join(''.join(o.get('text', '')) for o in outputs)
    assert all(f'({r.claim.key}) {r.claim.title}: {r.verdict}\n' in printed and r.verdict == 'supported' for r in results)
    assert 'Nine seeds, with the loss probed during the training, support both' in README
    assert [len(units), about['args']['landscape'], about['args']['paired_sources']] == [9, 4, True] and not missing_runs(about, table)
    assert len(table) == 45 and not any(r['diverged'] for r in table)
    files = [f for f in LANDSCAPE.rglob('*') if f.is_file()]
    assert len(files) == 55 and {f.suffix for f in files} == {'.json'} and max(f.stat().st_size for f in files) < 20_000


def test_the_numbers_on_the_page_about_smoothness():
    table = study_table(LANDSCAPE)
    def mean(arm, reading): return np.exp(np.log(reading_values(table, arm, reading)).mean())
    text = ''.join(''.join(c['source']) for c in json.loads(SMOOTHNESS.read_text())['cells'] if c['cell_type'] == 'markdown')
    fold, bn = ([mean(arm, f'land_{r}') for r in ('turn', 'critical', 'beta_rel')] for arm in ('naive_fold', 'naive_bn'))
    assert f'(a turn of {fold[0]:.2f})' in text and f'keeps its direction ({bn[0]:.2f})' in text
    assert f'from a step of {fold[1]:.1%} of the length' in text and f'with batch norm, from {bn[1]:.1%}' in text
    assert 'Relative β is five times as large' in text and round(fold[2]/bn[2]) == 5


def test_the_design_says_what_is_compared():
    "Each part of each claim has its line, with the arms, the reading, the scale, the margin and the direction"
    text = (PHOTOGRAPHS/'design.md').read_text()
    def line(c, p):
        a, b = (' and '.join(f'`{x}`' for x in ([side] if isinstance(side, str) else side)) for side in (p.a, p.b))
        low, high = (f'{x:.3g}' for x in p.margin)
        return f"| ({c.key}) {p.label} | {a} / {b} | {p.what} | {p.scale}, {low} to {high} | {predicted_text(p, c.direction)} |"
    lines = [l for l in text.splitlines() if l.startswith('| (')]
    assert lines == [line(c, p) for c in CLAIMS+LANDSCAPE_CLAIMS+GRID_CLAIMS for p in c.parts]
    assert sha256(text.encode()).hexdigest() == DESIGN


def test_each_claim_has_a_page(): assert len(PAGES) == len(CLAIMS)


def test_no_other_page_publishes_a_verdict_of_the_study():
    "Elsewhere, verdicts stand only in examples with invented or tiny studies"
    for nb in [ROOT/'nbs/index.ipynb', *(ROOT/'nbs/guides').glob('*.ipynb'), *(ROOT/'nbs/tutorials').glob('*.ipynb')]:
        text = ''.join(''.join(c['source']) for c in json.loads(nb.read_text())['cells'] if c['cell_type'] == 'markdown')
        assert not re.search(r'\([a-e]\)[^.|]* (is|are) (supported|contradicted|negligible|undecided)', text), nb


def test_the_result_files_are_small_whole_and_agree(table):
    about = study_about(DIGITS)
    folders = [d for root in (DIGITS, sweep_dir(DIGITS)) for k in sources(root) for d in run_folders(root, k)]
    assert len(folders) == 167 and {p.suffix for p in DIGITS.rglob('*') if p.is_file()} == {'.json'}
    for f in map(run_file, folders):
        run = json.loads(f.read_text())
        assert f.stat().st_size < 20_000 and run['data'] == about['about']['digest'] and run['args'] == about['args'], f
    assert len(table) == 99 and {tuple(map(len, by.values())) for by in sweep_scores(sweep_runs(DIGITS)).values()} == {(2, 2, 2, 2)}
    assert all(r['farthest'] == 0 for r in table if r['arm'] == 'naive_bn_lr0')
