"""Does a verdict depend on one seed, or on the scale of the weights?"""
import math

import pytest
from test_claims import table as invented

from fastai_bnstats.study.claims import CLAIMS, raw_contrasts
from fastai_bnstats.study.readings import READINGS
from fastai_bnstats.study.report_blocks import Heading, to_markdown
from fastai_bnstats.study.sensitivity import leave_one_out, sensitivity_table
from fastai_bnstats.study.verdicts import judge


def test_without_a_seed_is_a_study_that_never_had_it():
    t = invented(n=11, noise=.3, error_odds__naive_nobn=1.6)
    left = leave_one_out(t, CLAIMS)
    for s in range(11):
        for r, row in zip(judge([x for x in t if x['seed'] != s], CLAIMS), left, strict=True):
            for p, l in zip(r.parts, row, strict=True):
                assert l.effects[s] == p.result.effect and l.verdicts[s] == p.verdict
    assert [[l.part.verdict for l in row] for row in left] == [[p.verdict for p in r.parts] for r in judge(t, CLAIMS)]
    assert any(l.changed for row in left for l in row), 'the noise should let one seed decide something'


def test_units_are_kept():
    t = invented(n=12, sources=12)
    units = {s: (s,) for s in range(10)}
    left = leave_one_out(t, CLAIMS[:1], units)[0][0]
    assert sorted(left.effects) == [*range(10)] and left.part.result.n == 10
    some = [r for r in t if r['source'] == r['seed'] != 3 and r['seed'] < 10]
    assert left.effects[3] == judge(some, CLAIMS[:1])[0].parts[0].result.effect


def test_where_a_reading_is_not_defined_or_runs_diverged_there_is_no_range():
    t = [r for r in invented(n=12) if r['arm'] != 'naive_fold']
    for r in t:
        if r['seed'] == 3 and r['arm'] == 'naive_nobn': r['roughness'] = math.nan
        if r['seed'] == 5 and r['arm'] == 'freeze': r |= dict(diverged='the loss is not finite', loss_var=math.inf)
    left = leave_one_out(t, CLAIMS)
    rough, folded, outputs, _ = left[2]
    assert rough.effects == folded.effects == {} and sorted(outputs.effects) == [*range(12)]
    assert rough.part.verdict == 'undecided' and rough.changed == {3: 'negligible'} and folded.changed == {}
    text = to_markdown([Heading('T', 1), sensitivity_table(left[2], CLAIMS[2], t)])
    rows = [[c.strip() for c in l.split('|')[3:6]] for l in text.splitlines() if 'weights | `naive' in l]
    assert rows[:2] == [['not defined in 1 of 12 seeds', '–', '3 (negligible)'], ['–', '–', 'none']]
    ranks = left[3][0]
    assert ranks.part.result.scale == 'rank' and ranks.effects == {} # without seed 5 it would be a ratio
    text = to_markdown([Heading('T', 1), sensitivity_table(left[3], CLAIMS[3], t)])
    row = next(l for l in text.splitlines() if l.startswith('| variability of the log training loss'))
    assert 'ranks, because runs diverged; the other 11 seeds: 0.99' in row and row.split('|')[4].strip() == '–'


def test_raw_readings_stand_below_the_others():
    t = invented(n=12, noise=.01, roughness_raw__naive_nobn=7, displacement_body_raw__freeze=3)
    for i, reading, effect in ((2, 'roughness_raw', 7), (4, 'displacement_body_raw', 3)):
        claim = CLAIMS[i]
        text = to_markdown([Heading('T', 1), sensitivity_table(leave_one_out(t, CLAIMS)[i], claim, t)])
        rows = [[c.strip() for c in l.split('|')[1:-1]] for l in text.splitlines() if l.startswith('|')][2:]
        assert len(rows) == len(claim.parts)+len(raw_contrasts(claim))
        assert [r[0] for r in rows] == [c.what for c in (*claim.parts, *raw_contrasts(claim))]
        assert [r[3:] for r in rows[len(claim.parts):]] == [['–', 'no verdict']]*len(raw_contrasts(claim))
        found = next(r for r in rows if r[0] == READINGS[reading].label)
        assert float(found[2].split()[0]) == pytest.approx(effect, rel=.02)
        assert [float(x) for x in rows[0][3].split(' to ')] == pytest.approx([1, 1], abs=.02)


def test_too_few_seeds_for_a_verdict_without_one_of_them():
    t = invented(n=10, error_odds__naive_nobn=4)
    left, = leave_one_out(t, CLAIMS)[0][:1]
    assert left.part.verdict == 'supported' and {*left.verdicts.values()} == {''} and left.changed == {}
    text = to_markdown([Heading('T', 1), sensitivity_table([left], CLAIMS[0], t)])
    assert text.rstrip().endswith('| too few seeds are left |')
