"""Verdicts on the claims: from parts to claims, over seeds, with sources, gaps and runs that diverged"""
import csv
import itertools
import math

import numpy as np
import pytest
from scipy import stats
from test_claims import NAMES, SIGNED, table

from fastai_bnstats.compare import holm, unshared_variability
from fastai_bnstats.study import verdicts as verdict_rules
from fastai_bnstats.study.claims import AA, CHECKS, CLAIMS, GRID_CLAIMS, LANDSCAPE_CLAIMS, Claim, Contrast, at_rates
from fastai_bnstats.study.readings import READINGS
from fastai_bnstats.study.verdicts import (VERDICTS, aa_table, combine_verdicts, judge, load_table, missing_runs, n_parts, per_seed,
                                           reading_values, save_table, study_units)


def verdicts(results): return {r.claim.key: r.verdict for r in results}
def part(results, reading): return next(p for r in results for p in r.parts if p.contrast.reading == reading)
def row(t, **k): return next(r for r in t if all(r[x] == v for x, v in k.items()))
ERRORS = Contrast('error_odds', 'naive_nobn', 'naive_bn', '', 'odds ratio')


RULES = [ # verdicts on parts -> verdict on the claim
    (['supported', 'supported'], 'supported'), (['contradicted'], 'contradicted'), (['negligible', 'negligible'], 'negligible'),
    (['supported', 'contradicted'], 'parts disagree'), (['supported', 'contradicted', 'undecided'], 'parts disagree'),
    (['supported', 'undecided'], 'undecided'), (['negligible', 'undecided'], 'undecided'), (['contradicted', 'not run'], 'undecided'),
    (['supported', 'negligible'], 'partly supported'), (['negligible', 'contradicted', 'contradicted'], 'partly contradicted'),
    (['undecided', 'not run'], 'undecided'), (['not run', 'not run'], 'not run')]


@pytest.mark.parametrize('parts, claim', RULES)
def test_rules(parts, claim):
    assert {combine_verdicts(p) for p in itertools.permutations(parts)} == {claim}


def test_every_combination_has_a_verdict():
    words = 'supported', 'contradicted', 'negligible', 'undecided', 'not run'
    found = {combine_verdicts(p) for n in (1, 2, 4) for p in itertools.product(words, repeat=n)}
    assert found == set(VERDICTS)-{'different'}


def test_a_claim_is_supported_only_if_all_its_parts_are():
    def claim_a(**kw): return verdicts(judge(table(**kw)))['a']
    assert claim_a(error_odds__naive_nobn=4, error_odds__naive_fold=3) == 'supported'
    assert claim_a(error_odds__naive_nobn=4) == 'partly supported' # folding it makes no difference
    assert claim_a(error_odds__naive_nobn=.3, error_odds__naive_fold=.3) == 'contradicted'
    assert claim_a(error_odds__naive_nobn=4, error_odds__naive_fold=.3) == 'parts disagree'
    assert claim_a() == 'negligible' and claim_a(noise=1.) == 'undecided'


EFFECTS = {'error_odds': 4, 'grad_slope': .2, 'output_grad_slope': .2, 'roughness': 3, 'output_roughness': 3}


def test_directions_are_those_of_the_post():
    removed = {f'{r}__{arm}': x for r, x in EFFECTS.items() for arm in ('naive_nobn', 'naive_fold')}
    t = table(**removed, loss_var__freeze_non_bn=.5, valid_var__freeze_non_bn=.5, moved_since_freeze__freeze=2, angle_body__freeze=2)
    assert set(verdicts(judge(t)).values()) == {'supported'}
    t = [{**r, **{k: -r[k] if k in SIGNED else 1/r[k] for k in READINGS}} for r in t]
    assert set(verdicts(judge(t)).values()) == {'contradicted'}


