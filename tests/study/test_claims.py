"""The claims of the post, the arms that they compare, and the verdicts"""
import csv
import itertools
from dataclasses import replace

import numpy as np
import pytest
from helpers import make

from fastai_bnstats.study.claims import (AA, CLAIMS, GRID_CLAIMS, METRICS, Claim, aa_table, claim_verdict, judge, per_seed, save_table,
                                         unfreeze_minus_freeze)
from fastai_bnstats.compare import holm

ARMS = 'naive_nobn', 'naive_fold', 'naive_bn', 'freeze', 'freeze_non_bn'


def table(n=8, sources=1, noise=.02, seed=0, **effect):
    "A table with random metrics, multiplied by the factors of `effect`: {'metric__arm': factor}"
    rng = np.random.default_rng(seed)
    def metrics(arm): return {m: float(effect.get(f'{m}__{arm}', 1)*np.exp(noise*rng.normal())) for m in METRICS}
    return [dict(source=k, seed=s, arm=a, **metrics(a)) for k in range(sources) for s in range(n) for a in ARMS]


def verdicts(results): return {c.key: claim_verdict(results, c) for c in dict.fromkeys(r.claim for r in results)}


SECONDARY = {'roughness', 'loss_var_rel', 'valid_var', 'valid_var_rel', 'path_bn', 'path_head', 'displacement_bn', 'displacement_head',
             'angle_body'}


def test_the_five_claims():
    "The declaration is repeated here, so that nobody changes a claim by accident"
    assert [(c.key, c.direction, [(p.metric, p.a, p.b) for p in c.parts]) for c in CLAIMS] == [
        ('a', -1, [('accuracy', 'naive_nobn', 'naive_bn'), ('accuracy', 'naive_fold', 'naive_bn')]),
        ('b', -1, [('grad_depth', 'naive_nobn', 'naive_bn'), ('grad_depth', 'naive_fold', 'naive_bn')]),
        ('c', 1, [('change_size', 'naive_nobn', 'naive_bn'), ('change_size', 'naive_fold', 'naive_bn')]),
        ('d', -1, [('loss_var', 'freeze_non_bn', 'freeze')]),
        ('e', 1, [('path_body', 'freeze', 'freeze_non_bn'), ('displacement_body', 'freeze', 'freeze_non_bn')])]
    assert {p.metric for c in CLAIMS for p in c.secondary} >= SECONDARY
    assert all(p.metric in METRICS for c in CLAIMS+AA+GRID_CLAIMS for p in c.parts+c.secondary)
    assert all(c.title and c.post for c in CLAIMS)


def test_a_claim_is_supported_only_if_all_its_parts_are():
    both = dict(accuracy__naive_nobn=.7, accuracy__naive_fold=.8)
    assert verdicts(judge(table(**both)))['a'] == 'supported'
    assert verdicts(judge(table(accuracy__naive_nobn=.7, seed=1)))['a'] == 'parts disagree'
    assert verdicts(judge(table(accuracy__naive_nobn=1.4, accuracy__naive_fold=1.3)))['a'] == 'contradicted'
    assert verdicts(judge(table(accuracy__naive_nobn=.7, accuracy__naive_fold=1.3)))['a'] == 'parts disagree'
    assert verdicts(judge(table(noise=.005, seed=1)))['a'] == 'equivalent'
    assert verdicts(judge(table(noise=1., seed=1)))['a'] == 'undecided'


def test_directions_are_those_of_the_post():
    removed = dict(accuracy__naive_nobn=.7, accuracy__naive_fold=.7, grad_depth__naive_nobn=.1, grad_depth__naive_fold=.1,
                   change_size__naive_nobn=3, change_size__naive_fold=3)
    t = table(**removed, loss_var__freeze_non_bn=.5, path_body__freeze=2, displacement_body__freeze=2)
    assert set(verdicts(judge(t)).values()) == {'supported'}
    t = [{**r, **{k: 1/r[k] for k in METRICS}} for r in t]
    assert set(verdicts(judge(t)).values()) == {'contradicted'}


