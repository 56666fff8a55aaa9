"""The weight callback records the right numbers at the right steps, and never changes the training"""
import warnings

import numpy as np
import pytest
import torch
from helpers import loaders, quiet, tiny_learner, tiny_model
from fastai.callback.all import GradientAccumulation, TerminateOnNaNCallback
from fastai.basics import SGD, Callback, CancelEpochException, CancelStepException, load_learner, nn, random, set_seed, tensor
from fastai.vision.all import accuracy, cnn_learner, resnet18, vision_learner

from fastai_bnstats.record.callback import WeightHistCallback
from fastai_bnstats.record.targets import Targets
from fastai_bnstats.record.writer import Writer
from fastai_bnstats.record.select import edges_of, named_tensors, select_tensors
from fastai_bnstats.freeze import * # adds freeze_body to Learner
from fastai_bnstats.recording import Recording, full_counts


class Oracle(Callback):
    "Keeps copies of all weights after each step, and all losses"
    order = 56
    def __init__(self): self.w, self.train, self.valid = [], [], []
    def after_step(self): self.w.append({n: p.detach().double().numpy().copy() for n, p in self.model.named_parameters()})
    def after_loss(self): (self.train if self.training else self.valid).append(self.learn.loss.item())


def fit(layers=None, model=None, dls=None, epochs=1, **kwargs):
    "A learner that was trained with `WeightHistCallback(layers, **kwargs)`"
    learn = tiny_learner(model, dls, cbs=WeightHistCallback(layers, **kwargs))
    learn.fit(epochs)
    return learn


def recording(*args, **kwargs): return fit(*args, **kwargs).weight_hist.recording


def chunks(folder): return sorted(p.name for p in folder.iterdir())


def stop_at(event, batch=0, error=KeyboardInterrupt):
    "A callback that raises `error` in the given minibatch of an epoch"
    class Stop(Callback):
        order = 80
    def stop(self):
        if self.iter == batch: raise error
    setattr(Stop, event, stop)
    return Stop()


def test_rows_are_those_of_numpy():
    log = Oracle()
    learn = tiny_learner(cbs=[WeightHistCallback('all'), log])
    learn.fit(2)
    rec = learn.weight_hist.recording
    assert len(rec) == len(log.w) == 8 and rec.names.tolist() == [n for n, t, _ in named_tensors(learn.model) if t.is_floating_point()]
    for t, row in enumerate(log.w):
        for i, n in enumerate(rec.names):
            if n in row:
                np.testing.assert_array_equal(rec.hist[t, i], np.histogram(row[n], rec.edges[i])[0])
                assert rec.mean[t, i] == pytest.approx(row[n].mean(), abs=1e-7)
                assert rec.var[t, i] == pytest.approx(row[n].var(), rel=1e-5, abs=1e-12)
    assert (full_counts(rec).sum(-1) == rec.numel).all()
    np.testing.assert_allclose(rec.loss, log.train)
    np.testing.assert_allclose(rec.valid_loss, log.valid)
    assert rec.epoch.tolist() == [0]*4+[1]*4 and rec.batch.tolist() == [0, 1, 2, 3]*2 and rec.step.tolist() == list(range(8))
    assert rec.valid_n.tolist() == [16, 16]*2 and rec.valid_step.tolist() == [3, 3, 7, 7] and rec.valid_batch.tolist() == [0, 1]*2
    assert rec.stepped.all() and rec.meta['overhead']['seconds'] > 0


def test_edges_come_from_before_the_first_step():
    a, b = (tiny_learner(cbs=WeightHistCallback(), lr=lr) for lr in (1e-2, 1e-1))
    for learn in (a, b): learn.fit(1)
    ra, rb = a.weight_hist.recording, b.weight_hist.recording
    assert (ra.edges == rb.edges).all() and len(ra-rb) == 4


