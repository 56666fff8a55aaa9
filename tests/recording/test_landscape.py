"""A landscape is selected, saved and loaded without loss, and its measures are those of plain formulas"""
from dataclasses import replace

import numpy as np
import pytest
from helpers import make
from hypothesis import given
from hypothesis import strategies as st

from fastai_bnstats.recording import ARRAYS, MEASURES, Landscape, Recording


def landscape(T=6, K=3, names=('all', 'body'), along='update', seed=0):
    rng = np.random.default_rng(seed)
    size = dict(T=T, K=K, G=len(names))
    arrays = {n: rng.random([size[d] for d in dims])+.1 for n, (dims, kind) in ARRAYS.items() if kind == 'f'}
    arrays |= dict(points=np.array([.5, 1, 2])[:K], step=np.arange(T)*4, fit=np.arange(T)//4, epoch=np.arange(T)//2%2, batch=np.arange(T)%2,
                   phase=np.array([f'p{i//4}' for i in range(T)], dtype='U9'), censored=np.zeros(T, int), names=np.array(names))
    arrays['distance'] = arrays['distance'][..., :1]*arrays['points'] # multiples of one direction
    return Landscape(**arrays, meta=dict(along=along, every=4, phases=['p0', 'p1']))


@given(st.integers(0, 5), st.integers(0, 99))
def test_saved_and_loaded(tmp_path_factory, T, seed):
    land = landscape(T, seed=seed)
    file = land.save(tmp_path_factory.mktemp('land')/'x')
    again = Landscape.load(file)
    assert again.is_same(land) and again.meta['along'] == 'update' and Landscape.load(file.with_suffix('')).is_same(land)
    assert T == 0 or not again.is_same(replace(land, loss=land.loss+1))


def test_files_of_another_kind(tmp_path):
    make().save(tmp_path/'rec.npz')
    landscape().save(tmp_path/'land.npz')
    with pytest.raises(ValueError, match='it holds histograms: read it with Recording.load'): Landscape.load(tmp_path/'rec.npz')
    with pytest.raises(ValueError, match='are missing'): Recording.load(tmp_path/'land.npz')
    data = (tmp_path/'land.npz').read_bytes()
    (tmp_path/'cut.npz').write_bytes(data[:-99])
    with pytest.raises(ValueError, match="can't be read"): Landscape.load(tmp_path/'cut.npz')
    with pytest.raises(FileNotFoundError): Landscape.load(tmp_path/'none.npz')
    np.savez(tmp_path/'some.npz', **{n: getattr(landscape(), n) for n in ('points', 'loss')}, meta=np.array('{}'))
    with pytest.raises(ValueError, match='are missing, or do not belong there'): Landscape.load(tmp_path/'some.npz')


@pytest.mark.parametrize('wrong, text', [
    (dict(loss=np.zeros((6, 4))), '`loss` has size 4 along K'), (dict(step=np.zeros(6)), '`step` must be whole numbers'),
    (dict(weight=np.zeros(6)), '`weight` must have 2 dimensions')])
def test_arrays_that_do_not_fit(wrong, text):
    with pytest.raises(ValueError, match=text): replace(landscape(), **wrong)


def test_measures_of_a_probe():
    l = landscape()
    g, w, d, c = l.grad[:, 0, None], l.weight[:, 0, None], l.distance[:, 0], l.change[:, 0]
    want = dict(loss_range=np.ptp(l.loss, axis=1), grad_change=c.max(1), beta=(c/d).max(1), rel_change=(c/g).max(1),
                turn=l.turn[:, 0].max(1),
                beta_rel=(c/g/(d/w)).max(1), linearity=(l.loss[:, -1]-l.start)/l.slope[:, -1], critical_rel=l.critical*d[:, 1]/w[:, 0])
    assert {*want} == {*MEASURES}
    for name, x in want.items(): np.testing.assert_allclose(l.measure(name), x, err_msg=name)
    for name in ('loss_range', 'linearity', 'critical_rel'): assert np.isnan(l.measure(name, 'body')).all()
    assert l.measure('beta', 'body') == pytest.approx((l.change[:, 1]/l.distance[:, 1]).max(1))
    assert np.isnan(landscape(along='distance').measure('critical_rel')).all()


def test_what_is_not_finite_is_the_worst_and_what_does_not_exist_is_nan():
    l = landscape()
    bad = replace(l, loss=np.where(np.arange(3) == 2, np.nan, l.loss), change=np.where(np.arange(3) == 2, np.inf, l.change),
                  turn=np.where(np.arange(3) == 2, np.nan, l.turn))
    assert (bad.measure('loss_range') == np.inf).all() and (bad.measure('beta_rel') == np.inf).all() and (bad.measure('turn') == 2).all()
    for gone in (dict(grad=l.grad*0), dict(distance=l.distance*0)):
        for name in ('beta', 'turn', 'beta_rel', 'grad_change'): assert np.isnan(replace(l, **gone).measure(name)).all()


def test_a_critical_step_that_was_not_found_is_beyond_what_was_tried():
    l = landscape()
    found = replace(l, censored=np.array([0, 1, -1, 0, 0, 0])).measure('critical_rel')
    assert found[1] == np.inf and found[2] == 0 and np.isfinite(found[[0, 3, 4, 5]]).all()


def test_select():
    l = landscape()
    assert l.sel(phase='p1').step.tolist() == [16, 20] == l.sel(fit=-1).step.tolist()
    assert l.sel(step=slice(None, 9)).step.tolist() == [0, 4, 8]
    assert l.sel(epoch=-1).step.tolist() == [8, 12, 16, 20] and l.sel(epoch=1).step.tolist() == [8, 12] and len(l.sel(fit=0, epoch=0)) == 2
    assert len(l.sel(fit=9)) == 0 and len(l.sel(fit=9).measure('beta')) == 0 == len(l.sel(fit=9).measure('linearity'))
    with pytest.raises(ValueError, match=r"No fit is called \['x'\]. This landscape has the phases \['p0', 'p1'\]"): l.sel(phase='x')
    with pytest.raises(ValueError, match="Unknown measure 'gamma'. Expected one of loss_range"): l.measure('gamma')
    with pytest.raises(ValueError, match="No group is called 'tail'. This landscape has all, body"): l.at_points('beta', 'tail')
