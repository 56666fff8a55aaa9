"""Recordings can be selected, subtracted, saved and loaded, and damaged or foreign files are refused"""
import gc
import json
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fastai_bnstats.recording import (DIMS, FORMAT, Recording, concat, counted, empty_recording, full_counts, is_shortcut,
                                      match_names, phases_of)
from helpers import make
from fastai_bnstats.record import Writer


COUNTS = 'hist', 'under', 'over', 'nonfinite', 'numel'


@pytest.fixture
def rec(): return make()


def test_invariant_and_shapes(rec):
    assert (full_counts(rec).sum(-1) == rec.numel).all()
    assert len(rec) == 20 and rec.hist.shape == (20, 2, 10) and rec.edges.dtype == rec.var.dtype == np.float64
    with pytest.raises(ValueError): rec.hist[0] = 0 # read-only
    with pytest.raises(AttributeError): rec.hist = 0


def test_shapes_must_agree(rec):
    with pytest.raises(ValueError, match='has size 19 along T, but earlier arrays have 20.*must agree'): replace(rec, step=rec.step[1:])
    with pytest.raises(ValueError, match='must have 2 dimensions'): replace(rec, mean=rec.mean[0])
    with pytest.raises(ValueError, match='10 bins need 11 edges'): replace(rec, edges=rec.edges[:, :-1])


def test_select(rec):
    u = rec.sel(phase='unfreeze')
    assert len(u) == 12 and len(u.loss) == 12 and len(u.valid_loss) == 3 and set(u.phase) == {'unfreeze'}
    assert rec.sel(fit=[0, 1]).is_same(rec) and len(rec.sel(step=range(5))) == 5 and len(rec.sel(step=slice(None, None, 2))) == 10
    assert len(rec.sel(epoch=[1, 2], layers='1.*')) == 12 and rec.sel(layers=[1]).names.tolist() == ['1.weight']
    assert rec.sel(layers=lambda n: n.startswith('0')).hist.shape == (20, 1, 10)
    assert len(rec.sel(epoch=7)) == 0


def test_select_errors(rec):
    with pytest.raises(ValueError, match=r"No fit is called \['thaw'\].*freeze"): rec.sel(phase='thaw')
    with pytest.raises(ValueError, match="No layer matches 'conv.*0.weight, 1.weight"): rec.sel(layers='conv*')
    with pytest.raises(ValueError, match='No layer matches 5'): rec.sel(layers=5)
    with pytest.raises(ValueError, match=r"'0'. Did you mean '0.weight'\? There are: 0.weight"): rec.sel(layers='0')
    names = ['0.1.weight', '0.1.bias', '0.10.weight', '0.1.a.weight']
    for how in ('0.1', '0.1 gamma'): # as titles of pictures have it
        with pytest.raises(ValueError, match=f"{how}'. Did you mean '0.1.weight' or '0.1.bias'"): match_names(names, how)
    with pytest.raises(ValueError, match=r"'0\.2'\. There are"): match_names(names, '0.2')
    with pytest.raises(ValueError, match='selects nothing'): rec.sel(layers=[])
    for bad in (dict, True, .5, [.5], [None], [b'0']):
        with pytest.raises(TypeError, match="modules and masks don't work here"): rec.sel(layers=bad)
    assert rec.sel(layers=np.int64(1)).names.tolist() == ['1.weight']


FROM_END = [
    (dict(fit=-1), range(8, 20)), (dict(fit=[-1, 0]), range(20)), (dict(fit=slice(-1, None)), range(8, 20)), (dict(step=-1), [19]),
    (dict(step=range(-2, 0)), [18, 19]), (dict(epoch=-1), [4, 5, 6, 7, 16, 17, 18, 19]),
    (dict(epoch=slice(-1, None)), [4, 5, 6, 7, 16, 17, 18, 19]),
    (dict(fit=0, epoch=-2), range(4)), (dict(epoch={0, -1}, fit=1), [8, 9, 10, 11, 16, 17, 18, 19]), (dict(fit=-3), []), (dict(fit=2), [])]


