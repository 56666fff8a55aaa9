"""What a tracker gets is what the recording has: every count, edge, loss and name, each once"""
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastai_bnstats.export import Hist, points
from fastai_bnstats.export.points import sizes
from fastai_bnstats.record import Writer
from fastai_bnstats.recording import Landscape, Recording, empty_recording
from helpers import make
from trackers import by_name, plain


def head(rec, rows, losses, valids):
    "The recording as it was when it had so many rows and losses"
    n = {'T': rows, 'N': losses, 'V': valids}
    arrays = {f: getattr(rec, f) for f in rec.__dataclass_fields__ if f != 'meta'}
    dims = {f: rec.__dataclass_fields__[f].metadata['dims'][0] for f in arrays}
    return replace(rec, **{f: a[:n[dims[f]]] for f, a in arrays.items() if dims[f] in n})


def test_every_value_is_that_of_the_recording():
    rec = make(G=2, seed=3)
    got = by_name(points(rec))
    assert set(got) == {'phase', 'lr/0', 'lr/1', 'loss/train', 'loss/valid',
                        *(f'weights{k}/{n}' for k in ('', '_mean', '_sd') for n in rec.names)}
    for i, n in enumerate(rec.names):
        hists = got[f'weights/{n}']
        assert [s for s, _ in hists] == rec.step.tolist()
        for row, (_, h) in enumerate(hists):
            assert h.counts.tolist() == [rec.under[row, i], *rec.hist[row, i], rec.over[row, i]]
            assert h.edges[1:-1].tolist() == rec.edges[i].tolist() and (np.diff(h.edges) > 0).all()
            assert h.counts.sum() == rec.numel[row, i]
        assert [v for _, v in got[f'weights_mean/{n}']] == rec.mean[:, i].tolist()
        np.testing.assert_allclose([v for _, v in got[f'weights_sd/{n}']], np.sqrt(rec.var[:, i]), rtol=1e-15)
    assert got['phase'] == [(0, 'freeze'), (8, 'unfreeze')]
    assert got['loss/train'] == list(zip(rec.loss_step.tolist(), rec.loss.tolist(), strict=True))
    assert got['loss/valid'] == list(zip(rec.valid_step.tolist(), rec.valid_loss.tolist(), strict=True))
    assert [v for _, v in got['lr/0']] == rec.lr[:, 0].tolist()
    assert got['lr/1'] == [(s, v) for s, v in zip(rec.step.tolist(), rec.lr[:, 1].tolist(), strict=True) if s >= 8] # one group before


@settings(max_examples=30)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 5), st.integers(1, 4))
def test_sent_in_two_parts_is_the_whole(rows, losses, valids, every):
    rec = make(seed=1)
    old = head(rec, rows, losses, valids)
    first, second = list(points(old, every=every)), list(points(rec, every=every, since=[sizes(old)]))
    whole = by_name(points(rec, every=every))
    parts = by_name(first+second)
    assert set(parts) == set(whole)
    for k, v in whole.items(): assert plain([(s, {k: x}) for s, x in parts[k]]) == plain([(s, {k: x}) for s, x in v])


@pytest.mark.parametrize('every', [1, 3, 16, 1000])
def test_every_thins_rows_only(every):
    rec = make()
    got = by_name(points(rec, every=every))
    assert [s for s, _ in got['weights/0.weight']] == rec.step[::every].tolist() == [s for s, _ in got['lr/0']]
    assert len(got['loss/train']) == len(rec.loss) and len(got['loss/valid']) == len(rec.valid_loss) and len(got['phase']) == 2


def test_layers_of_several_recordings():
    a, b = make(P=3), make(P=3, seed=1)
    b = replace(b, meta={**b.meta, 'quantity': 'gradients'})
    got = by_name(points([a, b], layers=['1.*', '2.weight']))
    kinds = [q+k for q in ('weights', 'gradients') for k in ('', '_mean', '_sd')]
    assert {k for k in got if '.' in k} == {f'{k}/{n}.weight' for k in kinds for n in '12'}
    assert got['loss/train'] == by_name(points(a))['loss/train'] # those of the first
    one, only = replace(b, names=np.array(['x', 'y', 'z'])), points([a, b], layers='0.weight')
    assert [h.counts.tolist() for _, h in by_name(points([a, one], layers='x'))['gradients/x']] \
        == [h.counts.tolist() for _, h in by_name(only)['gradients/0.weight']]


def test_accumulated_minibatches_are_single_values():
    "Three minibatches of one step, of which the last is seen together with the row"
    rec = make(fits=[('a', 1)], batches=1)
    rec = replace(rec, loss=np.array([3., 2., 1.]), **{f'loss_{k}': np.array(v) for k, v in
                  dict(step=[0, 0, 0], fit=[0, 0, 0], epoch=[0, 0, 0], batch=[0, 1, 2]).items()})
    got = list(points(rec))
    assert [v['loss/train'] for _, v in got] == [3, 2, 1] and [s for s, _ in got] == [0, 0, 0]
    assert 'weights/0.weight' in got[-1][1] and 'loss/valid' in got[-1][1]