def test_a_verdict_needs_six_pairs():
    t = table(5, noise=1e-6, accuracy__naive_nobn=.5, accuracy__naive_fold=.5)
    assert {r.verdict for r in judge(t) if r.verdict} == {'undecided'}
    assert verdicts(judge(table(6, noise=1e-6)))['a'] == 'equivalent'


def test_p_is_adjusted_over_the_claims_for_each_way_to_remove_batch_norm():
    results = judge(table(accuracy__naive_nobn=.7, accuracy__naive_fold=.97, noise=.05, grad_depth__naive_nobn=.5))
    main = {c.key: [r for r in results if r.verdict and r.claim == c] for c in CLAIMS}
    first, second = (holm([main[k][min(i, len(main[k])-1)].result.p for k in 'abcde']) for i in (0, 1))
    for i, k in enumerate('abcde'):
        if k == 'd': assert main[k][0].p_adj == max(first[i], second[i])
        else: assert [r.p_adj for r in main[k]] == [first[i], second[i]]
    whole = holm([max(r.result.p for r in main[k]) for k in 'abcde'])
    for i, k in enumerate('abcde'): assert {r.claim_p for r in results if r.claim.key == k} == {whole[i]}
    assert {r.verdict for r in results if np.isnan(r.p_adj)} == {''} and len(results) > sum(map(len, main.values()))


def test_the_adjusted_p_of_the_whole_claim_counts():
    "Each part of the claim is supported, but the claim itself is not"
    results = [replace(r, claim_p=.06) for r in judge(table(accuracy__naive_nobn=.7, accuracy__naive_fold=.7))]
    assert {r.verdict for r in results if r.claim.key == 'a' and r.verdict} == {'supported'}
    assert claim_verdict(results, CLAIMS[0]) == 'undecided'


def test_family_wise_error_rate():
    "Without any effect, at most 5 % of the tables give a wrong verdict: over the claims, and for each way to remove batch norm"
    few = tuple(Claim(c.key, c.title, c.post, c.parts, c.direction) for c in CLAIMS)
    hits = dict(claims=0, first=0, second=0)
    for i in range(120):
        results = judge(table(8, noise=.3, seed=i), few)
        wrong = lambda vs: bool(set(vs) & {'supported', 'contradicted'})
        hits['claims'] += wrong(verdicts(results).values())
        for k, way in ((0, 'first'), (-1, 'second')): hits[way] += wrong([[r.verdict for r in results if r.claim == c][k] for c in few])
    assert max(hits.values()) <= 11 # of 120; at a rate of 5 %, more hits have a probability below 2 % (binomial)


def test_contrasts_with_a_missing_arm_are_not_run():
    results = judge([r for r in table() if r['arm'] != 'naive_fold'])
    folded = [r for r in results if r.contrast in r.claim.parts and (r.contrast.a, r.contrast.b) == ('naive_fold', 'naive_bn')]
    assert [r.verdict for r in folded] == ['not run']*3
    assert all(r.result is None for r in results if r.verdict == 'not run')
    assert {r.verdict for r in judge([]) if r.verdict} == {'not run'}


def test_a_diverged_seed_is_not_dropped():
    t = table(accuracy__naive_nobn=.5, accuracy__naive_fold=.5, loss_var__freeze_non_bn=.1)
    next(r for r in t if (r['seed'], r['arm']) == (3, 'freeze_non_bn'))['loss_var'] = float('nan')
    d = next(r for r in judge(t) if r.contrast.metric == 'loss_var')
    assert d.verdict == 'undecided' and 'seed 3' in d.result.reason


def test_a_seed_with_several_sources_counts_once():
    t = table(8, sources=3)
    a, b = per_seed(t, 'accuracy', 'naive_nobn', 'naive_bn')
    at = {(r['source'], r['seed'], r['arm']): r['accuracy'] for r in t}
    for s in range(8):
        ratios = [at[k, s, 'naive_nobn']/at[k, s, 'naive_bn'] for k in range(3)]
        assert a[s]/b[s] == pytest.approx(np.prod(ratios)**(1/3))
    assert judge(t)[0].result.n == 8
    t = [r for r in t if (r['source'], r['seed'], r['arm']) != (2, 5, 'naive_nobn')] # not finished yet
    assert sorted(per_seed(t, 'accuracy', 'naive_nobn', 'naive_bn')[0]) == [0, 1, 2, 3, 4, 6, 7]


