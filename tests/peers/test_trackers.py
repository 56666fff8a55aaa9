"""The recording beside what tracks experiments, and the export of it, in one fit; tests/peers/test_callbacks.py has other callbacks"""
import warnings

import numpy as np
import pytest
from fastai.basics import CrossEntropyLossFlat, Learner, accuracy, set_seed
from fastai.callback.fp16 import AMPMode, MixedPrecision
from fastai.callback.mixup import MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.vision.all import ImageDataLoaders, PILImage

from fastai_bnstats.all import GradHistCallback, HistLogger, WeightHistCallback
from fastai_bnstats.export import Sink, points
from helpers import quiet, tiny_model
from trackers import from_tensorboard, from_wandb, plain, wandb_offline


class Memory(Sink):
    def __init__(self): self.got = []
    def log(self, values, step): self.got.append((step, values))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    path, rng = tmp_path_factory.mktemp('images'), np.random.default_rng(0)
    for k in range(48):
        folder = path/('train' if k%2 else 'valid')/'ab'[k//2%2]
        folder.mkdir(parents=True, exist_ok=True)
        PILImage.create(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder/f'{k}.png')
    return path


def learner(images, folder, *cbs):
    set_seed(0)
    dls = ImageDataLoaders.from_folder(images, valid='valid', bs=8, num_workers=0)
    dls.train.rng.seed(0)
    return quiet(Learner(dls, tiny_model(), loss_func=CrossEntropyLossFlat(), path=folder, metrics=accuracy, cbs=cbs))


def fit(images, folder, companion):
    "Learner after two fits with our callbacks and what `companion` makes; what was sent live"
    sink = Memory()
    learn = learner(images, folder, *companion(folder), WeightHistCallback('all'), GradHistCallback(), HistLogger(sink))
    with warnings.catch_warnings(record=True) as heard: # fastai and torch warn of pickled files, of tracing and of a missing GPU
        warnings.simplefilter('always')
        learn.fit(2, 1e-2)
        learn.fit(1, 1e-2)
    assert not [str(w.message) for w in heard if 'Hist' in str(w.message)]
    return learn, sink.got


def tensorboard(**kw):
    from fastai.callback.tensorboard import TensorBoardCallback
    return lambda folder: [TensorBoardCallback(folder/'tb', **kw)]


SAME = { # companions that don't alter the training
    'TensorBoard': tensorboard(trace_model=False),
    'TensorBoard, no predictions': tensorboard(trace_model=False, log_preds=False),
    'CSVLogger': lambda folder: [CSVLogger(append=True)],
    'EarlyStopping': lambda folder: [EarlyStoppingCallback(patience=9)],
    'SaveModel, at the end': lambda folder: [SaveModelCallback(every_epoch=True)],
    'float16': lambda folder: [MixedPrecision(enabled=False)], # its scaler needs a GPU
    'bfloat16': lambda folder: [MixedPrecision(amp_mode=AMPMode.BF16)]} # without a GPU, fastai computes in float32
OTHER = { # those that do
    'TensorBoard, traced model': tensorboard(trace_model=True), # a forward pass, which moves running statistics
    'SaveModel': lambda folder: [SaveModelCallback()], # loads the best model after a fit
    'MixUp': lambda folder: [MixUp(.4)]}


def recordings(learn): return [learn.weight_hist.recording, learn.grad_hist.recording]


@pytest.fixture(scope='module')
def alone(images, tmp_path_factory): return recordings(fit(images, tmp_path_factory.mktemp('alone'), lambda folder: [])[0])


@pytest.mark.parametrize('name', [*SAME, *OTHER])
def test_beside(name, images, tmp_path, alone):
    learn, got = fit(images, tmp_path, (SAME | OTHER)[name])
    recs = recordings(learn)
    assert all(a.is_same(b) for a, b in zip(recs, alone, strict=True)) == (name in SAME)
    assert plain(got) == plain(points(recs))
    for rec in recs:
        assert len(rec) == len(rec.loss) == 9 and len(rec.valid_loss) == 9
        assert rec.valid_fit.tolist() == [0]*6+[1]*3 and rec.valid_batch.tolist() == [0, 1, 2]*3 # nothing of the predictions of others


def test_tensorboard_callback_in_one_folder(images, tmp_path):
    "fastai's values and ours, each under its own names"
    learn = learner(images, tmp_path, *tensorboard(trace_model=False)(tmp_path), WeightHistCallback(), GradHistCallback(),
                    HistLogger('tensorboard', tmp_path/'tb'))
    learn.fit(1)
    found = from_tensorboard(tmp_path/'tb')
    assert {'train_loss', 'valid_loss', 'accuracy', 'lr_0'} <= {*found} # of fastai
    assert {'loss/train', 'loss/valid', 'lr/0', 'weights/0.0.weight', 'gradients/0.0.weight'} <= {*found}


@pytest.fixture(scope='module')
def wandb(tmp_path_factory):
    with wandb_offline(tmp_path_factory.mktemp('wandb')) as wandb: yield wandb


def with_wandb(folder):
    from fastai.callback.wandb import WandbCallback
    return [WandbCallback(log_preds=False)]


def test_wandb_callback_and_a_run_of_our_own(images, tmp_path, alone, wandb):
    with wandb.init(project='fastai') as run:
        learn = learner(images, tmp_path, *with_wandb(tmp_path), WeightHistCallback('all'), GradHistCallback(), HistLogger('wandb', 'ours'))
        learn.gather_args = dict # else it fails with some versions of fastcore, also without us
        learn.fit(2, 1e-2)
        learn.fit(1, 1e-2)
        own = learn.hist_logger.sink.run
        learn.hist_logger.close()
    assert all(a.is_same(b) for a, b in zip(recordings(learn), alone, strict=True))
    found, (ours, _) = from_wandb(run)[0], from_wandb(own)
    assert len(found['train_loss']) == 9 and len(found['valid_loss']) == 3
    assert len(ours['loss/train']) == len(ours['weights/0.0.weight']) == 9 and len(ours['loss/valid']) == 3


def test_wandb_callback_in_the_same_run(images, tmp_path, wandb):
    with wandb.init(project='fastai'):
        learn = learner(images, tmp_path, *with_wandb(tmp_path), WeightHistCallback(), HistLogger('wandb'))
        learn.gather_args = dict
        with pytest.raises(ValueError, match=r"Give HistLogger another run, such as HistLogger\('wandb', 'project'\)"): learn.fit(1)
