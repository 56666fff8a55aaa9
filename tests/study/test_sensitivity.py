"""Does a verdict depend on one seed, or on the scale of the weights?"""
import math

import pytest
from test_claims import table as invented

from fastai_bnstats.compare import paired_test
from fastai_bnstats.study.claims import CLAIMS, LANDSCAPE_CLAIMS, raw_contrasts
from fastai_bnstats.study.report_blocks import Heading, to_markdown
from fastai_bnstats.study.sensitivity import leave_one_out, raw_results, sensitivity_table
from fastai_bnstats.study.verdicts import judge


def test_without_a_seed_is_a_study_that_never_had_it():
    t = invented(n=11, noise=.3, error_odds__naive_nobn=1.6)
    left = leave_one_out(t, CLAIMS)
    for s in range(11):
        for r, row in zip(judge([x for x in t if x['seed'] != s], CLAIMS), left, strict=True):
            for p, l in zip(r.parts, row, strict=True):
                assert l.effects[s] == p.result.effect and l.verdicts[s] == p.verdict
                assert l.extent[0] <= p.result.effect <= l.extent[1]
    assert [[l.part.verdict for l in row] for row in left] == [[p.verdict for p in r.parts] for r in judge(t, CLAIMS)]
    assert any(l.deciding for row in left for l in row), 'the noise should let one seed decide something'


def test_units_are_kept():
    t = invented(n=12, sources=12)
    units = {s: (s,) for s in range(10)}
    left = leave_one_out(t, CLAIMS[:1], units)[0][0]
    assert sorted(left.effects) == [*range(10)] and left.part.result.n == 10
    some = [r for r in t if r['source'] == r['seed'] != 3 and r['seed'] < 10]
    assert left.effects[3] == judge(some, CLAIMS[:1])[0].parts[0].result.effect


def test_runs_that_diverged_or_are_missing_have_no_extent():
    t = [r for r in invented(n=10) if r['arm'] != 'naive_fold']
    for r in t:
        if r['arm'] == 'naive_nobn': r['roughness'] = math.nan
    rows = leave_one_out(t, CLAIMS)
    assert [math.isnan(l.extent[0]) for l in rows[2]] == [True, True, False, True]
    text = to_markdown([Heading('T', 1), sensitivity_table(judge(t, CLAIMS)[2], rows[2], t)])
    assert '| roughness, weights, folded | – | – | – | – |' in text and 'not defined in 10 of 10 seeds | –' in text


def test_raw_readings_stand_beside_the_others():
    t = invented(n=10, noise=.01, roughness_raw__naive_nobn=7)
    claim = CLAIMS[2]
    results = raw_results(claim, t)
    assert [c for c, _ in results] == [*raw_contrasts(claim)]
    def values(arm): return {r['seed']: r['roughness_raw'] for r in t if r['arm'] == arm}
    assert results[0][1].effect == paired_test(values('naive_nobn'), values('naive_bn')).effect == pytest.approx(7, rel=.02)
    text = to_markdown([Heading('T', 1), sensitivity_table(judge(t, CLAIMS)[2], leave_one_out(t, CLAIMS)[2], t)])
    row = next(l for l in text.splitlines() if l.startswith('| roughness, weights, deleted')).split(' | ')
    assert row[1].startswith(('1.0', '0.99')) and row[4].startswith(('7.0', '6.9'))
    assert [float(x) for x in row[2].split(' to ')] == pytest.approx([1, 1], abs=.02)
    assert raw_results(CLAIMS[0], t) == []
    assert raw_results(LANDSCAPE_CLAIMS[0], []) == [(c, None) for c in raw_contrasts(LANDSCAPE_CLAIMS[0])]


def test_too_few_seeds_for_a_verdict_without_one_of_them():
    t = invented(n=10, error_odds__naive_nobn=4)
    left, = leave_one_out(t, CLAIMS)[0][:1]
    assert left.part.verdict == 'supported' and {*left.verdicts.values()} == {''} and left.deciding == {}
    text = to_markdown([Heading('T', 1), sensitivity_table(judge(t, CLAIMS)[0], [left], t)])
    assert [w.strip() for w in text.splitlines()[-1].split('|')][4] == '–'