def test_several_arms_can_form_one_side():
    t = table(2)
    a, _ = per_seed(t, 'accuracy', ('freeze', 'freeze_non_bn'), 'naive_bn')
    x, y = (next(r['accuracy'] for r in t if (r['seed'], r['arm']) == (1, k)) for k in ('freeze', 'freeze_non_bn'))
    assert a[1] == pytest.approx((x*y)**.5)


def test_the_control_compares_an_arm_with_itself():
    t = [{**r, 'arm': 'naive_bn'} for r in table(16) if r['arm'] == 'naive_bn']
    aa = aa_table(t, 8)
    a, b = per_seed(aa, 'accuracy', 'again', 'naive_bn')
    at = {r['seed']: r['accuracy'] for r in t}
    assert a == {s: pytest.approx(at[s+8]) for s in range(8)} and b == {s: pytest.approx(at[s]) for s in range(8)}
    assert not {r.verdict for r in judge(aa, AA)} & {'supported', 'contradicted', 'not run'}
    for r in t:
        if r['seed'] >= 8: r['accuracy'] *= 2 # an effect in the control is noticed
    assert judge(aa_table(t, 8), AA)[0].verdict == 'supported'
    metrics = ['accuracy', 'grad_depth', 'change_size', 'loss_var', 'path_body', 'displacement_body']
    assert [p.metric for c in AA for p in c.parts] == metrics


def test_the_three_claims_of_the_grid():
    arms = [f'{a}{p}' for a, p in itertools.product(('freeze', 'freeze_non_bn'), ('', '_hold', '_recalibrated'))]
    rng = np.random.default_rng(0)
    def metrics(arm): return {k: float(np.exp(.002*rng.normal())*(.5 if arm.endswith('hold') else 1)) for k in METRICS}
    t = [dict(source=0, seed=s, arm=a, **metrics(a)) for s in range(8) for a in arms]
    assert verdicts(judge(t, GRID_CLAIMS)) == dict(f='equivalent', g='contradicted', h='equivalent')


def test_the_table_is_a_csv(tmp_path):
    t = table(2)
    save_table(t, tmp_path/'m.csv')
    with (tmp_path/'m.csv').open() as f: rows = list(csv.DictReader(f))
    assert len(rows) == len(t) and rows[0]['arm'] == t[0]['arm']
    assert all(float(r[k]) == x[k] for r, x in zip(rows, t) for k in METRICS)


def test_contrasts_are_labelled_in_words():
    "These labels appear beside the intervals in claims.png"
    assert [[p.label for p in c.parts] for c in CLAIMS] == [
        ['accuracy, deleted', 'accuracy, folded'], ['gradient by depth, deleted', 'gradient by depth, folded'],
        ['change of log-variance, deleted', 'change of log-variance, folded'], ['variability of the training loss'],
        ['path of the body', 'displacement of the body']]
    assert all(p.label for c in CLAIMS+AA+GRID_CLAIMS for p in c.parts+c.secondary) and all(m.label for m in METRICS.values())


def test_a_difference_of_phases_needs_both():
    "Figures 8 and 9 and their metric use this function"
    rec = make(fits=(('freeze', 2), ('unfreeze', 4)), P=3)
    want = rec.sel(phase='unfreeze', epoch=range(3))-rec.sel(phase='freeze')
    np.testing.assert_array_equal(unfreeze_minus_freeze(rec).hist, want.hist)
    assert METRICS['moved_since_freeze'].compute(rec) == np.median(want.moved().mean(0))
    assert np.isnan(METRICS['moved_since_freeze'].compute(rec.sel(phase='freeze')))
