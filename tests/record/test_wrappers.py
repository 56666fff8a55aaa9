"""Models that torch.compile, DataParallel or fastai's ParallelTrainer wraps are recorded and frozen like any other"""
import logging
import warnings

import pytest
import torch
from fastai.basics import Callback, nn, set_seed
from fastai.distributed import ParallelTrainer
from helpers import tiny_learner, tiny_model

from fastai_bnstats.freeze import KeepFrozen, LedgerCallback
from fastai_bnstats.landscape import LandscapeCallback
from fastai_bnstats.record import (ActivationHistCallback, GradHistCallback, HistCallback, OutputGradHistCallback, UpdateHistCallback,
                                   WeightHistCallback)


def hooks(model): return sum(len(m._forward_hooks) for m in model.modules())


def recordings(learn, fits=1):
    for _ in range(fits): learn.fit(1)
    return [cb.recording for cb in learn.cbs if isinstance(cb, (HistCallback, LandscapeCallback))]


class Interrupt(Callback):
    "Once, in the second minibatch"
    order, done = 90, False
    def __init__(self, event): setattr(self, event, self.run)
    def run(self):
        if self.done or not self.training or self.iter != 1: return
        self.done = True
        raise KeyboardInterrupt


def compile_in_place(m, **kwargs):
    m.compile(**kwargs)
    return m


COMPILED = {'whole': torch.compile, 'in place': compile_in_place,
            'part': lambda m, **kwargs: nn.Sequential(torch.compile(m[0], **kwargs), m[1])}
GRAPH = dict(backend='eager', fullgraph=True) # fullgraph: a break of the graph is an error


@pytest.fixture
def compiler():
    "What the compiler did in this test"
    from torch._dynamo.utils import counters
    torch.compiler.reset()
    counters.clear()
    logging.disable(logging.INFO) # else pytest keeps thousands of lines
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # what dynamo says of this environment
        yield counters
    logging.disable(logging.NOTSET)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize('how,every', [('whole', 1), ('in place', 1), ('part', 3)])
def test_a_compiled_model_is_recorded_like_any_other(how, every, compiler):
    def learner(compiled):
        set_seed(0)
        m = tiny_model()
        m[0][2] = nn.ReLU(inplace=True) # changes the output of batch norm, after that was recorded
        cbs = [WeightHistCallback('all', every=every), GradHistCallback(every=every), UpdateHistCallback(every=every),
               ActivationHistCallback('all', every=every), LandscapeCallback()]
        return tiny_learner(COMPILED[how](m, **GRAPH) if compiled else m, cbs=cbs)
    learn = learner(True)
    for rec, plain in zip(recordings(learn, fits=2), recordings(learner(False), fits=2), strict=True):
        assert len(rec) and rec.names.tolist() == plain.names.tolist() and rec.is_same(plain)
        assert not hasattr(rec, 'numel') or (rec.numel > 0).all()
    assert compiler['stats']['unique_graphs'] == 4 # training with and without outputs, validation, probes of the landscape
    assert not compiler['graph_break'] and hooks(learn.model) == 0


@pytest.mark.slow
def test_recording_outputs_leaves_the_training_of_a_compiled_model_as_it_is(compiler):
    def weights(*cbs):
        set_seed(0)
        learn = tiny_learner(torch.compile(tiny_model(), **GRAPH), cbs=cbs)
        learn.fit(1)
        return learn.model.state_dict()
    plain, recorded = weights(), weights(ActivationHistCallback())
    assert all(w.equal(recorded[n]) for n, w in plain.items())


@pytest.mark.slow
def test_a_graph_without_hooks_is_named(compiler):
    learn = tiny_learner(torch.compile(tiny_model(), **GRAPH))
    learn.fit(1)
    learn.add_cb(ActivationHistCallback())
    text = r'or another of the same layers, was trained before: call torch.compiler.reset\(\)'
    with pytest.warns(UserWarning, match=text): learn.fit(1)
    torch.compiler.reset()
    learn.fit(1)
    assert (learn.activation_hist.recording.numel > 0).all(1).tolist() == [False]*4+[True]*4