def test_only_fits_are_recorded_and_steps_count_on():
    learn = tiny_learner(cbs=WeightHistCallback())
    learn.weight_hist.phase = 'freeze'
    learn.freeze_body()
    learn.fit_one_cycle(1, 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.lr_find(num_it=6, show_plot=False)
    learn.get_preds()
    learn.validate()
    learn.weight_hist.phase = 'unfreeze'
    learn.unfreeze()
    learn.fit_one_cycle(2, slice(1e-3, 1e-2))
    rec = learn.weight_hist.recording
    assert rec.phase.tolist() == ['freeze']*4+['unfreeze']*8 and rec.step.tolist() == list(range(12)) and rec.fit.tolist() == [0]*4+[1]*8
    assert len(rec.loss) == 12 and len(rec.valid_loss) == 6
    assert rec.trainable[0].tolist() == [False, False, True] and rec.trainable[-1].all()
    assert not rec.sel(phase='freeze', layers='0.*').moved().any()
    assert rec.meta['phases'] == ['freeze', 'unfreeze']


def test_predicting_before_any_fit():
    learn = tiny_learner(cbs=WeightHistCallback())
    learn.validate()
    assert len(learn.weight_hist.recording) == 0


@pytest.mark.slow
@pytest.mark.parametrize('make', [cnn_learner, vision_learner])
def test_vision_learners(make, tmp_path):
    from fastai_bnstats.study import digits
    dls = digits(size=16, bs=64).target
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn = quiet(make(dls, resnet18, pretrained=False, metrics=accuracy, cbs=WeightHistCallback(), path=tmp_path))
    learn.fit(1)
    learn.show_results(max_n=2)
    rec = learn.weight_hist.recording
    assert len(rec) == 8 and len(rec.names) == 22 and rec.lr.shape == (8, 3) # 20 convolutions, 2 linear layers
    learn.export()
    assert learn.weight_hist.recording.is_same(rec) # exporting keeps the recording of this learner
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # load_learner warns about pickle
        back = load_learner(tmp_path/'export.pkl')
    with pytest.warns(UserWarning, match='is a copy, and its recording stayed'): assert len(back.weight_hist.recording) == 0
    back.dls = dls
    quiet(back).fit(1)
    assert len(back.weight_hist.recording) == 8


@pytest.mark.parametrize('n,rows', [(32, [1, 3, 5]), (16, [0, 1, 2, 3, 4, 5]), (48, [2, 5])])
def test_gradient_accumulation(n, rows):
    learn = tiny_learner(dls=loaders(n=96), cbs=[WeightHistCallback(), GradientAccumulation(n)])
    learn.fit(1)
    rec = learn.weight_hist.recording
    assert rec.batch.tolist() == rows and len(rec.loss) == 6 and rec.step.tolist() == list(range(len(rows)))
    assert rec.loss_step.tolist() == [sum(r < b for r in rows) for b in range(6)]


class SkipStep(Callback):
    "Skips a step as mixed precision does when gradients overflow"
    order = 10
    def before_step(self):
        if self.iter == 1: raise CancelStepException()


def test_skipped_steps_are_marked():
    learn = tiny_learner(cbs=[WeightHistCallback(), SkipStep()])
    learn.fit(1)
    rec = learn.weight_hist.recording
    assert rec.stepped.tolist() == [True, False, True, True] and (rec.mean[0] == rec.mean[1]).all() and (rec.mean[1] != rec.mean[2]).any()


def test_every_thins_rows_but_not_losses():
    rec = recording(every=3, epochs=2)
    assert rec.step.tolist() == [0, 3, 6] and len(rec.loss) == 8 and rec.meta['every'] == 3 and 'one row per 3 steps' in repr(rec)


def test_thinned_phases_have_the_same_rows():
    learn = fit(dls=loaders(n=112), every=2) # 7 minibatches per epoch
    learn.fit(1)
    rec = learn.weight_hist.recording
    assert rec.batch.tolist() == [0, 2, 4, 6]*2 and rec.step.tolist() == [0, 2, 4, 6, 7, 9, 11, 13]
    assert len(rec.sel(fit=1)-rec.sel(fit=0)) == 4


@pytest.mark.parametrize('layers,names', [
    (None, ['0.0.weight', '0.3.weight', '1.3.weight']), ('0.*', None), ('1.3.bias', ['1.3.bias']),
    (['0.0.weight', '1.3.*'], ['0.0.weight', '1.3.weight', '1.3.bias']),
    (nn.BatchNorm1d, ['1.2.weight', '1.2.bias', '1.2.running_mean', '1.2.running_var']),
    (lambda n, m: isinstance(m, nn.Linear), ['1.3.weight', '1.3.bias'])])
def test_layers_can_be_selected(layers, names):
    got = [n for n, *_ in select_tensors(tiny_model(), layers)]
    assert got == names if names else all(n.startswith('0.') for n in got) and len(got) == 10


def test_names_of_wrapped_models():
    m = tiny_model()
    assert [n for n, *_ in named_tensors(nn.DataParallel(m))] == [n for n, *_ in named_tensors(m)]
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert [n for n, *_ in named_tensors(tied)] == ['0.weight', '0.bias', '1.bias']


@pytest.mark.parametrize('kwargs,text', [
    (dict(bins=0), 'bins must be a whole number of at least 1. Found bins=0'), (dict(bins=2.5), 'Found bins=2.5'),
    (dict(every=0), 'every must be'),
    (dict(range=(1, 1)), 'finite lo < hi. Found lo=1, hi=1'), (dict(range=(1, 2, 3)), 'takes 2 numbers'),
    (dict(range=('a', 'b')), 'takes 2 numbers'), (dict(range=True), 'Found True'),
    (dict(range=-1), 'positive number of standard deviations'), (dict(range='wide'), "Found 'wide'")])
def test_wrong_arguments_raise_at_once(kwargs, text):
    with pytest.raises(ValueError, match=text.replace('(', r'\(')): WeightHistCallback(**kwargs)


def test_numpy_numbers_are_accepted(): assert WeightHistCallback(bins=np.int64(10), every=np.int64(2), range=np.float32(3)).bins == 10


def test_nothing_to_record_raises_before_the_first_batch():
    log = Oracle()
    learn = tiny_learner(cbs=[WeightHistCallback('conv*'), log])
    with pytest.raises(ValueError, match="matches no parameter or buffer. The model has: 0.0.weight"): learn.fit(1)
    assert not log.train
    with pytest.raises(TypeError, match='Found 3'): select_tensors(tiny_model(), 3)
    with pytest.raises(ValueError, match='Nothing to record'): select_tensors(nn.ReLU())


def test_tensors_without_a_histogram_are_named_in_one_warning():
    m = nn.Module()
    tensors = torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.complex64), torch.ones(0), torch.ones(3)
    m.i, m.c, m.e, m.f = (nn.Parameter(t, requires_grad=False) for t in tensors)
    with pytest.warns(UserWarning, match='integer, complex or empty tensors.*: i, c, e') as ws: got = select_tensors(m, 'all')
    assert len(ws) == 1 and [n for n, *_ in got] == ['f']
    with pytest.warns(UserWarning), pytest.raises(ValueError, match='Nothing to record'): select_tensors(m, ['i', 'e'])


