"""Files that lie about their types, sizes, contents or metadata are refused when they are loaded, and need little memory for it"""
import io
import json
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from helpers import make
from fastai_bnstats.recording import DIMS, FORMAT, Recording

REC = make(fits=(('freeze', 1), ('unfreeze', 2)), batches=2)
ARRAYS = {n: getattr(REC, n) for n in DIMS}
INTS = [n for n, a in ARRAYS.items() if a.dtype.kind == 'i']
PLACES = [p+k for p in ('', 'loss_', 'valid_') for k in ('step', 'fit', 'epoch', 'batch')]
TYPES = {'text': lambda a: a.astype(str), 'bytes': lambda a: a.astype('S'), 'complex': lambda a: a.astype(complex),
         'date': lambda a: np.zeros(a.shape, 'M8[s]'), 'duration': lambda a: np.zeros(a.shape, 'm8[s]'),
         'struct': lambda a: np.zeros(a.shape, [('x', 'i4')]), 'float': lambda a: a.astype(float),
         'nan': lambda a: np.full(a.shape, np.nan), 'unsigned': lambda a: np.zeros(a.shape, 'u8')}
META = [None, 5, 'text', [], [{}], {'format': None}, {'format': '2'}, {'format': 1.5}, {'format': [2]}, {'phases': 5}, {'phases': [1, 2]},
        {'phases': 'ab'}, {'phases': None}, {'every': 'a'}, {'every': 0}, {'every': None}, {'every': True}, {'every': 10**400},
        {'every': 2.5}, {'quantity': 5}, {'quantity': None}, {'overhead': 'much'},
        {'overhead': {'seconds': 1}}, {'overhead': {'seconds': 'a', 'share': 'b'}},
        {'trained': [1, 2]}, {'trained': {'0': 3}}, {'trained': {'0': [1]}}, {'trained': {'0': [1, 'x']}}, {'trained': {'0': [True, 2]}}]


def write(path, arrays=None, meta=None, **changed):
    "A file with the arrays of `REC`, some of them changed"
    meta = {'format': FORMAT, 'phases': ['freeze', 'unfreeze']} if meta is None else meta
    np.savez_compressed(path, **{**ARRAYS, **(arrays or {}), **changed}, meta=np.array(meta if isinstance(meta, str) else json.dumps(meta)))
    return path


def refused(path, text=None):
    with pytest.raises(ValueError, match=text) as e: Recording.load(path)
    assert path.name in str(e.value) and 'again' in str(e.value) # which file, and what to do


def test_the_file_without_changes_loads(tmp_path): assert Recording.load(write(tmp_path/'a.npz')).is_same(REC)


WRONG = [(n, k) for n, a in ARRAYS.items() for k in TYPES if a.dtype.kind != 'U' and not (a.dtype.kind == 'f' and k in ('float', 'nan'))]


@pytest.mark.parametrize('name,kind', WRONG)
def test_arrays_of_the_wrong_type(tmp_path, name, kind):
    refused(write(tmp_path/'a.npz', **{name: TYPES[kind](ARRAYS[name])}), f'`{name}` must be .*Found the type')


@pytest.mark.parametrize('name', ['names', 'kind', 'phase'])
@pytest.mark.parametrize('a', [np.zeros(2), np.array([b'a', b'b']), np.array(['x'*20_000]*2)], ids=['float', 'bytes', 'long'])
def test_names_of_the_wrong_type(tmp_path, name, a):
    refused(write(tmp_path/'a.npz', **{name: np.resize(a, ARRAYS[name].shape)}), f'`{name}` must be text')


@pytest.mark.parametrize('name', PLACES)
@pytest.mark.parametrize('value', [-5, 2**31, 2**62])
def test_impossible_steps_fits_epochs_and_batches(tmp_path, name, value):
    a = ARRAYS[name].copy()
    a[-1 if value > 0 else 0] = value
    refused(write(tmp_path/'a.npz', **{name: a}), f'`{name}` must be from')


