"""What the trackers have stored, read back: the edges and counts of the recording, and every loss"""
import sys
from dataclasses import replace

import numpy as np
import pytest

from fastai_bnstats.export import SINKS, Hist, Sink, points, send, to_tensorboard, to_trackio, to_wandb
from fastai_bnstats.recording import empty_recording
from helpers import make
from trackers import by_name, from_tensorboard, from_trackio, from_wandb, trackio_in, wandb_offline


@pytest.fixture(scope='module')
def offline(tmp_path_factory):
    with wandb_offline(tmp_path_factory.mktemp('wandb')) as wandb: yield wandb


@pytest.fixture
def trackio(tmp_path):
    with trackio_in(tmp_path) as trackio: yield trackio


def recording(bins=10):
    "Two phases, elements beyond the edges, a loss that is not a number"
    rec = make(P=2, G=2)
    assert rec.under.any() and rec.over.any()
    rec = replace(rec, loss=np.where(rec.loss_step == 5, np.nan, rec.loss), nonfinite=rec.nonfinite+(rec.step == 3)[:, None],
                  numel=rec.numel+(rec.step == 3)[:, None])
    return rec


def check(rec, found, edges_of=lambda h: (h[0], h[1])):
    "Is all that was read what was sent?"
    sent = by_name(points(rec))
    assert set(found) == set(sent)
    for n, values in sent.items():
        assert [s for s, _ in found[n]] == [s for s, _ in values], n
        for (_, want), (_, got) in zip(values, found[n], strict=True):
            if isinstance(want, Hist):
                edges, counts = edges_of(got)
                assert edges.tolist() == want.edges[-len(edges):].tolist() and counts.tolist() == want.counts.tolist(), n
            elif isinstance(want, str): assert got == want
            else: assert float(got) == pytest.approx(want, rel=1e-6, nan_ok=True), n
    for i, n in enumerate(rec.names): # without the function that is tested
        for row, (_, got) in enumerate(found[f'weights/{n}']):
            edges, counts = edges_of(got)
            assert counts[1:-1].tolist() == rec.hist[row, i].tolist() and edges[-12:-1].tolist() == rec.edges[i].tolist()
            assert [counts[0], counts[-1]] == [rec.under[row, i], rec.over[row, i]]


def test_tensorboard(tmp_path):
    rec = recording()
    assert to_tensorboard(rec, tmp_path/'run') == tmp_path/'run'
    found = from_tensorboard(tmp_path/'run')
    check(rec, found)
    for i, n in enumerate(rec.names):
        for row, (_, (_, _, h)) in enumerate(found[f'weights/{n}']):
            k = rec.numel[row, i]-rec.nonfinite[row, i]
            assert h.num == k and h.sum == pytest.approx(k*rec.mean[row, i])
            assert h.sum_squares/k-(h.sum/k)**2 == pytest.approx(rec.var[row, i])


def test_tensorboard_draws_between_our_edges(tmp_path):
    "Its dashboard gets buckets without the empty ones at both ends, which end at `min` and `max`"
    from tensorboard import data_compat
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
    from tensorboard.util.tensor_util import make_ndarray
    rec = make(P=1)
    to_tensorboard(rec, tmp_path)
    file, = tmp_path.iterdir()
    rows = [v for e in LegacyEventFileLoader(str(file)).Load() for v in e.summary.value if v.tag == 'weights/0.weight']
    assert len(rows) == len(rec)
    e = rec.edges[0]
    edges = np.array([2*e[0]-e[1], *e, 2*e[-1]-e[-2]], np.float32)
    for row, v in enumerate(rows):
        drawn = make_ndarray(data_compat.migrate_value(v).tensor)
        counts = np.array([rec.under[row, 0], *rec.hist[row, 0], rec.over[row, 0]])
        used = np.flatnonzero(counts)
        some = slice(used[0], used[-1]+1)
        np.testing.assert_array_equal(drawn, np.stack([edges[:-1][some], edges[1:][some], counts[some].astype(np.float32)], 1))


def test_a_writer_of_the_user_stays_open(tmp_path):
    from torch.utils.tensorboard import SummaryWriter
    rec = make(P=1)
    with SummaryWriter(str(tmp_path)) as writer:
        assert to_tensorboard(rec, writer) == tmp_path
        writer.add_scalar('mine', 1., 0)
    assert from_tensorboard(tmp_path)['mine'] == [(0, 1.)]


@pytest.mark.slow
def test_wandb(offline):
    rec = recording()
    run = to_wandb(rec, 'project')
    found, axes = from_wandb(run)
    check(rec, found)
    assert axes == {f'{n}/*': 'step' for n in ('weights', 'weights_mean', 'weights_sd', 'weights_nonfinite', 'loss', 'lr')}
    assert run.project == 'project'
    assert offline.run is None