def test_lazy_parameters_are_recorded_once_they_exist():
    m = nn.Sequential(nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(2)))
    rec = recording(model=m)
    assert rec.names.tolist() == ['0.0.weight', '1.2.weight'] and rec.numel[0].tolist() == [108, 8]
    assert not (rec.edges == np.linspace(-1, 1, 41)).all(1).any()


def test_a_lazy_layer_that_is_never_called_has_empty_rows():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.LazyLinear(2), nn.LazyLinear(2)
        def forward(self, x): return self.a(x.flatten(1))
    learn = tiny_learner(Half(), cbs=WeightHistCallback(), opt_func=SGD)
    learn.fit(1)
    rec = learn.weight_hist.recording
    assert rec.numel.tolist() == [[384, 0]]*4 and np.isnan(rec.mean[:, 1]).all() and (full_counts(rec).sum(-1) == rec.numel).all()


class Poison(Callback):
    "Writes nan and inf into a weight in the second minibatch"
    order = 54
    def after_batch(self):
        if self.training and self.iter == 1: self.model[0][0].weight.data[0, 0, 0, :2] = tensor(float('nan'), float('inf'))


def test_nan_weights_are_counted_and_training_continues():
    learn = tiny_learner(cbs=[WeightHistCallback(), Poison()])
    learn.fit(1)
    rec = learn.weight_hist.recording
    assert len(rec) == 4 and rec.nonfinite[1, 0] == 2 and np.isfinite(rec.mean[1, 0])
    assert (rec.nonfinite[3] == rec.numel[3])[:2].all() and np.isnan(rec.mean[3, 0])


def test_the_row_before_terminate_on_nan_is_kept():
    learn = tiny_learner(cbs=[WeightHistCallback(), Poison(), TerminateOnNaNCallback()])
    learn.fit(1)
    assert len(learn.weight_hist.recording) == 3 and np.isnan(learn.weight_hist.recording.loss[-1])


def test_training_is_bit_identical_with_and_without():
    def train(**kw):
        learn = tiny_learner(**kw)
        set_seed(5)
        for dl in learn.dls.loaders: dl.rng = random.Random(5)
        learn.fit_one_cycle(2)
        return learn.model.state_dict()
    a, b = train(), train(cbs=WeightHistCallback('all'))
    assert all(a[k].equal(b[k]) for k in a)


