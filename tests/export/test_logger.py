"""What is sent during training is what the finished recordings have, and a tracker that fails changes nothing"""
import pickle
import warnings

import pytest
import torch
from fastai.basics import Callback, CancelFitException, set_seed
from fastai.callback.training import GradientAccumulation

from fastai_bnstats.all import (ActivationHistCallback, GradHistCallback, HistLogger, OutputGradHistCallback, Recording, UpdateHistCallback,
                                WeightHistCallback, to_tensorboard, to_trackio, to_wandb)
from fastai_bnstats.export import Sink, points
from helpers import loaders, tiny_learner
from trackers import by_name, from_tensorboard, from_trackio, from_wandb, plain, trackio_in, wandb_offline


class Memory(Sink):
    "Keeps what it gets"
    def __init__(self): self.got, self.flushed, self.closed = [], 0, 0
    def log(self, values, step): self.got.append((step, values))
    def flush(self): self.flushed += 1
    def close(self): self.closed += 1


def recordings(learn): return [cb.recording for cb in learn.cbs if hasattr(cb, 'recording')]


def check(learn, sink, layers=None, every=1):
    assert plain(sink.got) == plain(points(recordings(learn), layers, every)) and sink.got


ALL = WeightHistCallback, GradHistCallback, UpdateHistCallback, ActivationHistCallback, OutputGradHistCallback


def test_all_recorders_over_two_phases():
    sink = Memory()
    learn = tiny_learner(cbs=[*(c() for c in ALL), HistLogger(sink)])
    learn.weight_hist.phase = 'freeze'
    learn.freeze_non_bn()
    learn.fit(2)
    assert sink.flushed == 3 and not sink.closed # two epochs, and the end of the fit
    learn.weight_hist.phase = 'unfreeze'
    learn.unfreeze()
    learn.fit(1)
    check(learn, sink)
    got = by_name(sink.got)
    assert [v for _, v in got['phase']] == ['freeze', 'unfreeze']
    assert {n.partition('/')[0] for n in got if '.' in n} >= {'weights', 'gradients', 'updates', 'outputs', 'output_gradients'}
    assert [s for s, _ in got['gradients/0.0.weight']] == list(range(8, 12)) # frozen before


@pytest.mark.parametrize('recorders, cbs, kw', [
    ([lambda: WeightHistCallback('all', every=3)], [], dict(every=2)),
    ([lambda: WeightHistCallback(every=16)], [], {}),
    ([lambda: WeightHistCallback('all'), lambda: GradHistCallback(every=2)], [], dict(layers=['0.*', '1.3.bias'])),
    ([lambda: GradHistCallback(), lambda: WeightHistCallback()], [lambda: GradientAccumulation(40)], {})], # more than one epoch has not
    ids=['every', 'every=16', 'layers', 'accumulation'])
def test_several_fits(recorders, cbs, kw):
    sink = Memory()
    learn = tiny_learner(dls=loaders(48), cbs=[*(f() for f in [*recorders, *cbs]), HistLogger(sink, **kw)])
    learn.freeze_body()
    learn.fit(2)
    learn.unfreeze()
    learn.fit(2)
    check(learn, sink, **kw)


def test_a_recording_in_a_folder(tmp_path):
    sink = Memory()
    learn = tiny_learner(cbs=[WeightHistCallback(path=tmp_path/'run'), HistLogger(sink)])
    learn.fit(2)
    assert plain(sink.got) == plain(points(Recording.load(tmp_path/'run')))


def test_validations_predictions_and_lr_find_send_nothing():
    sink = Memory()
    learn = tiny_learner(cbs=[WeightHistCallback(), HistLogger(sink)])
    learn.validate(); learn.get_preds()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # fastai's about pickled files
        learn.lr_find(num_it=6, show_plot=False)
    assert not sink.got
    learn.fit(1)
    learn.get_preds(); learn.validate()
    check(learn, sink)


class Validates(Callback):
    "Validates once more, before the validation of the epoch"
    def after_train(self): self.learn.validate()


def test_a_validation_within_an_epoch():
    sink = Memory()
    learn = tiny_learner(cbs=[WeightHistCallback(), HistLogger(sink), Validates()])
    learn.fit(2)
    def flat(got): return [(step, *item) for step, values in plain(got) for item in values.items()] # it was sent in two parts
    assert flat(sink.got) == flat(points(recordings(learn)))
    assert sink.flushed > 3 and [s for s, _ in by_name(sink.got)['loss/valid']] == [3, 7]