def test_a_huge_number_of_fits_without_names(tmp_path):
    refused(write(tmp_path/'a.npz', fit=ARRAYS['fit']*2_000_000_000), '`fit` must be below')
    rec = Recording.load(write(tmp_path/'a.npz', fit=ARRAYS['fit']*900_000, loss_fit=ARRAYS['loss_fit']*900_000))
    assert 'unfreeze: 2 epochs, 4 rows' in repr(rec)


@pytest.mark.parametrize('meta', META, ids=str)
def test_metadata_of_the_wrong_type(tmp_path, meta):
    meta = {'format': FORMAT, **meta} if isinstance(meta, dict) else json.dumps(meta)
    refused(write(tmp_path/'a.npz', meta=meta))


@pytest.mark.parametrize('text', ['', '{', '['*100_000, '{"format": '+'9'*10_000+'}'], ids=['empty', 'half', 'deep', 'long'])
def test_metadata_that_are_no_json(tmp_path, text): refused(write(tmp_path/'a.npz', meta=text), "can't be read as a recording")


def test_metadata_that_are_no_text(tmp_path):
    for bad in (np.zeros(3), np.array(['{}', '{}']), np.array(b'{}')):
        np.savez(tmp_path/'a.npz', **ARRAYS, meta=bad)
        refused(tmp_path/'a.npz', 'metadata are')


CONTENTS = {
    'negative': (dict(hist=-ARRAYS['hist']), '`hist` has counts that are negative'),
    'one more': (dict(over=ARRAYS['over']+np.eye(len(REC), 2, dtype=int)),
                 r"do not add up. The first is row 0 of '0.weight': it counts 51 elements, but `numel` is 50"),
    'too few': (dict(hist=ARRAYS['hist']*0), 'do not add up'),
    'wraps': (dict(hist=np.full_like(ARRAYS['hist'], 2**62, dtype=np.int64)), 'negative or too large'),
    'falling': (dict(edges=ARRAYS['edges'][:, ::-1]), "edges of '0.weight' do not increase"),
    'half known': (dict(edges=np.where(np.arange(11) > 5, np.nan, ARRAYS['edges'])), "edges of '0.weight' do not increase"),
    'twice': (dict(names=np.array(['a', 'a'])), "layer 'a' is there twice"),
    'order': (dict(step=ARRAYS['step'][::-1]), r'`step` is not in order of time: \(step, fit, epoch, batch\) \(4, 0, 0, 1\) follows'),
    'step twice': (dict(step=np.minimum(ARRAYS['step'], 3)), '`step` is not in order of time'),
    'order of losses': (dict(loss_fit=ARRAYS['loss_fit'][::-1]), '`loss_step` is not in order of time'),
    'order of validation': (dict(valid_step=ARRAYS['valid_step'][::-1]), '`valid_step` is not in order of time'),
    'validation items': (dict(valid_n=-ARRAYS['valid_n']), '`valid_n` must not be negative'),
    'unknown array': (dict(other=np.zeros(3)), r"\['other'\] do not belong there"),
    'shape': (dict(mean=ARRAYS['mean'][:-1]), '`mean` has size 5 along T'),
    'dimensions': (dict(mean=ARRAYS['mean'][0]), '`mean` must have 2 dimensions'),
    'bins': (dict(edges=ARRAYS['edges'][:, 1:]), '10 bins need 11 edges')}


@pytest.mark.parametrize('changed,text', CONTENTS.values(), ids=CONTENTS)
def test_contents_that_contradict_each_other(tmp_path, changed, text):
    refused(write(tmp_path/'a.npz', **changed), text)
    if 'other' not in changed and 'mean' not in changed and len(changed.get('edges', [[]*11])[0]) != 10:
        with pytest.raises(ValueError, match=f'not saved, since it could not be loaded again: .*{text}'):
            replace(REC, **changed).save(tmp_path/'b.npz') # what can't be loaded is not saved


def mutated(raw, at, value):
    b = bytearray(raw)
    b[at%len(b):at%len(b)+len(value)] = value
    return bytes(b)


@pytest.fixture(scope='module')
def raw(tmp_path_factory): return write(tmp_path_factory.mktemp('raw')/'a.npz').read_bytes()