@pytest.mark.parametrize('where', ['measure', 'about'])
def test_a_recording_error_warns_once_and_training_continues(where):
    log, learn = Oracle(), tiny_learner(cbs=WeightHistCallback())
    learn.add_cb(log)
    def boom(): raise RuntimeError('out of luck')
    setattr(learn.weight_hist, where, boom)
    with pytest.warns(UserWarning, match='WeightHistCallback stopped recording.*out of luck.*Training goes on') as ws: learn.fit(2)
    assert len([w for w in ws if 'out of luck' in str(w.message)]) == 1 and len(log.train) == 8


def test_an_interrupted_fit_keeps_its_rows():
    learn = tiny_learner(cbs=WeightHistCallback())
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=stop_at('after_batch', 2))
    learn.fit(1)
    rec = learn.weight_hist.recording
    assert rec.fit.tolist() == [0]*3+[1]*4 and rec.step.tolist() == list(range(7))


def test_another_model_is_refused():
    cb = WeightHistCallback()
    tiny_learner(cbs=cb).fit(1)
    other = tiny_learner(cbs=cb)
    with pytest.raises(ValueError, match=r'recording of another model.*weight_hist.reset\(\)'): other.fit(1)
    cb.reset()
    other.fit(1)
    assert len(cb.recording) == 4


def test_changed_layers_are_refused():
    learn = fit()
    learn.model[1] = nn.Sequential(*list(learn.model[1])[:-1], nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    learn.create_opt()
    with pytest.raises(ValueError, match="layers changed since the last fit.*'1.3.0.weight'"): learn.fit(1)


def test_reordered_layers_are_refused(tmp_path):
    sizes = {'a': 3, 'b': 3}
    writer = Writer.open(tmp_path, False, sizes, ['weight']*2, bins=4)
    writer.add(loss=1., loss_step=0, loss_fit=0, loss_epoch=0, loss_batch=0)
    writer.flush({'quantity': 'weights'})
    writer.release()
    order = 'the same layers, but in another order'
    with pytest.raises(ValueError, match=f'than this callback selects: {order}'):
        Writer.open(tmp_path, True, {'b': 3, 'a': 3}, ['weight']*2, bins=4)
    model = nn.ModuleDict({'a': nn.Linear(1, 3), 'b': nn.Linear(1, 3)})
    a, b = select_tensors(model)
    with pytest.raises(ValueError, match=f'changed since the last fit: {order}'):
        Targets(model, [a, b]).check_same(Targets(model, [b, a]), 'since the last fit', 'reset it.')


def test_range_of_another_recording():
    first = recording(bins=17, range=3)
    assert (recording(range=first).edges == first.edges).all()
    with pytest.raises(ValueError, match='no edges for 1.3.bias'): fit('1.3.*', range=first)
    fixed = edges_of(select_tensors(tiny_model()), 4, (-1, 1))
    np.testing.assert_allclose(fixed[0], [-1, -.5, 0, .5, 1], atol=1e-6)


def test_gamma_is_centred_on_one():
    gamma, beta = (e[[0, -1]].tolist() for e in edges_of(select_tensors(tiny_model(), nn.BatchNorm1d))[:2])
    assert gamma == pytest.approx((0, 2), abs=1e-7) and beta == pytest.approx((-1, 1))


def test_folder_of_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(Writer, 'SMALL', 0) # a chunk for every epoch
    run = tmp_path/'run'
    learn = fit(epochs=2, path=run)
    assert chunks(run) == ['chunk-000000.npz', 'chunk-000001.npz']
    assert Recording.load(run).is_same(learn.weight_hist.recording)
    fit(path=run, resume=True)
    rec = Recording.load(run)
    assert rec.step.tolist() == list(range(12)) and rec.fit.tolist() == [0]*8+[1]*4 and len(rec.valid_loss) == 6
    (run/'chunk-000001.npz').unlink() # the chunk after a missing one must not be overwritten
    with pytest.warns(UserWarning, match='Chunks are missing'): fit(path=run, resume=True)
    assert chunks(run) == [f'chunk-{i:06d}.npz' for i in (0, 2, 3)]
    text = r'different layers than this callback selects: .*are not in both'
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=text): fit('0.*', path=run, resume=True)