@pytest.mark.parametrize('n', range(1, 10))
def test_with_too_few_seeds_nobody_says_anything(n):
    results = judge(table(n, noise=1e-6, error_odds__naive_nobn=9, error_odds__naive_fold=9))
    assert {r.verdict for r in results} == {''} == {p.verdict for r in results for p in r.parts}
    assert verdicts(judge(table(10, noise=1e-6, error_odds__naive_nobn=9, error_odds__naive_fold=9)))['a'] == 'supported'


def test_a_part_with_too_few_seeds_is_undecided_although_others_have_enough():
    t = [r for r in table(noise=1e-6) if not r['arm'].startswith('freeze') or r['seed'] < 2]
    results = judge(t)
    assert verdicts(results) == dict(a='negligible', b='negligible', c='negligible', d='undecided', e='undecided')
    assert all(math.isnan(p.p) and math.isnan(p.equivalence_p) and p.result.n == 2 for r in results[3:] for p in r.parts)


def test_p_is_adjusted_over_all_parts():
    results = judge(table(error_odds__naive_nobn=4, error_odds__naive_fold=1.03, noise=.05, grad_slope__naive_nobn=.5))
    parts = [p for r in results for p in r.parts]
    assert len(parts) == n_parts(CLAIMS) == 14
    for name, adjusted in (('p', 'p'), ('tost_p', 'equivalence_p')):
        assert [getattr(p, adjusted) for p in parts] == holm([getattr(p.result, name) for p in parts]).tolist()
    assert all(math.isnan(p.p) and p.verdict == '' for r in results for p in r.secondary)


def simulate(n_tables, mean, noise, shared):
    "How many tables have at least one part with each word, where all parts have this mean; `shared` is the share of common noise"
    words, rng, contrasts = {}, np.random.default_rng(0), [p for c in CLAIMS for p in c.parts]
    few = tuple(Claim(c.key, c.title, c.post, c.parts, c.direction) for c in CLAIMS)
    base = table(10, noise=0)
    def effects():
        common, own = rng.normal(size=10), rng.normal(size=(len(contrasts), 10))
        noises = shared**.5*common+(1-shared)**.5*own
        return {(p.reading, p.a): (math.log(p.margin[1]) if p.is_ratio else p.margin[1])*mean+noise*x for p, x in zip(contrasts, noises)}
    for _ in range(n_tables):
        e, rows = effects(), [dict(r) for r in base]
        for r in rows:
            for (reading, arm), x in e.items():
                if arm == r['arm']: r[reading] = float(x[r['seed']] if reading in SIGNED else np.exp(x[r['seed']]))
        for w in {p.verdict for r in judge(rows, few) for p in r.parts}: words[w] = words.get(w, 0)+1
    return words


@pytest.mark.slow
@pytest.mark.parametrize('shared', [0, .9])
def test_no_part_gets_a_false_verdict_in_more_than_5_percent_of_studies(shared):
    nothing = simulate(80, 0, .3, shared)
    assert nothing.get('supported', 0)+nothing.get('contradicted', 0) <= stats.binom.ppf(.999, 80, .05)
    margin = simulate(80, 1, .1, shared)
    assert margin.get('negligible', 0) <= stats.binom.ppf(.999, 80, .05)


@pytest.mark.slow
def test_these_simulations_find_a_missing_correction(monkeypatch):
    monkeypatch.setattr(verdict_rules, 'holm', lambda ps: np.where(np.isnan(ps), 1, ps))
    nothing, margin = simulate(40, 0, .3, 0), simulate(40, 1, .1, 0)
    assert nothing['supported']+nothing['contradicted'] > 10 and margin['negligible'] > 10