@pytest.mark.parametrize('how,rows', FROM_END, ids=str)
def test_negative_numbers_count_from_the_end(rec, how, rows):
    r = rec.sel(**how)
    assert r.step.tolist() == r.loss_step.tolist() == list(rows)


def test_a_range_of_many_steps_needs_little_memory(rec):
    assert rec.sel(step=range(10**15)).is_same(rec) and rec.sel(step=range(10**15, -1, -1)).is_same(rec)
    assert len(replace(rec, step=rec.step+2**30).sel(step=slice(2**30+5, None))) == 15 # no list of a thousand million numbers


def test_delta_var_is_nan_between_fits_and_across_gaps(rec):
    d = rec.delta_var()
    np.testing.assert_array_equal(np.delete(d, 7, 0), np.delete(np.diff(rec.var, axis=0), 7, 0))
    assert np.isnan(d[7]).all()
    assert np.isnan(rec.sel(epoch=[0, 2], fit=1).delta_var()[3]).all() # epoch 1 is missing
    assert np.isfinite(make(every=2).delta_var()).sum() == 2*(3+5)     # pairs of successive rows within a fit


def test_moved_is_half_the_changes(rec):
    c = full_counts(rec)
    assert (rec.moved()[0] == 0).all()
    assert rec.moved()[5, 1] == pytest.approx(np.abs(c[5, 1]-c[0, 1]).sum()/2/100)