@pytest.mark.slow
@pytest.mark.parametrize('event', ['before_batch', 'after_loss'])
def test_after_an_interrupt_a_compiled_model_keeps_no_outputs(event, compiler):
    learn = tiny_learner(torch.compile(tiny_model(), **GRAPH), cbs=[ActivationHistCallback(), Interrupt(event)])
    with pytest.raises(KeyboardInterrupt): learn.fit(1)
    for _ in range(3): learn.model(torch.zeros(16, 3, 8, 8))
    assert len(learn.activation_hist.inside.seen) <= 3
    learn.fit(1)
    rec = learn.activation_hist.recording
    assert (rec.numel[-4:] == rec.numel[-1]).all() and hooks(learn.model) == 0


@pytest.mark.parametrize('how', COMPILED)
def test_gradients_of_outputs_of_a_compiled_model_are_refused_before_training(how):
    learn = tiny_learner(COMPILED[how](tiny_model(), **GRAPH), cbs=OutputGradHistCallback())
    text = 'which torch.compile makes one graph without hooks.*Train the model without torch.compile, or record weights'
    with pytest.raises(ValueError, match=text): learn.fit(1)


PARALLEL = {'module': (nn.DataParallel, ()), "fastai's callback": (lambda m: m, ParallelTrainer(None))}


@pytest.mark.parametrize('how', PARALLEL)
def test_a_model_in_data_parallel_is_recorded_like_any_other(how):
    def learner(wrap, cbs):
        set_seed(0)
        return tiny_learner(wrap(tiny_model()), cbs=[WeightHistCallback('all'), GradHistCallback(), UpdateHistCallback(),
                                                     ActivationHistCallback('all'), OutputGradHistCallback(), LandscapeCallback(), *cbs])
    wrap, cb = PARALLEL[how]
    for rec, plain in zip(recordings(learner(wrap, [cb] if cb else []), fits=2), recordings(learner(lambda m: m, []), fits=2), strict=True):
        assert rec.names.tolist() == plain.names.tolist() and rec.is_same(plain)


def case(name, call, bn_stats): return pytest.param(WRAPS[name], call, bn_stats, marks=[pytest.mark.slow]*('compile' in name))


WRAPS = {'DataParallel': nn.DataParallel, 'compile': lambda m: torch.compile(m, **GRAPH),
         'compile in place': lambda m: compile_in_place(m, **GRAPH)}
CASES = [('DataParallel', 'freeze_non_bn', 'hold'), ('DataParallel', 'freeze_all', 'batch'), ('DataParallel', 'body', 'update'),
         ('compile', 'freeze_non_bn', 'hold'), ('compile', 'body', 'batch'), ('compile in place', 'freeze_all', 'update')]


@pytest.mark.parametrize('wrap,call,bn_stats', [case(*c) for c in CASES], ids=map(' '.join, CASES))
def test_a_wrapped_model_is_frozen_like_any_other(wrap, bn_stats, call, compiler):
    def tables(wrap):
        set_seed(0)
        learn, said = tiny_learner(wrap(tiny_model()), cbs=LedgerCallback()), []
        learn.logger = said.append
        if call.startswith('freeze'): getattr(learn, call)(bn_stats=bn_stats)
        learn.fit(1, cbs=[] if call.startswith('freeze') else KeepFrozen(call, bn_stats=bn_stats))
        return learn.ledger.table, [s for s in said if isinstance(s, str)]
    (wrapped, said), (plain, plainly) = tables(wrap), tables(lambda m: m)
    assert wrapped.equals(plain) and said == plainly and 'BROKEN' not in {*wrapped.verdict} and (wrapped.found == 'moved').any() == (
        call != 'freeze_all' or bn_stats == 'update')
    assert not compiler['graph_break']