def test_validation_loss_is_a_mean_over_items():
    rec = make(fits=[('a', 2)])
    places = {f'valid_{k}': np.array(v) for k, v in
              dict(step=[3, 3, 7, 7], fit=[0]*4, epoch=[0, 0, 1, 1], batch=[0, 1, 0, 1], n=[8, 2, 8, 2]).items()}
    rec = replace(rec, valid_loss=np.array([1., 2., 3., np.nan]), **places)
    (s0, v0), (s1, v1) = by_name(points(rec))['loss/valid']
    assert (s0, s1) == (3, 7) and v0 == pytest.approx(1.2) and np.isnan(v1)
    early = replace(rec, valid_step=np.array([-1, -1, 7, 7])) # a validation before the first step
    assert [s for s, _ in by_name(points(early))['loss/valid']] == [0, 7]


def row_of(w, edges=(-1., 0., 1.)):
    "A recording of one row and one tensor"
    w, e = np.asarray(w, float), np.array(edges)
    v = w[np.isfinite(w)]
    row = dict(hist=np.histogram(v, e)[0], under=(v < e[0]).sum(), over=(v > e[-1]).sum(), nonfinite=len(w)-len(v), numel=len(w),
               mean=v.mean() if len(v) else np.nan, var=v.var() if len(v) else np.nan, trainable=True)
    writer = Writer(['w'], e[None])
    writer.add(**{k: np.array(x)[None] for k, x in row.items()}, step=0, fit=0, epoch=0, batch=0, phase='a', stepped=True, lr=[.1])
    return writer.recording({})


@pytest.mark.parametrize('w, kinds', [
    ([-5, -.5, .5, 7], {'', '_mean', '_sd'}), # elements on both sides of the edges
    ([np.nan, np.inf, 0, .5], {'', '_mean', '_sd', '_nonfinite'}),
    ([np.nan, np.inf], {'_nonfinite'}),
    ([], set()), # the gradient of a frozen parameter
    ([2, 2, 2], {'_mean', '_sd'}), # constant: its edges may not be known yet
    ([1], {'_mean', '_sd'})])
def test_what_exists_is_sent_and_no_element_is_lost(w, kinds):
    values = next(points(row_of(w)))[1]
    assert {k.removeprefix('weights').removesuffix('/w') for k in values if k.startswith('weights')} == kinds
    n = values.get('weights_nonfinite/w', 0)
    if '' in kinds: assert values['weights/w'].counts.sum()+n == len(w)
    if 7 in w: assert values['weights/w'].counts.tolist() == [1, 1, 1, 1] and values['weights/w'].edges.tolist() == [-2, -1, 0, 1, 2]


@given(st.integers(1, 40), st.integers(3, 45), st.integers(0, 9))
def test_joined_bins_keep_counts_and_use_edges_of_the_recording(bins, n, seed):
    rng = np.random.default_rng(seed)
    h = Hist(np.arange(bins+3.), rng.integers(0, 5, bins+2), 0., 1.)
    small = h.at_most(n)
    assert len(small.counts) == len(small.edges)-1 <= n and small.counts.sum() == h.counts.sum()
    assert set(small.edges) <= set(h.edges) and (np.diff(small.edges) > 0).all()
    assert small.counts[0] == h.counts[0] and small.counts[-1] == h.counts[-1] # what lies beyond the edges stays apart
    edge = small.edges.astype(int)
    assert small.counts.tolist() == [h.counts[a:b].sum() for a, b in zip(edge, edge[1:])]
    assert small is h if len(h.counts) <= n else len(small.counts) > n/2 or bins < 3


def test_nothing_recorded_yet():
    assert list(points([])) == [] == list(points(empty_recording([], np.zeros((0, 3)))))
    assert list(points(empty_recording(['a'], np.arange(3.)[None]))) == []


@pytest.mark.parametrize('kw, error, message', [
    (dict(every=0), ValueError, 'every must be a whole number of at least 1. Found 0.'),
    (dict(every=1.5), ValueError, 'every must be a whole number of at least 1. Found 1.5.'),
    (dict(every=True), ValueError, 'Found True'),
    (dict(layers='gone'), ValueError, "No layer matches 'gone'. There are: 0.weight, 1.weight"),
    (dict(recs='run.npz'), TypeError, 'Pass a Recording or a list of them, such as learn.weight_hist.recording. Found str.'),
    (dict(recs=[make(), None]), TypeError, 'Found NoneType.'),
    (dict(recs=3), TypeError, 'Found int.')])
def test_wrong_arguments(kw, error, message):
    with pytest.raises(error, match=message.replace('(', r'\(')): points(**{'recs': make(), **kw})


def test_a_landscape_is_not_sent():
    landscape = Landscape.__new__(Landscape)
    with pytest.raises(TypeError, match='Found Landscape'): points([landscape])
    assert not isinstance(landscape, Recording)