@pytest.mark.slow
def test_an_active_run_of_wandb_keeps_its_values_and_stays_open(offline):
    rec = make(P=1)
    with offline.init(project='mine') as run:
        for k in range(50): offline.log({'mine': k}) # its step is past all of ours
        assert to_wandb(rec) is run
        assert to_wandb(replace(rec, meta={**rec.meta, 'quantity': 'gradients'}), run) is run
        offline.log({'mine': 50})
    found, _ = from_wandb(run)
    assert [v for _, v in found['mine']] == list(range(51))
    for q in ('weights', 'gradients'): assert [s for s, _ in found[f'{q}/0.weight']] == rec.step.tolist()


@pytest.mark.slow
def test_wandb_takes_at_most_512_bins(offline):
    rec = make(P=1, fits=[('a', 1)])
    edges, hist = np.linspace(-2, 2, 1201), np.random.default_rng(0).integers(0, 9, (len(rec), 1, 1200))
    rec = replace(rec, edges=edges[None], hist=hist, numel=hist.sum(-1)+rec.under+rec.over)
    found, _ = from_wandb(to_wandb(rec, 'project'))
    for row, (_, (e, n)) in enumerate(found['weights/0.weight']):
        assert len(n) == 402 and e[1:-1].tolist() == edges[::3].tolist()
        assert n[1:-1].tolist() == hist[row, 0].reshape(-1, 3).sum(1).tolist()


def test_trackio(trackio, capsys):
    rec = recording()
    run = to_trackio(rec, 'project')
    check(rec, from_trackio('project', run.name))
    assert trackio.context_vars.current_run.get() is None


def test_an_active_run_of_trackio_stays_open(trackio, capsys):
    rec = make(P=1)
    mine = trackio.init('mine', embed=False, auto_log_cpu=False, auto_log_gpu=False)
    assert to_trackio(rec) is mine and to_trackio(rec, mine, layers='0.*') is mine
    trackio.log({'mine': 1}, step=3)
    trackio.finish()
    found = from_trackio('mine', mine.name)
    assert found['mine'] == [(3, 1)] and len(found['weights/0.weight']) == 2*len(rec)


def test_no_run_of_trackio(trackio):
    with pytest.raises(ValueError, match='No run of Trackio is active. Pass the name of a project, or call trackio'): to_trackio(make())


@pytest.mark.parametrize('name', SINKS)
def test_wrong_places(name):
    with pytest.raises(TypeError, match=r'(where|run) must be a .*, or None. Found 3.'): SINKS[name](3)


@pytest.mark.parametrize('name, package', [('tensorboard', 'torch.utils.tensorboard'), ('wandb', 'wandb'), ('trackio', 'trackio')])
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name} is not installed \(.*\). Run: pip install 'fastai_bnstats\[export\]'"): SINKS[name]()


def test_wrong_arguments_open_nothing(tmp_path):
    for kw in (dict(layers='gone'), dict(every=0)):
        with pytest.raises(ValueError): to_tensorboard(make(), tmp_path/'run', **kw)
    with pytest.raises(TypeError): to_tensorboard(None, tmp_path/'run')
    assert not (tmp_path/'run').exists()


def test_a_sink_is_closed_when_it_fails():
    class Fails(Sink):
        closed = False
        def log(self, values, step): raise OSError('full')
        def close(self): self.closed = True
    sink = Fails()
    with pytest.raises(OSError, match='full'): send(points(make()), sink)
    assert sink.closed
    with pytest.raises(NotImplementedError, match=r'Sink must define `log\(values, step\)`'): send(points(make()), Sink())


@pytest.mark.parametrize('recs, message', [
    ([], 'Nothing to send: the list is empty.'),
    (empty_recording(['a'], [[0, 1, 2]]), 'Nothing to send: no rows and no losses. Train with the callback attached'),
    ([make(P=2), make(P=1)], 'Two recordings have weights/0.weight. Pass several recordings only if they are of one training')])
def test_what_would_be_lost_or_mixed_is_refused(recs, message, tmp_path):
    for send_to in (to_tensorboard, to_wandb, to_trackio):
        with pytest.raises(ValueError, match=message): send_to(recs, tmp_path/'run' if send_to is to_tensorboard else 'p')
    assert not (tmp_path/'run').exists()


def test_parts_of_one_training_go_together(tmp_path):
    rec = make(P=2)
    to_tensorboard([rec.sel(layers=0), rec.sel(layers=1), replace(rec, meta={**rec.meta, 'quantity': 'updates'})], tmp_path)
    found = from_tensorboard(tmp_path)
    assert {'weights/0.weight', 'weights/1.weight', 'updates/0.weight'} <= set(found)


def test_a_folder_with_event_files_warns(tmp_path):
    rec = make(P=1)
    to_tensorboard(rec, tmp_path/'run')
    with pytest.warns(UserWarning, match=r'run has event files already, and TensorBoard draws .* Pass a new folder') as heard:
        to_tensorboard(rec, str(tmp_path/'run'))
    assert len(heard) == 1 and heard[0].filename == __file__
    to_tensorboard(rec, tmp_path/'run'/'2')
