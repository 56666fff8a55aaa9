"""Recording in several processes: what rank 0 records is what it saw, and the others say that they record nothing"""
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import ranks

from fastai_bnstats.recording import Recording

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not importlib.util.find_spec('accelerate'), reason='fastai needs accelerate for a distributed fit')]
NAMES = 'weight_hist', 'grad_hist', 'update_hist', 'activation_hist', 'output_grad_hist'


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp('processes')
    ps = ranks(Path(__file__).parent/'distributed_record.py', folder)
    assert (folder/'0.pt').exists() and (folder/'1.pt').exists(), [p.stderr[-3000:] for p in ps]
    return folder, *({**torch.load(folder/f'{rank}.pt'), 'process': p} for rank, p in enumerate(ps))


def counted(rec, name, tensors):
    "Is each row of this tensor the histogram of one of `tensors`, by NumPy?"
    i = rec.names.tolist().index(name)
    assert len(rec) == len(tensors)
    for row, x in enumerate(tensors):
        x = x.numpy().ravel()
        np.testing.assert_array_equal(rec.hist[row, i], np.histogram(x, rec.edges[i])[0])
        assert rec.numel[row, i] == x.size
        np.testing.assert_allclose([rec.mean[row, i], rec.var[row, i]], [x.mean(dtype=float), x.var(dtype=float)], rtol=1e-5, atol=1e-12)


def test_rank_0_records_what_it_saw(seen):
    folder, first = seen[0], seen[1]['memory']['saw']
    recs = {n: Recording.load(folder/'memory'/f'{n}.npz') for n in NAMES}
    weights = recs['weight_hist']
    assert {'0.0.weight', '0.1.running_mean', '1.3.bias'} <= {*weights.names}
    assert not any('module' in n for r in recs.values() for n in r.names)
    for n in weights.names: counted(weights, n, [w[n] for w in first['weights']])
    for n in recs['grad_hist'].names: counted(recs['grad_hist'], n, [g[n] for g in first['grads']])
    for n in recs['update_hist'].names:
        counted(recs['update_hist'], n, [w[n]-b[n] for w, b in zip(first['weights'], first['before'], strict=True)])
    counted(recs['activation_hist'], '1.3', first['output'])
    assert (recs['output_grad_hist'].numel[:, -1] == [2*n for n in (8, 8, 2)*2]).all()


def test_gradients_are_means_of_all_processes_and_losses_are_local(seen):
    folder, (first, other) = seen[0], (r['memory']['saw'] for r in seen[1:])
    rec = Recording.load(folder/'memory/grad_hist.npz')
    for row, (a, b) in enumerate(zip(first['local_grads'], other['local_grads'], strict=True)):
        for i, n in enumerate(rec.names):
            mean = ((a[n]+b[n])/2).numpy()
            assert not a[n].equal(b[n])
            np.testing.assert_allclose(rec.mean[row, i], mean.mean(dtype=float), atol=1e-6)
            np.testing.assert_allclose(rec.var[row, i], mean.var(dtype=float), rtol=1e-4)
    np.testing.assert_allclose(rec.loss, first['loss'], rtol=1e-6)
    np.testing.assert_allclose(rec.valid_loss, first['valid_loss'], rtol=1e-6)
    assert rec.valid_n.tolist() == first['valid_n'] == [8, 8, 2]*2 # 35 items: one is there twice, so that both have as many
    assert not np.isclose(first['loss'], other['loss']).any()
    same = {n for n, w in first['weights'][-1].items() if w.equal(other['weights'][-1][n])}
    assert {*first['weights'][-1]}-same == {f'{bn}.running_{k}' for bn in ('0.1', '0.4', '1.2') for k in ('mean', 'var')}


@pytest.mark.parametrize('name', NAMES)
def test_a_folder_holds_what_memory_holds(name, seen):
    folder = seen[0]
    chunks = {'weight_hist': 'weights', 'grad_hist': 'grads', 'update_hist': 'updates', 'activation_hist': 'outputs',
              'output_grad_hist': 'output_grads'}[name]
    in_memory, in_folder = Recording.load(folder/'memory'/f'{name}.npz'), Recording.load(folder/'chunks'/chunks)
    assert len(in_memory) == 6 and in_memory.is_same(in_folder)


def test_other_ranks_say_that_they_are_empty_and_replace_no_file(seen):
    _, first, other = seen
    for name in ('memory', 'path', 'accumulation'):
        assert not first[name]['said']['warnings'] and 0 not in first[name]['said']['rows']
        said = other[name]['said']
        assert len(said['warnings']) == 5 and said['rows'] == [0]*5
        assert said['warnings'][0] == ("This WeightHistCallback is empty, because this process has rank 1, and only the one with rank 0 "
            "records. Draw and save there: `if not rank_distrib(): ...`. Here, .recording.save() writes no file.")
        assert 'empty, because this process has rank 1, and only the one with rank 0 records' in said['repr']


def test_accumulated_gradients_are_recorded_once_they_are_exchanged(seen):
    folder, (first, other) = seen[0], (r['accumulation']['saw'] for r in seen[1:])
    rec = Recording.load(folder/'accumulation/grad_hist.npz')
    assert len(rec) == 1 and len(rec.loss) == 3 # 8 items, 8 items and a step, 2 items
    for n in rec.names:
        counted(rec, n, [g[n] for g in first['grads']])
        np.testing.assert_allclose(first['grads'][0][n], other['grads'][0][n])
        a, b = (sum(g[n] for g in saw['local_grads'][:2])/2 for saw in (first, other))
        np.testing.assert_allclose(rec.mean[0, rec.names.tolist().index(n)], ((a+b)/2).mean(), atol=1e-6)


def test_an_error_while_recording_stops_no_process(seen):
    first, other = (r['error'] for r in seen[1:])
    assert len(first['warnings']) == 1 and 'stopped recording in end_step: RuntimeError: out of order' in first['warnings'][0]
    assert first['rows'] == 1 and not other['warnings']
    assert all(w.equal(other['weights'][n]) for n, w in first['weights'].items() if 'running' not in n)


def test_rank_0_probes_the_loss_landscape_and_the_training_stays_as_it_is(seen): # test_a_folder_holds... compares a fit with probes
    folder, first, other = seen
    assert first['probes'] == pytest.approx(first['path']['saw']['loss'][::2], rel=1e-5) and other['probes'] == []
    assert len(first['landscape']) == 1 and 'This LandscapeCallback is empty, because this process has rank 1' in other['landscape'][1]


def test_the_guide_shows_the_script_that_it_runs():
    guide = Path(__file__).parents[2]/'nbs/guides/13_processes.ipynb'
    shown = [''.join(o['data']['text/markdown']) for c in json.loads(guide.read_text())['cells'] for o in c.get('outputs', [])
             if 'text/markdown' in o.get('data', {})]
    assert shown == [f"```python\n{guide.with_name('two_processes.py').read_text()}```"]


def test_a_wrong_argument_ends_all_processes(seen):
    first, other = (r['process'] for r in seen[1:])
    assert first.returncode and "layers='fc' matches no parameter or buffer" in first.stderr
    assert other.returncode # the connection was closed