def test_folders_that_are_refused(tmp_path):
    run = tmp_path/'run'
    fit(path=run)
    with pytest.raises(FileExistsError, match='not empty. Pass resume=True'): fit(path=run)
    with pytest.raises(ValueError, match='has every=1, but this callback has every=2'): fit(every=2, path=run, resume=True)
    (tmp_path/'file').write_text('')
    with pytest.raises(FileExistsError, match='is a file. path= must be a new or empty folder'): fit(path=tmp_path/'file')
    (tmp_path/'other').mkdir()
    (tmp_path/'other/notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='has other files, but no recording to continue'): fit(path=tmp_path/'other', resume=True)


def test_a_full_disk_stops_only_the_recording(tmp_path):
    learn = tiny_learner(cbs=WeightHistCallback(path=tmp_path/'run'))
    def full(meta): raise OSError(28, 'No space left on device')
    class Fill(Callback):
        def before_train(self): self.learn.weight_hist.writer.flush = full
        order = 90
    with pytest.warns(UserWarning, match='stopped recording.*No space left'): learn.fit(2, cbs=Fill())


def test_two_callbacks_never_share_a_folder(tmp_path):
    from fastai_bnstats.record.quantities import GradHistCallback
    learn = tiny_learner(cbs=[WeightHistCallback(path=tmp_path/'run'), GradHistCallback(path=tmp_path/'run')])
    in_use, remedy = 'in use by another callback or process', "Give each recording a folder of its own, such as path='run/gradients'"
    with pytest.raises(FileExistsError, match=f'{in_use}. {remedy}'): learn.fit(1)
    first, second = fit(path=tmp_path/'two'), fit(path=tmp_path/'two', resume=True)
    changed = f'{in_use} since the last fit, and its files have changed. To continue what is there, use a new callback with resume=True'
    with pytest.raises(FileExistsError, match=changed): first.fit(1)
    assert len(second.weight_hist.recording) == 8


@pytest.mark.parametrize('kw,text', [
    (dict(resume=True), 'path must name a folder, since resume=True'), (dict(path=''), "path must name a folder. Found path=''")])
def test_a_path_must_be_given(kw, text):
    with pytest.raises(ValueError, match=text): WeightHistCallback(**kw)


def test_a_relative_folder_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn = fit(path='run')
    (tmp_path/'else').mkdir()
    monkeypatch.chdir(tmp_path/'else')
    learn.fit(1)
    assert len(learn.weight_hist.recording) == 8 and not (tmp_path/'else/run').exists()


def test_validation_losses_are_saved_without_new_rows(tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 3)), nn.Sequential(nn.Flatten(), nn.Linear(18, 2)))
    learn = fit(model=model, dls=loaders(n=256, bs=1, size=5), path=tmp_path/'run')
    assert len(Recording.load(tmp_path/'run').valid_loss) == len(learn.weight_hist.recording.valid_loss) == 128


def test_a_new_shape_is_refused_after_an_interrupt_too(tmp_path):
    learn = tiny_learner(cbs=WeightHistCallback())
    with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=stop_at('after_batch'))
    learn.model[1][-1] = nn.Linear(4, 5)
    learn.create_opt()
    with pytest.raises(ValueError, match='1.3.weight changed size since the last fit'): learn.fit(1)
    assert len(learn.weight_hist.recording) == 1
    fit(path=tmp_path/'run')
    with pytest.raises(ValueError, match='has tensors of another size: 1.3.weight'):
        fit(model=tiny_model(classes=3), path=tmp_path/'run', resume=True)


def test_a_wrong_range_is_refused_at_each_fit():
    learn = tiny_learner(cbs=WeightHistCallback(range=recording('0.0.weight')))
    for _ in range(2):
        with pytest.raises(ValueError, match='has no edges for'): learn.fit(1)


@pytest.mark.parametrize('exc', [CancelEpochException, KeyboardInterrupt])
def test_every_step_has_a_number_of_its_own(exc):
    learn, stop = tiny_learner(cbs=[WeightHistCallback(), GradientAccumulation(16)]), stop_at('after_step', 2, exc)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if exc is KeyboardInterrupt:
            with pytest.raises(exc): learn.fit(1, cbs=stop)
        else: learn.fit(1, cbs=stop)
    n = len(learn.weight_hist.recording)
    learn.fit(1)
    rec = learn.weight_hist.recording
    assert n == (3 if exc is CancelEpochException else 2) and rec.sel(fit=1).step[0] == 3
    assert len(set(rec.loss_step.tolist())) == len(rec.loss) == 7


def test_layers_can_be_a_function_of_the_name_but_not_a_module():
    assert [n for n, *_ in select_tensors(tiny_model(), lambda n: n.endswith('0.weight'))] == ['0.0.weight']
    with pytest.raises(TypeError, match='Found a module, Linear: pass its name or its type'): select_tensors(tiny_model(), nn.Linear(2, 2))


def test_a_submodule_can_be_named_module():
    m = nn.Module()
    m.module, m.a = nn.ModuleDict({'a': nn.Linear(4, 4)}), nn.Linear(4, 2)
    assert [n for n, *_ in select_tensors(m)] == ['module.a.weight', 'a.weight']