@settings(max_examples=400)
@given(at=st.integers(0, 10**6), value=st.binary(min_size=1, max_size=8), end=st.booleans())
def test_no_change_of_bytes_gives_another_recording(raw, tmp_path_factory, at, value, end):
    f = tmp_path_factory.mktemp('bytes')/'a.npz'
    at = len(raw)-at%4000 if end else at # the last bytes are the directory of the zip file
    f.write_bytes(mutated(raw, at, value))
    try: assert Recording.load(f).is_same(REC)
    except ValueError as e: assert 'a.npz' in str(e)


@settings(max_examples=300)
@given(data=st.data())
def test_no_change_of_arrays_gives_another_recording_or_another_error(tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(ARRAYS)))
    a = ARRAYS[name]
    how = data.draw(st.sampled_from(['drop', 'rename', 'scalar', 'longer', 'shorter', 'axis', 'object', *TYPES, 'order', 'endian', 'wide']))
    new = {n: v for n, v in ARRAYS.items() if n != name}
    if how in TYPES and a.dtype.kind in 'Uf' and how in ('text', 'float', 'nan'): return # the right type: other values can't be told
    if how == 'rename': new[name+'s'] = a
    elif how == 'scalar': new[name] = a.ravel()[0]
    elif how == 'longer': new[name] = np.concatenate([a, a[-1:]])
    elif how == 'shorter': new[name] = a[:-1]
    elif how == 'axis': new[name] = a[None]
    elif how == 'object': new[name] = a.astype(object)
    elif how == 'order': new[name] = np.asfortranarray(a)
    elif how == 'endian': new[name] = a.astype(a.dtype.newbyteorder('>'))
    elif how == 'wide': new[name] = a.astype({'i': 'i8', 'f': 'f8', 'U': 'U99', 'b': '?'}[a.dtype.kind])
    elif how in TYPES:
        if a.dtype.kind == 'U': return
        new[name] = TYPES[how](a)
    f = tmp_path_factory.mktemp('arrays')/'a.npz'
    np.savez(f, **new, meta=json.dumps({'format': FORMAT, 'phases': ['freeze', 'unfreeze']}))
    try: rec = Recording.load(f)
    except ValueError as e: assert 'a.npz' in str(e)
    else:
        assert how in ('order', 'endian', 'wide', 'drop')
        assert rec.is_same(REC) # kind and norms may be missing in files of format 1


def header(shape, descr):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, dict(descr=descr, fortran_order=False, shape=shape))
    return out.getvalue()


BOMBS = { # name of a member -> its header
    'unknown': ('other', header((2**24*5,), '<i4')), 'more rows': ('mean', header((2**21*10, 2), '<f8')),
    'names': ('names', header((2,), '<U40000000')),
    'meta': ('meta', header((), '<U80000000')), 'kind': ('kind', header((2**24*5,), '<U1'))}


@pytest.mark.slow
@pytest.mark.parametrize('name,head', BOMBS.values(), ids=BOMBS)
def test_a_small_file_does_not_fill_the_memory(tmp_path, name, head):
    "A third of a gigabyte of zeros takes a third of a megabyte on disk"
    write(tmp_path/'a.npz')
    with zipfile.ZipFile(tmp_path/'a.npz') as z: members = {n: z.read(n) for n in z.namelist()}
    members.pop(name+'.npy', None)
    with zipfile.ZipFile(tmp_path/'bomb.npz', 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for n, b in members.items(): z.writestr(n, b)
        with z.open(name+'.npy', 'w', force_zip64=True) as f:
            f.write(head)
            for _ in range(20): f.write(bytes(2**24))
    code = f'''
import resource
from fastai_bnstats.recording import Recording
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try: Recording.load({str(tmp_path/'bomb.npz')!r})
except ValueError as e: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before, e)
'''
    kilobytes, text = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split(' ', 1)
    assert int(kilobytes) < 50_000 and 'bomb.npz' in text


def test_a_recording_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('fastai_bnstats.recording.file_format.memory_size', lambda: 1000)
    with pytest.raises(ValueError, match='needs .* GB of memory, more than this machine has. Load it on another machine'):
        Recording.load(write(tmp_path/'a.npz'))