def test_a_missing_arm_and_missing_runs_are_named():
    results = judge([r for r in table() if r['arm'] != 'naive_fold'])
    folded = [p for r in results for p in r.parts if p.contrast.a == 'naive_fold']
    assert [p.verdict for p in folded] == ['not run']*5 and all(p.result is None for p in folded)
    assert folded[0].missing == [(0, s, 'naive_fold') for s in range(10)]
    assert judge([])[0].verdict == '' and judge([])[0].n == 0
    t = [r for r in table(11) if (r['seed'], r['arm']) != (4, 'naive_bn')]
    p = judge(t)[0].parts[0]
    assert p.missing == [(0, 4, 'naive_bn')] and p.result.n == 10 and 4 not in p.result.seeds
    about = dict(seeds=11, sources=1, names=['naive_bn', 'freeze'], args={}, aa=2)
    control = [(0, 11, 'naive_bn'), (0, 12, 'naive_bn')] # seeds 2 and 3 of naive_bn are there
    assert missing_runs(about, t) == [(0, 4, 'naive_bn')] and missing_runs({**about, 'aa': 11}, t)[1:3] == control
    paired = dict(about, seeds=2, sources=2, aa=2, args=dict(paired_sources=True))
    rows = [dict(source=0, seed=0, arm='naive_bn'), dict(source=0, seed=2, arm='naive_bn')]
    assert missing_runs(paired, rows) == [(1, 1, 'naive_bn'), (0, 0, 'freeze'), (1, 1, 'freeze'), (1, 3, 'naive_bn')]


def test_runs_that_were_never_started_are_missing_too():
    "The study's arguments say which runs there should be"
    about = dict(seeds=9, sources=1, args={})
    p = judge(table(8), units=study_units(about))[0].parts[0]
    assert p.missing == [(0, 8, 'naive_nobn'), (0, 8, 'naive_bn')] and p.result.n == 8


def test_a_seed_with_several_sources_counts_once():
    t = table(8, sources=3)
    a, b, missing = per_seed(t, ERRORS)
    at = {(r['source'], r['seed'], r['arm']): r['error_odds'] for r in t}
    for s in range(8):
        ratios = [at[k, s, 'naive_nobn']/at[k, s, 'naive_bn'] for k in range(3)]
        assert a[s]/b[s] == pytest.approx(np.prod(ratios)**(1/3))
    assert judge(t)[0].n == 8 and judge(t)[0].verdict == '' and not missing
    t = [r for r in t if (r['source'], r['seed'], r['arm']) != (2, 5, 'naive_nobn')] # not finished yet
    a, b, missing = per_seed(t, ERRORS)
    assert sorted(a) == [0, 1, 2, 3, 4, 6, 7] and missing == [(2, 5, 'naive_nobn')]
    signed = Contrast('grad_slope', 'naive_nobn', 'naive_bn', '', 'difference')
    mean = np.mean([row(t, source=k, seed=1, arm='naive_nobn')['grad_slope'] for k in range(3)])
    assert per_seed(t, signed)[0][1] == pytest.approx(mean)


def test_one_source_for_each_seed():
    about = dict(seeds=4, sources=4, args=dict(paired_sources=True))
    assert study_units(about) == {s: (s,) for s in range(4)}
    assert study_units(dict(about, args={})) == {s: (0, 1, 2, 3) for s in range(4)}
    t = [r for r in table(4, sources=4) if r['source'] == r['seed']]
    a, b, missing = per_seed(t, ERRORS, study_units(about))
    assert a == {s: pytest.approx(row(t, seed=s, arm='naive_nobn')['error_odds']) for s in range(4)} and not missing


def test_crossed_sources_speak_of_the_networks_and_paired_ones_of_the_procedure():
    "Networks differ in an effect whose mean is 0. Where all seeds share a network, the difference is found; it says nothing of others"
    rng, hits = np.random.default_rng(0), dict(crossed=0, paired=0)
    c = Claim('a', '', '', (Contrast('error_odds', 'naive_nobn', 'naive_bn', '', 'odds ratio'),), 1)
    few = [r for r in table(8) if r['arm'] in c.parts[0].arms]
    def found(effects): # of the seeds
        values = [np.exp((r['arm'] == 'naive_nobn')*effects[r['seed']]+.2*rng.normal()) for r in few]
        results = judge([{**r, 'error_odds': float(v)} for r, v in zip(few, values)], (c,))
        return results[0].verdict in ('supported', 'contradicted')
    for _ in range(150):
        of_network = .5*rng.normal(size=8)
        hits['crossed'] += found(np.full(8, of_network[0]))
        hits['paired'] += found(of_network)
    assert hits['paired'] <= stats.binom.ppf(.999, 150, .05) and hits['crossed'] > 60


