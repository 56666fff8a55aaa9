"""Weights that FSDP splits between two processes: each measures and compares its own part, and nothing waits for the other"""
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.basics import nn
from forks import ranks
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh

from fastai_bnstats.kinds import check_sharded, local_part
from fastai_bnstats.measure import Past, tensor_stats
from fastai_bnstats.record import edges_of, select_tensors
from fastai_bnstats.recording import Recording

FROZEN = {f'0.{n}' for n in ('0.weight', '1.weight', '1.bias', '3.weight', '4.weight', '4.bias')}
HELD = {f'0.{bn}.{n}' for bn in (1, 4) for n in ('running_mean', 'running_var', 'num_batches_tracked')}


@pytest.fixture(scope='module')
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sharded')
    for p in ranks(Path(__file__).parent/'sharded_fit.py', folder): assert p.returncode == 0, p.stderr[-3000:]
    return folder, *(torch.load(folder/f'{rank}.pt') for rank in (0, 1))


def counted(rec, tensors):
    "Is each row the histogram of these tensors, by NumPy?"
    assert len(rec) == len(tensors)
    for row, xs in enumerate(tensors):
        for i, n in enumerate(rec.names):
            x = xs[n].numpy().ravel() if n in xs else np.zeros(0)
            assert rec.numel[row, i] == x.size and (rec.hist[row, i] == np.histogram(x, rec.edges[i])[0]).all() | (x == x[:1]).all()
            if x.size: np.testing.assert_allclose(rec.mean[row, i], x.mean(dtype=float), rtol=1e-5, atol=1e-8)


@pytest.mark.slow
def test_rank_0_records_its_part(seen):
    folder, first = seen[0], seen[1]['learner']
    weights = Recording.load(folder/'weight_hist.npz')
    assert weights.meta['sharded']['0.0.weight'] == [2*27, 4*27] and '0.1.running_mean' not in weights.meta['sharded']
    assert 'sharded weights: 143 of their 286 values are recorded' in seen[1]['repr']
    counted(weights.sel(layers=[n for n in weights.names if 'running' not in n]), first['weights'])
    assert (weights.numel[:, weights.names == '0.1.running_mean'] == 4).all() # statistics are whole in each process
    counted(Recording.load(folder/'grad_hist.npz'), first['grads'])
    steps = [first['start'], *first['weights']]
    updates = Recording.load(folder/'update_hist.npz')
    counted(updates.sel(layers='1.*'), [{n: b[n]-a[n] for n in b} for a, b in zip(steps, steps[1:], strict=False)])
    assert (updates.step_norm[:, updates.names == '0.0.weight'] == 0).all()
    for name in ('activation_hist', 'output_grad_hist'): assert (Recording.load(folder/f'{name}.npz').numel[:, -1] == 2*16).all()


@pytest.mark.slow
def test_frozen_is_frozen_in_both_processes(seen):
    for r in seen[1:]:
        t, start, last = r['learner']['ledger'], r['learner']['start'], r['learner']['weights'][-1]
        assert {n for n, d in t['declared'].items() if d == 'frozen'} == FROZEN and not {*t['verdict'].values()}-{'ok'}
        assert {n for n, d in t['declared'].items() if d == 'held'} == HELD
        assert {n for n, w in start.items() if not w.equal(last[n])} == {*start}-FROZEN
    assert not seen[1]['learner']['start']['0.0.weight'].equal(seen[2]['learner']['start']['0.0.weight']) # the parts differ


@pytest.mark.slow
def test_each_ledger_judges_its_own_part(seen):
    assert not seen[1]['touched']['verdict'] and seen[2]['touched']['verdict'] == {'0.3.weight': 'BROKEN'}


@pytest.mark.slow
def test_gathered_parameters_are_refused_where_they_would_be_taken_for_others(seen):
    for rank, r in enumerate(seen[1:]):
        assert r['moved'] == 19 and [r['rows'], r['rows again']] == ([2, 4] if rank == 0 else [0, 0])
        assert all('FSDP has gathered the parameters of the model, as after a validation' in e for e in r['errors'])
    assert 'a sharded model (FSDP) would wait for the others' in seen[1]['landscape']


@pytest.fixture
def mesh():
    "That of rank 0 of two; operations that need the other one return nonsense at once, instead of waiting for it"
    from torch.testing._internal.distributed.fake_pg import FakeStore
    torch.distributed.init_process_group('fake', store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh('cpu', (2,))
    torch.distributed.destroy_process_group()


def sharded(mesh, x, how=None): return DTensor.from_local(x, mesh, [how or Shard(0)], run_check=False)


def test_the_part_of_a_tensor(mesh):
    x = torch.randn(3, 4)
    assert local_part(sharded(mesh, x)).data_ptr() == x.data_ptr() and local_part(x) is x
    assert local_part(sharded(mesh, x, Replicate())).equal(x)
    with pytest.raises(ValueError, match='Each process holds a summand of this tensor'): local_part(sharded(mesh, x, Partial()))
    assert not local_part(sharded(mesh, x.requires_grad_())).requires_grad


def test_measures_of_parts(mesh):
    x = torch.randn(3, 4)
    t, edges = sharded(mesh, x), np.linspace(-3, 3, 5)
    assert t.numel() == 24
    stats = tensor_stats([t], [edges])
    assert stats.numel.tolist() == [12] and stats.hist[0].tolist() == np.histogram(x, edges)[0].tolist()
    assert (edges_of([('w', t, None)])[0] == edges_of([('w', x, None)])[0]).all()
    past = Past([t])
    past.begin_fit()
    assert past.start[0].tolist() == x.flatten().tolist()


def test_a_computed_weight_of_sharded_parameters_is_refused(mesh):
    m = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    ps = m.parametrizations.weight
    ps.original1 = nn.Parameter(sharded(mesh, ps.original1.detach()))
    with pytest.raises(ValueError, match='weight is computed from parameters that are split between processes'): select_tensors(m, 'weight')
    assert [n for n, *_ in select_tensors(m, '*original1')] == ['parametrizations.weight.original1']


def test_fsdp1_is_refused():
    class FullyShardedDataParallel(nn.Module): "Its name is what counts"
    with pytest.raises(ValueError, match=r'FSDP1.*hides the layers\' own weights. Shard the model with torch.distributed.fsdp.fully_shard'):
        check_sharded(nn.Sequential(FullyShardedDataParallel()))
