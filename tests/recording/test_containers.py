"""xarray, pandas and Zarr hold exactly what the arrays of a recording hold"""
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings, strategies as st

from fastai_bnstats.record import UpdateHistCallback, WeightHistCallback
from fastai_bnstats.recording import DIMS, FORMAT, NORMS, Recording, empty_recording
from helpers import make, tiny_learner

AXES = dict(T='step', P='tensor', B='bin', G='group', N='minibatch', V='valid_minibatch') | {'B+1': 'edge'}


def recording(seed, T, P, B, G, N, V, norms):
    "Arrays of random numbers, with NaN, infinities and names that are hard to store; its counts add up"
    rng = np.random.default_rng(seed)
    size = {'T': T, 'P': P, 'B': B, 'B+1': B+1, 'G': G, 'N': N, 'V': V}
    a = {n: rng.integers(0, 2**40, [size[k] for k in d]) for n, d in DIMS.items()}
    floats = ['mean', 'var', 'lr', 'loss', 'valid_loss', *NORMS]
    for n in floats: a[n] = np.where(rng.random(a[n].shape) < .2, rng.choice([np.nan, np.inf, 0, 5e-324]), rng.random(a[n].shape))
    if not norms: a |= dict.fromkeys(NORMS)
    a['edges'] = np.cumsum(rng.random((P, B+1))+.1, 1)
    a['hist'] = a['hist'].astype(np.int32) % 1000
    a['numel'] = a['hist'].sum(-1, dtype=np.int64)+a['under']+a['over']+a['nonfinite']
    for p, n in (('', T), ('loss_', N), ('valid_', V)): # in order of time
        a |= {p+'step': np.arange(n)*3, p+'fit': np.arange(n)//2, p+'epoch': np.zeros(n, int), p+'batch': np.arange(n)}
    a['stepped'], a['trainable'] = (rng.random(a[n].shape) < .5 for n in ('stepped', 'trainable'))
    names = np.array([f'{i}.ü{"x"*i}.weight' for i in range(P)], dtype=str)
    phase = np.array([f'fit{k//2}' for k in range(T)], dtype=str)
    a |= dict(names=names, kind=np.array(['weight', 'a kind'][:P]*P, dtype=str)[:P], phase=phase)
    phases = [f'fit{k}' for k in range(1+max(T, N, V)//2)]
    return Recording(**a, meta={'format': FORMAT, 'phases': phases, 'every': 3, 'quantity': 'updates' if norms else 'gradients',
                                'overhead': None, 'trained': {'0': [1, 2]}})


few = st.integers(0, 4)
recordings = st.builds(recording, st.integers(0, 99), few, few, st.integers(1, 5), few, few, few, st.booleans())


def same(a, b): # in type, shape and each bit that is not NaN
    np.testing.assert_array_equal(a, b)
    assert np.asarray(a).dtype == np.asarray(b).dtype


@given(recordings)
@settings(max_examples=60)
def test_xarray_holds_every_array(r):
    ds = r.to_xarray()
    has_norms = not np.isnan(r.norm).all()
    for n, dims in DIMS.items():
        if n in NORMS and np.isnan(getattr(r, n)).all(): assert n not in ds; continue
        v = ds['tensor' if n == 'names' else n]
        same(v.values, getattr(r, n))
        assert v.dims == tuple(AXES[k] for k in dims) and v.attrs['long_name']
    assert ('norm' in ds) == has_norms and set(ds.xindexes) == {'step', 'tensor'}
    for i in range(len(r.names)): np.testing.assert_allclose(ds.center[i], np.convolve(r.edges[i], [.5, .5], 'valid'))
    assert json.loads(ds.attrs['meta']) == r.meta and ds.attrs['every'] == 3 and ds.attrs['quantity'] == r.meta['quantity']
    back = Recording.from_xarray(ds)
    assert back.is_same(r) and back.meta == r.meta


@given(recordings)
@settings(max_examples=60)
def test_tables_hold_every_number(r):
    T, P = r.mean.shape
    df = r.to_frame()
    assert len(df) == T*P and df.tensor.cat.categories.tolist() == r.names.tolist()
    for t in range(T):
        for p in range(P):
            row = df.iloc[t*P+p]
            for k in ('step', 'fit', 'epoch', 'batch', 'phase'): assert row[k] == getattr(r, k)[t]
            assert (row.tensor, row.kind) == (r.names[p], r.kind[p])
            np.testing.assert_equal([row['mean'], row['std']], [r.mean[t, p], np.sqrt(r.var[t, p])])
    for k in ('under', 'over', 'nonfinite', 'numel', 'trainable', *NORMS):
        if k in df: same(df[k], getattr(r, k).ravel())
        else: assert np.isnan(getattr(r, k)).all()
    steps, loss, valid = (r.to_frame(of) for of in ('steps', 'loss', 'valid_loss'))
    same(steps.stepped, r.stepped)
    for g in range(r.lr.shape[1]): same(steps[f'lr{g}'], r.lr[:, g])
    same(loss.loss, r.loss); same(valid.loss, r.valid_loss); same(valid.n, r.valid_n)
    for frame, p in ((steps, ''), (loss, 'loss_'), (valid, 'valid_')):
        for k in ('step', 'fit', 'epoch', 'batch'): same(frame[k], getattr(r, p+k))
        assert frame.phase.tolist() == [f'fit{f}' for f in frame.fit]


@given(recordings)
@settings(max_examples=6)
def test_zarr_store_equals_the_dataset(tmp_path_factory, r):
    folder = tmp_path_factory.mktemp('zarr')
    path = r.to_zarr(folder/'sub'/'run.zarr')
    with xr.open_zarr(path) as ds:
        assert ds.identical(r.to_xarray())
        for n, v in ds.variables.items(): assert v.dtype == r.to_xarray()[n].dtype
        assert Recording.from_xarray(ds).is_same(r)
    assert [p.name for p in path.parent.iterdir()] == ['run.zarr'] # no temporary folder is left


@pytest.fixture(scope='module')
def trained():
    "Recordings of two fits: all tensors, and updates that begin with frozen layers"
    learn = tiny_learner(cbs=[WeightHistCallback(layers='all'), UpdateHistCallback()])
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    learn.fit(2)
    for p in learn.model[0].parameters(): p.requires_grad_(True)
    learn.fit(1)
    return learn.weight_hist.recording, learn.update_hist.recording


def test_recordings_of_trainings(trained, tmp_path):
    for i, r in enumerate(trained):
        ds = r.to_xarray()
        assert Recording.from_xarray(ds).is_same(r)
        assert xr.open_zarr(r.to_zarr(tmp_path/f'{i}.zarr')).identical(ds)
    weights, updates = trained
    df = updates.to_frame()
    frozen = df[(df.phase == 'fit0') & ~df.trainable]
    assert len(frozen) and (frozen.step_norm == 0).all() and 'norm' not in weights.to_frame() and 'norm' not in weights.to_xarray()
    assert set(weights.to_frame().kind) >= {'weight', 'gamma', 'beta', 'running_mean'}
    assert weights.to_xarray()['mean'].attrs == {'long_name': 'mean value'} and updates.to_xarray().hist.attrs['units'] == 'updates'


def test_parts_of_a_dataset(trained):
    weights, _ = trained
    ds, name = weights.to_xarray(), str(weights.names[3])
    part = Recording.from_xarray(ds.sel(tensor=[name], step=slice(2, 5)).transpose(...)) # xarray includes both ends
    want = weights.sel(step=range(2, 6), layers=name)
    assert part.names.tolist() == [name] and (part.hist == want.hist).all() and len(part.loss) == len(weights.loss)
    assert Recording.from_xarray(ds.transpose('bin', 'edge', 'tensor', 'step', ...)).is_same(weights)
    for bad, said in ((ds.isel(tensor=0), 'not a whole recording.*select with lists'), (ds.drop_vars('var'), r"\['var'\] are missing"),
                      (ds.isel(bin=slice(3)), '3 bins need 4 edges'), (ds.drop_attrs(), 'no attribute `meta`'),
                      (xr.Dataset(), 'are missing'),
                      (ds.assign(numel=ds.numel+1), 'do not add up'), (ds.assign(mean=ds.hist[..., 0]), '`mean` must be floating')):
        with pytest.raises(ValueError, match=said): Recording.from_xarray(bad)
    with pytest.raises(TypeError, match='Expected a Dataset.*Found DataFrame'): Recording.from_xarray(weights.to_frame())


def test_memory_is_shared_and_protected():
    r = make()
    ds = r.to_xarray()
    assert np.shares_memory(ds.hist.values, r.hist)
    with pytest.raises(ValueError, match='read-only'): ds.hist.values[0] = 0
    with pytest.raises(ValueError, match='is a view'): ds.hist[0] = 0
    ds.copy(deep=True).hist[0] = 0


def test_names_keep_their_order():
    r = make(P=12)
    wide = r.to_frame().pivot(index='step', columns='tensor', values='std')
    assert wide.columns.tolist() == r.names.tolist() # 2.weight before 10.weight
    np.testing.assert_array_equal(wide, np.sqrt(r.var))


def test_empty_recordings(tmp_path):
    for r in (empty_recording(['a', 'b'], np.zeros((2, 5))*np.nan), make().sel(epoch=9), empty_recording([], np.zeros((0, 5)))):
        assert [len(r.to_frame(k)) for k in ('tensors', 'steps', 'loss', 'valid_loss')] == [0]*4
        assert list(r.to_frame())[:7] == ['step', 'fit', 'epoch', 'batch', 'phase', 'tensor', 'kind']
        assert Recording.from_xarray(r.to_xarray()).is_same(r)
        assert xr.open_zarr(r.to_zarr(tmp_path/f'{len(r.names)}{r.hist.shape[2]}')).identical(r.to_xarray())


def test_losses_of_fits_without_a_name():
    r = make(every=5)
    r = replace(r, meta={'every': 5})
    assert r.to_frame('loss').phase.unique().tolist() == ['freeze', 'unfreeze'] # from the rows
    r = replace(r, loss_fit=r.loss_fit+7)
    assert r.to_frame('loss').phase.unique().tolist() == ['fit7', 'fit8']


def test_wrong_rows():
    with pytest.raises(ValueError, match="A row can be one of 'tensors', 'steps', 'loss', 'valid_loss'. Found of='hist'."):
        make().to_frame('hist')


def test_a_store_is_never_overwritten_or_left_half_written(tmp_path, monkeypatch):
    r = make()
    (tmp_path/'mine').mkdir()
    with pytest.raises(FileExistsError, match='mine exists already: choose another name'): r.to_zarr(tmp_path/'mine')
    def fail(self, path, **kw):
        path.mkdir()
        raise OSError('disk full')
    monkeypatch.setattr(xr.Dataset, 'to_zarr', fail)
    with pytest.raises(OSError, match='disk full'): r.to_zarr(tmp_path/'other')
    assert [p.name for p in tmp_path.iterdir()] == ['mine']


@pytest.mark.parametrize('package,method', [('xarray', 'to_xarray'), ('xarray', 'to_zarr'), ('zarr', 'to_zarr')])
def test_a_missing_package_is_named(package, method, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    needs = f"{method if package == 'zarr' else 'to_xarray'} needs {package}"
    with pytest.raises(ImportError, match=rf"{needs}.*pip install 'fastai_bnstats\[xarray\]'"):
        getattr(make(), method)(*[tmp_path/'x']*(method == 'to_zarr'))
    assert not list(tmp_path.iterdir())


def test_the_room_stays_light():
    code = "import sys, fastai_bnstats.recording; print(sorted({'pandas', 'xarray', 'zarr'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '[]'


def test_dtypes_of_a_table():
    df = make().to_frame()
    assert df.dtypes.drop(['phase', 'tensor', 'kind']).astype(str).to_dict() == {
        **dict.fromkeys(['step', 'fit', 'epoch', 'batch', 'under', 'over', 'nonfinite', 'numel'], 'int64'),
        **dict.fromkeys(['mean', 'std'], 'float64'), 'trainable': 'bool'}
    assert all(isinstance(df[k].dtype, pd.CategoricalDtype) for k in ('phase', 'tensor', 'kind'))
