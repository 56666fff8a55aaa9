"""The claims of the post as data"""
import numpy as np
from helpers import make

from fastai_bnstats.compare import MARGINS
from fastai_bnstats.study.arms import PROBED
from fastai_bnstats.study.claims import (AA, CHECKS, CLAIMS, GRID_CLAIMS, LANDSCAPE_CLAIMS, TWOFOLD, at_rates,
                                         deleted_or_folded, raw_contrasts)
from fastai_bnstats.study.readings import READINGS, Run, unfreeze_minus_freeze
from fastai_bnstats.study import ARMS

NAMES = 'naive_nobn', 'naive_fold', 'naive_bn', 'freeze', 'freeze_non_bn'
EVERY = CLAIMS+AA+CHECKS+GRID_CLAIMS+LANDSCAPE_CLAIMS
SIGNED = {p.reading for c in EVERY for p in c.parts+c.secondary if p.scale == 'difference'}


def table(n=10, sources=1, noise=.02, seed=0, arms=NAMES, **effect):
    "A table with random readings. `effect` has factors {'reading__arm': factor}, whose logarithm is added to readings with a sign"
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed+1)
    def number(reading, arm):
        later = reading.startswith(('land_', 'forms_')) or reading.endswith('_raw') # with their own numbers: the others stay as they were
        log = np.log(effect.get(f'{reading}__{arm}', 1))+noise*(other if later else rng).normal()
        return float(log if reading in SIGNED else np.exp(log))
    def row(k, s, arm):
        facts = dict(source=k, seed=s, arm=arm, what='', seconds=1., diverged='', losses=np.exp(noise*rng.normal(size=30)))
        return {**facts, **{r: number(r, arm) for r in READINGS}}
    return [row(k, s, arm) for k in range(sources) for s in range(n) for arm in arms]


def parts(reading, *scale): return [(reading, arm, 'naive_bn', *scale) for arm in ('naive_nobn', 'naive_fold')]


def test_the_five_claims():
    "The declaration is repeated here, so that nobody changes a claim by accident"
    ratio, odds, slope = ('ratio', (.8, 1.25)), ('odds ratio', (.8, 1.25)), ('difference', TWOFOLD)
    assert np.exp(TWOFOLD).tolist() == [.5, 2]
    assert [(c.key, c.direction, [(p.reading, p.a, p.b, p.scale, p.margin) for p in c.parts]) for c in CLAIMS] == [
        ('a', 1, parts('error_odds', *odds)),
        ('b', -1, parts('grad_slope', *slope)+parts('output_grad_slope', *slope)),
        ('c', 1, parts('roughness', *ratio)+parts('output_roughness', *ratio)),
        ('d', -1, [(r, 'freeze_non_bn', 'freeze', *ratio) for r in ('loss_var', 'valid_var')]),
        ('e', 1, [(r, 'freeze', 'freeze_non_bn', *ratio) for r in ('moved_since_freeze', 'angle_body')])]
    assert [(c.key, c.direction, [(p.reading, p.a, p.b, p.scale, p.margin) for p in c.parts]) for c in LANDSCAPE_CLAIMS] == [
        ('f', 1, [(r, 'naive_fold', 'naive_bn', *ratio) for r in ('land_beta_rel', 'land_turn')]),
        ('g', -1, [('land_critical', 'naive_fold', 'naive_bn', *ratio)])]
    assert {c.key: {p.reading for p in c.secondary} for c in CLAIMS} == dict(
        a={'final_valid'}, b={'grad_zero', 'output_grad_zero', 'grad_rms', 'output_grad_rms'},
        c={'change_size', 'output_change_size', 'drift', 'output_drift'}, d={'unshared'},
        e={'path_body', 'displacement_body', 'angle_bn', 'angle_head'})


def test_every_claim_can_be_read_and_judged():
    for c in EVERY:
        assert c.title and c.post and c.direction in (1, -1) and c.parts
        for p in c.parts+c.secondary:
            assert p.label and p.what and (p.reading in READINGS or p.reading == 'unshared')
            assert set(p.arms) <= {*ARMS, 'again'}, p
        assert all(p.margin for p in c.parts), 'a part without a margin can never be negligible'
    assert all(r.label and r.if_diverged in ('kept', 'worst', 'undefined') for r in READINGS.values())
    assert {p.margin for c in EVERY for p in c.parts+c.secondary if p.scale != 'difference'} == set(MARGINS.values())