def test_several_arms_can_form_one_side():
    t = table(2)
    a, _, _ = per_seed(t, Contrast('error_odds', ('freeze', 'freeze_non_bn'), 'naive_bn', ''))
    x, y = (row(t, seed=1, arm=k)['error_odds'] for k in ('freeze', 'freeze_non_bn'))
    assert a[1] == pytest.approx((x*y)**.5)


def test_the_unshared_part_of_the_variability():
    t = table(8)
    p = next(p for r in judge(t) for p in r.secondary if p.contrast.reading == 'unshared')
    own = [unshared_variability(*(row(t, seed=s, arm=k)['losses'] for k in ('freeze_non_bn', 'freeze'))) for s in range(8)]
    np.testing.assert_allclose(p.result.differences, own)


# ---- runs that diverged

def diverge(t, seeds, arm, ratio=1.):
    "These runs diverged; before that, their readings were `ratio` times as large"
    for r in t:
        if r['seed'] in seeds and r['arm'] == arm:
            r['diverged'] = 'the loss of minibatch 3 of 90 is not finite'
            how = {n: x.if_diverged for n, x in READINGS.items()}
            r |= {n: {'kept': r[n]*ratio, 'worst': math.inf, 'undefined': math.nan}[how[n]] for n in READINGS}
    return t


def test_a_divergence_in_the_claimed_direction_supports_the_claim():
    p = part(judge(diverge(table(noise=.3), range(10), 'freeze')), 'loss_var')
    assert p.verdict == 'supported' and p.result.scale == 'rank' and p.diverged == {'freeze_non_bn': (0, 10), 'freeze': (10, 10)}
    assert p.rest is None
    p = part(judge(diverge(table(noise=.3), range(10), 'freeze_non_bn')), 'loss_var')
    assert p.verdict == 'contradicted'
    some = part(judge(diverge(table(noise=.3, loss_var__freeze_non_bn=.3), [2, 5], 'freeze')), 'loss_var')
    assert some.verdict == 'supported' and some.result.n == 10 and some.rest.n == 8 and some.rest.effect < .5


def test_one_divergence_does_not_make_a_difference_of_two_percent_matter():
    "Ranks know no margin: 0.98 in all other seeds would be significant"
    t = table(noise=1e-3, loss_var__freeze_non_bn=.98)
    assert part(judge(t), 'loss_var').verdict == 'negligible'
    p = part(judge(diverge(t, [3], 'freeze')), 'loss_var')
    assert p.p < .05 and p.rest.effect == pytest.approx(.98, abs=.01) and p.verdict == 'undecided'


def test_accuracy_counts_as_it_is_and_other_readings_are_not_defined():
    results = judge(diverge(table(), [3], 'naive_nobn', ratio=50))
    errors, slope, loss = (next(p for r in results for p in r.parts+r.secondary if p.contrast.reading == k)
                           for k in ('error_odds', 'grad_slope', 'final_valid'))
    assert errors.result.scale == 'odds ratio' and errors.result.differences[3] > 3 and not errors.result.reason
    assert slope.verdict == 'undecided' and 'seed 3' in slope.result.reason
    assert loss.result.scale == 'rank' and not loss.result.reason


def test_a_diverged_run_is_never_negligible():
    results = judge(diverge(table(noise=1e-4), [3], 'freeze'))
    assert part(results, 'loss_var').verdict == 'undecided' and verdicts(results)['d'] == 'undecided'
    assert verdicts(judge(table(noise=1e-4)))['d'] == 'negligible'


def unshared(t): return next(p.result for r in judge(t) for p in r.secondary if p.contrast.reading == 'unshared')