@given(st.integers(0, 50), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_difference_pairs_rows(seed, epochs):
    r = make(seed=seed)
    d = r.sel(phase='unfreeze', epoch=range(epochs))-r.sel(phase='freeze')
    n = min(2, epochs)*4
    assert len(d) == n and d.hist.dtype == np.int64
    np.testing.assert_array_equal(d.hist, r.hist[8:8+n].astype(int)-r.hist[:n])
    assert not (d.hist.sum(-1)+d.under+d.over+d.nonfinite).any()
    assert 'unfreeze minus freeze' in repr(d)


def test_refused_differences_name_a_remedy(rec):
    with pytest.raises(ValueError, match='different bin edges in 2 of 2 layers.*range=first_recording'): rec-replace(rec, edges=rec.edges*2)
    with pytest.raises(ValueError, match="different layers.*'1.weight'"): rec-rec.sel(layers=0)
    with pytest.raises(ValueError, match='the same layers, but in another order'): rec-replace(rec, names=rec.names[::-1])
    assert "(of 12 and 8)" in repr(rec.sel(phase='unfreeze')-rec.sel(phase='freeze'))
    with pytest.raises(ValueError, match=r"no row in common.*\(0, 0, 0\) and \(0, 1, 0\).*rec.sel"): rec.sel(epoch=0)-rec.sel(epoch=1)
    with pytest.raises(TypeError): rec-1


def test_file_roundtrip(rec, tmp_path):
    f = rec.save(tmp_path/'sub'/'run')
    assert f.name == 'run.npz' and Recording.load(f).is_same(rec) and Recording.load(str(f)).meta['phases'] == ['freeze', 'unfreeze']
    assert [p.name for p in f.parent.iterdir()] == ['run.npz'] # no temporary file is left
    with np.load(f, allow_pickle=False) as z: assert set(DIMS) <= set(z)


def test_truncated_files_are_refused(rec, tmp_path):
    raw = rec.save(tmp_path/'run.npz').read_bytes()
    for k in range(0, len(raw)-1, len(raw)//40):
        (f := tmp_path/'cut.npz').write_bytes(raw[:k])
        with pytest.raises(ValueError, match=r'cut\.npz'): Recording.load(f)


def test_damaged_files_are_refused(rec, tmp_path):
    raw = bytearray(rec.save(tmp_path/'run.npz').read_bytes())
    for k in range(0, len(raw), len(raw)//40):
        bad = raw.copy()
        bad[k:k+4] = b'\xff\x00\xff\x00'
        (f := tmp_path/'bad.npz').write_bytes(bad)
        try: assert Recording.load(f).is_same(rec) # these bytes are not read
        except ValueError as e: assert 'bad.npz' in str(e)


def test_foreign_and_newer_files(rec, tmp_path):
    np.savez(tmp_path/'other.npz', a=1)
    with pytest.raises(ValueError, match='not a recording'): Recording.load(tmp_path/'other.npz')
    (tmp_path/'text.npz').write_text('hello')
    with pytest.raises(ValueError, match='cut off, damaged, or another kind'): Recording.load(tmp_path/'text.npz')
    arrays = {n: getattr(rec, n) for n in DIMS}
    np.savez(tmp_path/'new.npz', **arrays, meta=json.dumps({'format': FORMAT+1}))
    with pytest.raises(ValueError, match=rf'format {FORMAT+1}.*up to {FORMAT}.*Upgrade'): Recording.load(tmp_path/'new.npz')
    arrays.pop('var')
    np.savez(tmp_path/'part.npz', **arrays, meta=json.dumps({'format': FORMAT}))
    with pytest.raises(ValueError, match=r"not a whole recording: \['var'\]"): Recording.load(tmp_path/'part.npz')
    with pytest.raises(FileNotFoundError, match='No file .*nowhere.npz. Expected'): Recording.load(tmp_path/'nowhere.npz')
    with pytest.raises(FileNotFoundError, match='chunk-'): Recording.load(tmp_path)


def test_chunks_load_as_one_recording(rec, tmp_path):
    parts = [rec.sel(step=range(0, 8)), rec.sel(step=range(8, 20))]
    assert concat(parts).is_same(rec)
    for i, p in enumerate(parts): p.save(tmp_path/f'chunk-{i:06d}.npz')
    assert Recording.load(tmp_path).is_same(rec)
    assert Recording.load(rec.save(tmp_path/'r').with_suffix('')).is_same(rec)
    (tmp_path/'chunk-000001.npz').write_bytes(b'x')
    with pytest.raises(ValueError, match='chunk-000001.npz.*Move this file away to read the others'): Recording.load(tmp_path)
    (tmp_path/'chunk-000001.npz').unlink()
    parts[1].save(tmp_path/'chunk-000004.npz')
    warning = 'Chunks are missing in .*: it has 2 files, and the last is chunk-000004.npz'
    with pytest.warns(UserWarning, match=warning): Recording.load(tmp_path)
    with pytest.raises(ValueError, match='same layers.*are not in both'): concat([rec, rec.sel(layers=0)])
    with pytest.raises(ValueError, match='same edges'): concat([rec, replace(rec, edges=rec.edges*2)])
    with pytest.raises(ValueError, match='at least one'): concat([])


def test_parameter_groups_can_be_added_later():
    r = make(G=3)
    assert r.lr.shape == (20, 3) and np.isnan(r.lr[0, 1:]).all() and (r.lr[-1] == .1).all()
    assert concat([r.sel(fit=0), r.sel(fit=1)]).is_same(r)


def test_empty():
    assert empty_recording(['a'], [[0, 1, 2]]).moved().shape == (0, 1)
    e = empty_recording(['a'], [[0, 1, 2]])
    assert len(e) == 0 and e.hist.shape == (0, 1, 2) and 'Recording of weights: 0 rows' in repr(e)
    assert phases_of(e) == []


def test_names():
    assert match_names(['a.weight', 'b.weight'], None).tolist() == [0, 1]
    assert match_names(['a[0]', 'a0'], 'a[0]').tolist() == [0] # an exact name has priority over a glob


BLOCKS = ['layer2.0.downsample.0.weight', '0.5.0.downsample.0.weight', '0.model.layer2.0.downsample.1.weight', 'layer2.0.downsample',
          'stages.0.blocks.0.downsample.conv.weight', 's1.b1.downsample.conv.weight', 'stages.0.0.downsample.conv.weight',
          '4.0.idpath.0.0.weight', 'stages.0.0.shortcut.conv.weight']
STAGES = ['stages.1.downsample.1.weight', '0.model.stages.1.downsample.0.weight', 'layers.1.downsample.reduction.weight',
          'stages.1.downsample.spatial_downsample.c.weight', 'layer2.0.conv1.weight']


@pytest.mark.parametrize('name', BLOCKS+STAGES)
def test_shortcuts_of_blocks_are_not_downsampling_between_stages(name): assert is_shortcut(name) == (name in BLOCKS)


def parts_of(rec): return [rec.sel(step=range(i, i+5)) for i in range(0, 20, 5)]


def save_chunks(folder, parts, names=None):
    for i, p in enumerate(parts): p.save(folder/(names[i] if names else f'chunk-{i:06d}.npz'))


def narrow(r): return replace(r, edges=r.edges[:, :-1], hist=r.hist[..., :-1], over=r.over+r.hist[..., -1])


DAMAGED = { # what happened to the chunks -> (the parts as they are found, the error)
    'twice': (lambda p: [p[0], p[0], *p[1:]],
              'order of time, each of them once. Found `step` 0 in .*chunk-000001.npz after 4 in an earlier part'),
    'reversed': (lambda p: p[::-1], 'order of time'),
    'losses twice': (lambda p: [p[1], replace(p[2], loss_step=p[0].loss_step)], 'Found `loss_step` 0 in .*chunk-000001'),
    'quantity': (lambda p: [p[0], replace(p[1], meta={**p[1].meta, 'quantity': 'gradients'})],
                 "the same `quantity`, 'weights'. Found 'gradients' in .*chunk-000001"),
    'every': (lambda p: [p[0], p[1], replace(p[2], meta={**p[2].meta, 'every': 5})], 'the same `every`, 1. Found 5 in .*chunk-000002'),
    'layers': (lambda p: [p[0], p[1].sel(layers=0)], "the same layers. Found .*'1.weight'.* in .*chunk-000001"),
    'bins': (lambda p: [p[0], narrow(p[1])], 'the same number of bins, 10. Found 9 bins in .*chunk-000001'),
    'edges': (lambda p: [p[0], replace(p[1], edges=p[1].edges*2)], 'the same edges. Found other edges in .*chunk-000001'),
    'edges after unknown ones': (lambda p: [empty_recording(p[0].names, p[0].edges*np.nan), p[0], replace(p[1], edges=p[1].edges*2)],
                                 'the same edges. Found other edges in .*chunk-000002')}


@pytest.mark.parametrize('damage,text', DAMAGED.values(), ids=DAMAGED)
def test_damaged_folders_are_refused(rec, tmp_path, damage, text):
    save_chunks(tmp_path, damage(parts_of(rec)))
    with pytest.raises(ValueError, match=text): Recording.load(tmp_path)


@pytest.mark.parametrize('name', ['chunk-000000 (1).npz', 'chunk-abc.npz', 'chunk-.npz', 'chunk-000000-conflict.npz'])
def test_files_that_only_look_like_chunks_are_not_read(rec, tmp_path, name):
    save_chunks(tmp_path, parts_of(rec))
    parts_of(rec)[0].save(tmp_path/name)
    with pytest.warns(UserWarning, match=re.escape(name)+' in .* is not read.*Remove copies'): assert Recording.load(tmp_path).is_same(rec)


def test_two_files_with_one_number_are_refused(rec, tmp_path):
    save_chunks(tmp_path, parts_of(rec))
    parts_of(rec)[0].save(tmp_path/'chunk-0.npz')
    with pytest.raises(ValueError, match='two files for one chunk.*Move one of them away'): Recording.load(tmp_path)


def test_chunks_are_sorted_by_number(rec, tmp_path):
    save_chunks(tmp_path, parts_of(rec), [f'chunk-{n}.npz' for n in ('000000', '999998', '999999', '1000000')])
    with pytest.warns(UserWarning, match='Chunks are missing.*the last is chunk-1000000.npz'): assert Recording.load(tmp_path).is_same(rec)


def without_edges(rec):
    "As it is recorded while all values are equal"
    zero = np.zeros_like(rec.under)
    return replace(rec, edges=rec.edges*np.nan, hist=rec.hist*0, under=zero, over=zero, mean=np.ones_like(rec.mean), var=rec.var*0)


@pytest.mark.parametrize('value', [0., 1., -3e5, 1e30])
def test_rows_without_edges_are_counted_when_one_file_is_loaded(rec, tmp_path, value):
    constant = replace(without_edges(rec), mean=np.full_like(rec.mean, value))
    got = Recording.load(constant.save(tmp_path/'chunk-000000.npz'))
    assert (full_counts(got).sum(-1) == got.numel).all() and (np.diff(got.edges) > 0).all() and got.hist.sum() == got.numel.sum()
    assert (got.edges[:, 0] < value).all() and (got.edges[:, -1] > value).all()


def packed(T, P, B):
    "What `Meter.fetch` returns: views of arrays with more columns"
    rows, counts = np.zeros((T, P, B+6)), np.zeros((T, P, B+4), np.int64)
    counts[..., [1, -1]] = 7
    views = dict(hist=counts[..., 1:-3], under=counts[..., 0], over=counts[..., -3], nonfinite=counts[..., -2], numel=counts[..., -1])
    return dict(**views, mean=rows[..., -2], var=rows[..., -1])


def filled_writer(T=400, P=20, B=40):
    writer = Writer([f'{i}.weight' for i in range(P)], np.tile(np.linspace(-1, 1, B+1), (P, 1)))
    for t in range(T): writer.add(step=t, fit=0, epoch=0, batch=t, phase='a', stepped=True, trainable=[True]*P, lr=[.1])
    for _ in range(4): writer.extend(**packed(T//4, P, B))
    return writer


def memory_of(make):
    "What `make()` returns, and the memory that it takes at the end and at most"
    make()
    gc.collect()
    tracemalloc.start()
    try:
        res = make()
        gc.collect()
        return res, *tracemalloc.get_traced_memory()
    finally: tracemalloc.stop()


def size_of(rec): return sum(getattr(rec, n).nbytes for n in DIMS)


def test_a_writer_keeps_each_number_once():
    writer, kept, _ = memory_of(filled_writer)
    assert kept < 1.3*size_of(writer.recording({}))


MEMORY = [('recording', 1.1, 1.6), ('sel', 1.1, 1.3), ('concat', 1.1, 1.3), ('load', 1.1, 1.6), ('all', .1, .2)]


@pytest.mark.slow
@pytest.mark.parametrize('how,end,most', MEMORY)
def test_memory_of_recordings(tmp_path, how, end, most):
    writer = filled_writer()
    r = writer.recording({})
    f = r.save(tmp_path/'r')
    parts = [r.sel(step=range(200)), r.sel(step=range(200, 400))]
    make = dict(recording=lambda: writer.recording({}), sel=lambda: r.sel(step=range(399)), concat=lambda: concat(parts),
                load=lambda: Recording.load(f), all=lambda: r.sel(fit=0))[how]
    got, now, peak = memory_of(make)
    assert now < end*size_of(got) and peak < most*size_of(got)


def test_the_table_counts_all_parameters_of_the_model(rec):
    r = replace(rec, meta={**rec.meta, 'trained': {'0': [4, 12], '1': [12, 12]}})
    assert 'freeze: 2 epochs, 8 rows, 4 of 12 parameters train' in repr(r) and '<td>12 of 12</td>' in r._repr_html_()
    hint = "of the model's 12 parameters are recorded; layers='all' records all, batch norm and biases too"
    assert f'{len(rec.names)} {hint}' in repr(r)
    outputs = replace(r, kind=np.array(['output']*len(rec.names)))
    assert 'records all' not in repr(outputs) and '4 of 12' in repr(outputs)
    full = {'0': [1, len(rec.names)]}
    assert 'records all' not in repr(replace(rec, meta={**rec.meta, 'trained': full}))
    mixed = replace(r, kind=np.array(['gamma', *rec.kind[1:]])) # such as a part of a recording of all
    assert f"{len(rec.names)} of the model's 12 parameters are recorded" in repr(mixed) and 'records all' not in repr(mixed)
    assert "1 of the model's 12 parameters is recorded; layers='all'" in repr(r.sel(layers=0))
    older = repr(rec)
    assert f'{len(rec.names)} of {len(rec.names)} recorded parameters train' in older and 'records all' not in older


def test_repr(rec):
    assert 'freeze: 2 epochs, 8 rows' in repr(rec) and '<td>unfreeze</td>' in rec._repr_html_()
    assert '&lt;b&gt;' in make(fits=(('<b>', 1),))._repr_html_()


def test_loads_without_torch_fastai_and_matplotlib(rec, tmp_path):
    f = rec.save(tmp_path/'run.npz')
    code = f"""
import sys
for m in ('torch', 'fastai', 'matplotlib', 'pandas'): sys.modules[m] = None
from fastai_bnstats.recording import Recording
r = Recording.load({str(f)!r})
print(len(r.sel(phase='unfreeze')-r.sel(phase='freeze')))
"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip() == '8'


def test_moved_compares_shares_if_the_number_of_elements_changes(rec):
    def change(f): return replace(rec, **{n: f(getattr(rec, n)) for n in COUNTS})
    doubled = change(lambda a: np.concatenate([a[:-1], a[:1]*2]))
    assert (doubled.moved()[-1] == 0).all() and (doubled.moved() <= 1).all()
    empty = change(lambda a: np.concatenate([a[:4]*0, a[4:]]))
    assert np.isnan(empty.moved()).all()
    assert np.isnan((empty.sel(fit=1, epoch=0)-empty.sel(fit=0, epoch=0)).moved()).all()
    assert ((rec.sel(fit=1)-rec.sel(fit=0)).moved() <= 1).all()


def test_slices_count_steps_without_a_row():
    r = make(every=5).sel(step=slice(-5, None))
    assert r.loss_step.tolist() == list(range(15, 20)) and r.step.tolist() == [15]


def test_masks_are_refused(rec):
    with pytest.raises(TypeError, match="modules and masks don't work here"): rec.sel(layers=np.array([False, True]))


@pytest.mark.parametrize('first', [True, False])
def test_without_rows_there_is_nothing_to_subtract(first):
    rec = make()
    a, b = (rec.sel(fit=7), rec) if first else (rec, rec.sel(fit=7))
    text = f"both recordings need rows. Found none in the {'first' if first else 'second'}: .* Phases: freeze, unfreeze"
    with pytest.raises(ValueError, match=text): a-b


@pytest.mark.parametrize('seconds, share, said', [
    (.5, .1, 'took 0.5 s, 10.0% of the training'), (.04, .5, 'took 0.0 s'), (3., 1.076, 'took 3.0 s')])
def test_a_share_of_the_training_is_given_where_it_means_something(rec, seconds, share, said):
    r = replace(rec, meta={**rec.meta, 'overhead': dict(seconds=seconds, share=share)})
    assert repr(r).endswith(f'recording {said}')


def test_notes_of_other_quantities_and_processes(tmp_path):
    edges = np.linspace(-1, 1, 5)[None]
    outputs = empty_recording(['a'], edges, kind=['output gradient'], quantity='output_gradients', trained={'0': [4, 12]})
    assert "layers='all'" not in repr(outputs) and "layers='all'" in repr(empty_recording(['a.weight'], edges, trained={'0': [4, 12]}))
    sharded = empty_recording(['a', 'b'], edges.repeat(2, 0), sharded={'a': [2, 4], 'b': [1, 3]})
    assert 'sharded weights: 3 of their 7 values are recorded' in repr(Recording.load(sharded.save(tmp_path/'sharded')))
    with pytest.raises(ValueError, match='`sharded` in the metadata must be an object'):
        replace(sharded, meta={'sharded': 3}).save(tmp_path/'x')
    sharded.save(tmp_path/'rank0')
    empty_recording(['a'], edges, other_rank=1).save(tmp_path/'rank0')
    assert len(Recording.load(tmp_path/'rank0').names) == 2 # the file of the process that recorded is still there


def test_fits_that_have_only_losses_have_names(rec):
    later = replace(rec, loss_fit=np.where(rec.loss_fit == 1, 3, 0), meta={k: v for k, v in rec.meta.items() if k != 'phases'})
    assert phases_of(later) == ['freeze', 'unfreeze', 'fit2', 'fit3']
    assert len(later.sel(phase='fit3').loss) == 12 and 'fit3: ' in repr(later)


@pytest.mark.parametrize('number', [int, np.int64])
def test_a_number_and_what_it_counts(number):
    assert [counted(number(n), 'row') for n in (0, 1, 2)] == ['0 rows', '1 row', '2 rows']