def test_edges_that_come_late():
    "The gradient of the first layer is zero in all of the first fit, since the second layer is; its edges are chosen later"
    sink = Memory()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3), torch.nn.Linear(3, 2))
    torch.nn.init.zeros_(model[2].weight)
    learn = tiny_learner(model, cbs=[GradHistCallback(), HistLogger(sink)], wd=0.)
    learn.fit(1, 0.)
    early = learn.grad_hist.recording.edges[0]
    learn.fit(1, .1)
    rec = learn.grad_hist.recording
    assert not (rec.edges[0] == early).all() # those that the recording made up in between
    check(learn, sink)
    assert [s for s, _ in by_name(sink.got)['gradients/1.weight']] == rec.step[rec.var[:, 0] > 0].tolist() == [5, 6, 7]


class Stops(Callback):
    order = 40
    def __init__(self, error): self.error = error
    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 2): raise self.error


def test_a_fit_that_is_cancelled_or_fails():
    sink = Memory()
    learn = tiny_learner(cbs=[WeightHistCallback(), HistLogger(sink)])
    learn.fit(3, cbs=Stops(CancelFitException()))
    check(learn, sink)
    assert len(learn.weight_hist.recording) == 7
    with pytest.raises(KeyError): learn.fit(3, cbs=Stops(KeyError('x')))
    sent = len(sink.got)
    learn.fit(1) # what the failed fit had recorded is sent with the next one
    assert [s for s, _ in sink.got[sent:]] == list(range(11, 18)) and 13 not in by_name(sink.got)['weights/0.0.weight']
    check(learn, sink)


def test_reset_begins_again():
    sink = Memory()
    learn = tiny_learner(cbs=[WeightHistCallback(), HistLogger(sink)])
    learn.fit(1)
    learn.weight_hist.reset()
    sink.got.clear()
    learn.fit(2)
    check(learn, sink)


def test_training_is_the_same(tmp_path):
    def bits(*cbs):
        learn = tiny_learner(cbs=[WeightHistCallback(), *cbs])
        set_seed(3)
        learn.fit(2)
        return torch.cat([p.flatten() for p in learn.model.state_dict().values()]), learn.weight_hist.recording
    (a, r), (b, s) = bits(), bits(HistLogger('tensorboard', tmp_path))
    assert a.equal(b) and r.is_same(s)


class Fails(Memory):
    def log(self, values, step):
        if len(self.got) == 2: raise OSError('No space left on device.')
        super().log(values, step)


def test_a_failure_warns_once_and_training_goes_on():
    sink = Fails()
    learn = tiny_learner(cbs=[WeightHistCallback(), HistLogger(sink)])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        learn.fit(2)
        learn.fit(1)
        learn.hist_logger.close()
    said = [str(w.message) for w in heard if 'HistLogger' in str(w.message)]
    assert said == ['HistLogger stopped sending: OSError: No space left on device. Training and recording go on. '
                    'The recordings are complete: send them later, for example with to_tensorboard.']
    assert len(learn.weight_hist.recording) == 12 and len(sink.got) == 2 and sink.closed == 1


def test_a_recording_that_cannot_be_read_does_not_stop_training(monkeypatch):
    learn = tiny_learner(cbs=[WeightHistCallback(), HistLogger(Memory())])
    def fails(self): raise OSError('gone')
    with pytest.warns(UserWarning, match='HistLogger stopped sending: OSError: gone'), monkeypatch.context() as m:
        m.setattr(WeightHistCallback, 'recording', property(fails))
        learn.fit(1)
    assert len(learn.weight_hist.recording) == 4


def test_close_sends_the_rest_and_ends_it():
    sink = Memory()
    learn = tiny_learner(cbs=[WeightHistCallback(), HistLogger(sink)])
    learn.fit(1)
    learn.hist_logger.close()
    learn.hist_logger.close()
    assert sink.closed == 1
    check(learn, sink)


def test_without_a_learner_it_sends_nothing_and_closes():
    sink = Memory()
    h = HistLogger(sink)
    assert h.recorders == [] and h.send() is None # never attached
    learn = tiny_learner(cbs=WeightHistCallback())
    learn.fit(1, cbs=h)
    check(learn, sink)
    h.send()
    h.close()
    assert sink.closed == 1 and h.sink is None
    check(learn, sink)