def test_the_two_ways_to_remove_batch_norm_are_compared():
    assert [(c.key, [(p.reading, p.a, p.b) for p in deleted_or_folded(c)]) for c in CLAIMS] == [
        ('a', [('error_odds', 'naive_nobn', 'naive_fold')]),
        ('b', [(r, 'naive_nobn', 'naive_fold') for r in ('grad_slope', 'output_grad_slope')]),
        ('c', [(r, 'naive_nobn', 'naive_fold') for r in ('roughness', 'output_roughness')]), ('d', []), ('e', [])]


def test_claims_with_a_learning_rate_for_each_arm():
    claims = at_rates(CLAIMS, dict(naive_nobn=.1, naive_bn=1, freeze=3))
    assert [[(p.a, p.b) for p in c.parts[:2]] for c in claims] == [
        *[[('naive_nobn@0.1', 'naive_bn'), ('naive_fold', 'naive_bn')]]*3,
        [('freeze_non_bn', 'freeze@3')]*2, [('freeze@3', 'freeze_non_bn')]*2]
    def rest(c): return [(p.reading, p.label, p.margin) for p in c.parts+c.secondary]
    for c, d in zip(CLAIMS, claims, strict=True):
        assert rest(c) == rest(d)
        assert [p.label for p in deleted_or_folded(c)] == [p.label for p in deleted_or_folded(d)]
    assert {(p.a, p.b) for c in claims for p in deleted_or_folded(c)} == {('naive_nobn@0.1', 'naive_fold')}
    assert at_rates(CLAIMS, {}) == at_rates(CLAIMS, dict.fromkeys(ARMS, 1)) == CLAIMS
    grid, = (c for c in at_rates(GRID_CLAIMS, dict(freeze_hold=.3)) if c.key == 'hold')
    assert grid.parts[0].a == ('freeze_hold@0.3', 'freeze_non_bn_hold')


def test_readings_that_depend_on_the_scale():
    raw = {c.key: {p.reading for p in raw_contrasts(c)} for c in CLAIMS+LANDSCAPE_CLAIMS}
    assert raw == dict(
        a=set(), b={'grad_slope_raw', 'output_grad_slope_raw'}, d={'loss_var_raw', 'valid_var_raw'}, e={'displacement_body_raw'},
        c={f'{o}{r}_raw' for o in ('', 'output_') for r in ('roughness', 'change_size')}, f={'land_beta_rel_raw'}, g=set())
    assert set().union(*raw.values()) == {r for r in READINGS if r.endswith('_raw')}
    assert {(p.a, p.b, p.scale, p.margin) for p in raw_contrasts(CLAIMS[1])} == {(p.a, p.b, p.scale, p.margin) for p in CLAIMS[1].parts}


def test_the_loss_is_probed_where_a_claim_needs_it():
    assert {*PROBED} == {arm for c in LANDSCAPE_CLAIMS for p in c.parts+c.secondary for arm in p.arms}


def test_the_control_has_the_readings_of_the_claims():
    assert [(c.key, [p.reading for p in c.parts]) for c in AA] == [
        ('a', ['error_odds']), ('b', ['grad_slope', 'output_grad_slope']), ('c', ['roughness', 'output_roughness']),
        ('d', ['loss_var', 'valid_var']), ('e', ['angle_body'])]
    assert {(p.a, p.b) for c in AA for p in c.parts} == {('again', 'naive_bn')}


def test_a_difference_of_phases_needs_both():
    "Figures 8 and 9 and their reading use this function"
    rec = make(fits=(('freeze', 2), ('unfreeze', 4)), P=3)
    want = rec.sel(phase='unfreeze', epoch=range(3))-rec.sel(phase='freeze')
    np.testing.assert_array_equal(unfreeze_minus_freeze(rec).hist, want.hist)
    def moved(rec): return READINGS['moved_since_freeze'].compute(Run(dict(weights=rec), []))
    assert moved(rec) == np.median(want.moved().mean(0)) and np.isnan(moved(rec.sel(phase='freeze')))
