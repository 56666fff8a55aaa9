"""What is recorded by default, and over which range: attention, weights that a layer computes, warnings and errors"""
import warnings

import numpy as np
import pytest
import torch
from fastai.basics import nn, partial
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from fastai_bnstats.record import ActivationHistCallback, GradHistCallback, UpdateHistCallback, WeightHistCallback, select_tensors
from fastai_bnstats.record.select import ComputedWeight, range_for
from helpers import tiny_learner, tiny_model

RECORDERS = [WeightHistCallback, GradHistCallback, UpdateHistCallback]


def names(model, layers=None): return [n for n, *_ in select_tensors(model, layers)]


def test_the_projections_of_attention_are_recorded():
    same, other = nn.MultiheadAttention(4, 2), nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True)
    assert names(nn.Sequential(same)) == ['0.in_proj_weight', '0.out_proj.weight']
    assert names(other) == ['q_proj_weight', 'k_proj_weight', 'v_proj_weight', 'out_proj.weight']


def test_matrices_that_are_left_out_are_named_once_for_each_model():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.linear = nn.Embedding(3, 4), nn.Linear(4, 2)
            self.position = nn.Parameter(torch.zeros(1, 5, 4))
            self.scale = nn.Parameter(torch.zeros(1, 4, 1)) # a vector
    model = Tokens()
    text = r"Not recorded: position, embed.weight \(2 in all\). By default, only the weights of convolutions, linear layers and attention"
    with pytest.warns(UserWarning, match=text): assert names(model) == ['linear.weight']
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert names(model) == ['linear.weight'] and len(names(model, 'all')) == 5
        assert names(tiny_model()) == ['0.0.weight', '0.3.weight', '1.3.weight']


def linear(model): return model[1][-1]
def conv(model): return model[0][3]


COMPUTED = { # how a layer comes to compute its weight -> what does it, given a layer
    'spectral norm (old)': spectral_norm, 'weight norm (old)': weight_norm,
    'pruning': partial(prune.l1_unstructured, name='weight', amount=.5),
    'spectral norm': parametrizations.spectral_norm, 'weight norm': parametrizations.weight_norm,
    'orthogonal': parametrizations.orthogonal,
    'two in a row': lambda m: parametrizations.spectral_norm(parametrizations.weight_norm(m))}


def computed(how, layer=linear):
    torch.manual_seed(0)
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # torch advises the newer functions
        COMPUTED[how](layer(model))
    return model


@pytest.mark.parametrize('layer', [linear, conv])
@pytest.mark.parametrize('how', COMPUTED)
def test_a_computed_weight_is_recorded_as_the_layer_uses_it(how, layer):
    model, used = computed(how, layer), []
    assert names(model) == names(tiny_model())
    learn = tiny_learner(model, cbs=WeightHistCallback())
    learn.fit(1)
    layer(learn.model.eval()).register_forward_hook(lambda m, *_: used.append(m.weight.detach().double().numpy()))
    learn.model(torch.zeros(2, 3, 8, 8))
    rec, p = learn.weight_hist.recording, {linear: 2, conv: 1}[layer]
    assert rec.kind.tolist() == ['weight']*3 and rec.trainable.all()
    assert rec.mean[-1, p] == pytest.approx(used[0].mean(), abs=1e-7) and rec.var[-1, p] == pytest.approx(used[0].var(), rel=1e-5)
    assert rec.hist[-1, p].tolist() == np.histogram(used[0], rec.edges[p])[0].tolist()


@pytest.mark.parametrize('how', COMPUTED)
def test_recording_a_computed_weight_changes_nothing(how):
    plain, recorded = tiny_learner(computed(how)), tiny_learner(computed(how), cbs=[cls() for cls in RECORDERS])
    for learn in (plain, recorded): learn.fit(2)
    theirs, ours = plain.model.state_dict(), recorded.model.state_dict()
    assert [*theirs] == [*ours] and all(torch.equal(theirs[n], ours[n]) for n in theirs) # also the vectors of the power iteration
    assert all(len(cb.recording) == 8 for cb in recorded.cbs.filter(lambda cb: isinstance(cb, tuple(RECORDERS))))


@pytest.mark.parametrize('how', COMPUTED)
def test_gradients_are_those_of_the_parameters_and_updates_those_of_the_weight(how):
    model = computed(how)
    learn = tiny_learner(model, cbs=[GradHistCallback(), UpdateHistCallback(), WeightHistCallback()])
    learn.fit(1)
    grads, updates, weights = (cb.recording for cb in (learn.grad_hist, learn.update_hist, learn.weight_hist))
    assert set(grads.names[2:]) == {n for n, _ in learn.model.named_parameters() if n.startswith('1.3.') and not n.endswith('bias')}
    assert updates.names.tolist() == weights.names.tolist()
    assert updates.mean[1:, 2] == pytest.approx(np.diff(weights.mean[:, 2]), abs=1e-6)


def test_a_cached_parametrization_is_not_disturbed():
    model = computed('spectral norm')
    weight = ComputedWeight(linear(model), 'weight')
    with parametrize.cached():
        before = linear(model).weight
        weight.detach()
        assert linear(model).weight is before and linear(model).parametrizations.weight.training


def test_a_frozen_computed_weight_is_not_trainable():
    model = computed('weight norm')
    for p in linear(model).parameters(): p.requires_grad_(False)
    learn = tiny_learner(model, cbs=WeightHistCallback())
    learn.fit(1)
    assert learn.weight_hist.recording.trainable.tolist() == [[True, True, False]]*4


BAD_RANGES = [
    ({'conv*': (-1, 1)}, r"range=\{'conv\*': ...\} matches nothing that is recorded. Use the names of these: 0.0.weight, 0.3.weight"),
    ({'0.0.weight': 'a'}, r"range\['0.0.weight'\] must be a positive number of standard deviations, \(lo, hi\), or None. Found 'a'"),
    ({3: (-1, 1)}, "The keys of range= must be names or globs, such as .*. Found 3"),
    (lambda n, m: 'a', r"range\('0.0.weight', module\) must be a positive number of standard deviations, \(lo, hi\), or None. Found 'a'")]


@pytest.mark.parametrize('range_,text', BAD_RANGES)
def test_bad_ranges(range_, text):
    with pytest.raises(ValueError, match=text): tiny_learner(cbs=WeightHistCallback(range=range_)).fit(1)


def test_a_function_may_take_the_name_only():
    assert range_for(lambda n: 1 if n == 'a' else 2, 'a', None) == 1 and range_for(lambda n, m: m, 'a', 7) == 7


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = tiny_model()
    def forward(self, x): return self.model(x)


def test_the_root_of_a_model_has_a_name_of_its_own():
    learn = tiny_learner(Wrapper(), cbs=ActivationHistCallback('*'))
    learn.fit(1)
    names = learn.activation_hist.recording.names.tolist()
    assert names[:2] == ['(root)', 'model'] and len({*names}) == len(names)


def test_float64_weights_that_float32_can_not_tell_apart():
    model = tiny_model().double()
    with torch.no_grad(): model[1][-1].weight.copy_(1+torch.arange(8.).double().view(2, 4)*2e-16)
    cb = WeightHistCallback()
    (x,) = [t for n, t, _ in select_tensors(model) if n == '1.3.weight']
    from fastai_bnstats.measure import choose_edges
    edges = choose_edges(x, cb.bins, auto=cb.auto)
    assert (np.diff(edges) > 0).all() and edges[0] < 1 < edges[-1]