def test_a_closed_one_says_that_it_is_closed():
    learn = tiny_learner(cbs=[WeightHistCallback(), HistLogger(Memory())])
    learn.fit(1)
    learn.hist_logger.close()
    with pytest.warns(UserWarning, match=r'This HistLogger was closed and sends nothing. Replace it .*add_cb\(HistLogger'): learn.fit(1)
    sink = Memory()
    learn.remove_cb(learn.hist_logger)
    learn.add_cb(HistLogger(sink))
    learn.fit(1)
    check(learn, sink)


def test_copies_send_nothing(tmp_path):
    learn = tiny_learner(cbs=[WeightHistCallback(), HistLogger('tensorboard', tmp_path)])
    learn.fit(1)
    copy = pickle.loads(pickle.dumps(learn.hist_logger))
    learn.remove_cb(learn.hist_logger).add_cb(copy)
    with pytest.warns(UserWarning, match='This HistLogger is a copy, whose tracker stayed with the original'): learn.fit(1)
    assert len(learn.weight_hist.recording) == 8 and len(from_tensorboard(tmp_path)['weights/0.0.weight']) == 4


def test_a_learner_with_it_is_exported(tmp_path):
    learn = tiny_learner(path=tmp_path, cbs=[WeightHistCallback(), HistLogger('tensorboard', tmp_path/'run')])
    learn.fit(1)
    learn.export('x.pkl') # not shadowed by a callback
    assert (tmp_path/'x.pkl').exists()


@pytest.mark.parametrize('args, error, message', [
    (('tensorbord',), ValueError, "to must be one of tensorboard, wandb, trackio, or a Sink. Found 'tensorbord'."),
    ((None,), ValueError, 'Found None'), ((Memory,), ValueError, 'Found <class'),
    ((Memory(), 'runs'), ValueError, 'A Sink knows its place: pass where= only with the name of a tool.'),
    (('tensorboard', 3), TypeError, 'where must be a log folder, a SummaryWriter, or None. Found 3.'),
    ((Memory(), None, None, 0), ValueError, 'every must be a whole number of at least 1. Found 0.')])
def test_wrong_arguments(args, error, message):
    with pytest.raises(error, match=message): HistLogger(*args)


@pytest.mark.parametrize('cbs, message', [
    ([], r'HistLogger found no callback that records. Add one to the learner, such as WeightHistCallback\(\)'),
    ([WeightHistCallback], "No layer matches 'gone'")])
def test_what_cannot_work_stops_before_the_first_batch(cbs, message):
    learn = tiny_learner(cbs=[*(c() for c in cbs), HistLogger(Memory(), layers='gone')])
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match=message): learn.fit(1)
    assert all(a.equal(b) for a, b in zip(before, learn.model.parameters(), strict=True))


def test_only_the_first_process_sends(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    cb = HistLogger('tensorboard', tmp_path/'run')
    monkeypatch.delenv('RANK')
    assert cb.sink is None and not (tmp_path/'run').exists()


def same(a, b):
    assert set(a) == set(b) and a
    for n in a: assert repr(a[n]) == repr(b[n]), n


def test_live_tensorboard(tmp_path):
    learn = tiny_learner(cbs=[WeightHistCallback(), GradHistCallback(), HistLogger('tensorboard', tmp_path/'live')])
    learn.fit(2)
    same(from_tensorboard(tmp_path/'live'), from_tensorboard(to_tensorboard(recordings(learn), tmp_path/'after')))


@pytest.mark.slow
def test_live_trackio(tmp_path, capsys):
    with trackio_in(tmp_path):
        learn = tiny_learner(cbs=[WeightHistCallback(), HistLogger('trackio', 'pets')])
        learn.fit(2)
        learn.hist_logger.close()
        after = to_trackio(recordings(learn), 'pets')
        assert after.name != learn.hist_logger.name
        runs = {r for r in __import__('trackio').sqlite_storage.SQLiteStorage.get_runs('pets')}-{after.name}
        same(from_trackio('pets', runs.pop()), from_trackio('pets', after.name))


@pytest.mark.slow
def test_live_wandb(tmp_path):
    with wandb_offline(tmp_path):
        learn = tiny_learner(cbs=[WeightHistCallback(), HistLogger('wandb', 'pets')])
        learn.fit(2)
        run = learn.hist_logger.sink.run
        learn.hist_logger.close()
        same(from_wandb(run)[0], from_wandb(to_wandb(recordings(learn), 'pets'))[0])