def test_the_losses_of_a_run_that_diverged_or_stopped_early_are_not_compared():
    assert 'seed 3' in unshared(diverge(table(), [3], 'freeze')).reason and unshared(table()).reason == ''
    t = table()
    row(t, seed=2, arm='freeze')['losses'] = np.ones(5)
    assert 'seed 2' in unshared(t).reason


# ---- controls and grid

def test_the_control_compares_an_arm_with_itself():
    t = [{**r, 'arm': 'naive_bn'} for r in table(18) if r['arm'] == 'naive_bn']
    aa = aa_table(t, 9)
    a, b, _ = per_seed(aa, Contrast('error_odds', 'again', 'naive_bn', ''))
    at = {r['seed']: r['error_odds'] for r in t}
    assert a == {s: pytest.approx(at[s+9]) for s in range(9)} and b == {s: pytest.approx(at[s]) for s in range(9)}
    assert not set(verdicts(judge(aa, AA)).values()) & {'supported', 'contradicted', 'not run'}
    for r in t:
        if r['seed'] >= 9: r['error_odds'] *= 2 # an effect in the control is noticed
    assert judge(aa_table(t, 9), AA)[0].verdict == 'supported'


def test_the_checks_show_that_the_study_can_see():
    arms = 'scratch_bn', 'scratch_nobn', 'naive_bn', 'freeze', 'freeze_lr_half'
    seen = table(arms=arms, error_odds__scratch_bn=5, moved_since_freeze__freeze_lr_half=.6, angle_body__freeze_lr_half=.5)
    assert verdicts(judge(seen, CHECKS)) == dict(transfer='supported', half='supported')
    assert verdicts(judge(table(arms=arms), CHECKS)) == dict(transfer='negligible', half='negligible')


def test_the_three_claims_of_the_grid():
    arms = [f'{a}{p}' for a, p in itertools.product(('freeze', 'freeze_non_bn'), ('', '_hold', '_recalibrated'))]
    more = {f'error_odds__{a}': 2 for a in arms if a.endswith('hold')}
    assert verdicts(judge(table(arms=arms, noise=.002, **more), GRID_CLAIMS)) == dict(
        train='negligible', hold='contradicted', recalibrate='negligible')


def test_the_table_is_a_csv(tmp_path):
    t = diverge(table(2), [1], 'freeze')
    save_table(t, tmp_path/'m.csv')
    with (tmp_path/'m.csv').open() as f: rows = list(csv.DictReader(f))
    assert len(rows) == len(t) and rows[0]['arm'] == t[0]['arm'] and 'not finite' in row(rows, seed='1', arm='freeze')['diverged']
    for r, x in zip(rows, t): np.testing.assert_array_equal([float(r[k]) for k in READINGS], [x[k] for k in READINGS])
    assert reading_values(t, 'freeze', 'accuracy') == [r['accuracy'] for r in t if r['arm'] == 'freeze']


def test_all_claims_can_be_judged_from_the_csv(tmp_path):
    t = diverge(table(11, noise=.1, error_odds__naive_nobn=4, arms=(*NAMES, 'naive_bn@0.3')), [1], 'freeze')
    save_table(t, tmp_path/'m.csv')
    again = load_table(tmp_path/'m.csv')
    for claims in (CLAIMS, LANDSCAPE_CLAIMS, at_rates(CLAIMS, dict(naive_bn=.3))):
        for r, s in zip(judge(t, claims), judge(again, claims), strict=True):
            for p, q in zip(r.parts, s.parts, strict=True):
                np.testing.assert_equal([p.verdict, p.p, p.equivalence_p, p.diverged], [q.verdict, q.p, q.equivalence_p, q.diverged])
                np.testing.assert_equal(p.result.differences, q.result.differences)
            assert r.verdict == s.verdict
    text = (tmp_path/'m.csv').read_text().replace(',roughness_raw,', ',older,') # of a study from before this reading
    (tmp_path/'m.csv').write_text(text)
    assert np.isnan(load_table(tmp_path/'m.csv')[0]['roughness_raw'])
