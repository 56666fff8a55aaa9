"""One network in three forms of batch norm: the same function where it should be, and no trace in the training"""
import random

import numpy as np
import pytest
import torch
from fastai.basics import Callback, nn, set_seed
from helpers import tiny_learner, tiny_model

from fastai_bnstats.freeze import count_bn
from fastai_bnstats.landscape import FormsCallback
from fastai_bnstats.landscape.forms import FORMS, bn_form


def network(*extra): return nn.Sequential(tiny_model()[0], nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *extra, nn.Linear(4, 2)))


def trained():
    model = network()
    for _ in range(30): model(torch.randn(16, 3, 8, 8)*2+1)
    return model


def test_running_and_folded_are_the_same_function_and_batch_is_another():
    model, x = trained(), torch.randn(16, 3, 8, 8)*2+1
    outs = {form: bn_form(model, form)(x) for form in FORMS}
    torch.testing.assert_close(outs['running'], outs['folded'], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outs['batch'], outs['running'], rtol=1e-2)
    assert outs['batch'].equal(model(x))
    assert [count_bn(bn_form(model, form)[0]) for form in FORMS] == [2, 2, 0]


def fitted(*cbs):
    set_seed(0)
    learn = tiny_learner(network(nn.Dropout(.2)), cbs=cbs)
    for dl in learn.dls.loaders: dl.rng = random.Random(0)
    learn.fit(5, 1e-2)
    return [*learn.model.state_dict().values(), torch.get_rng_state()]


def test_ten_steps_evenly_spaced_and_no_trace():
    cb = FormsCallback()
    assert all(a.equal(b) for a, b in zip(fitted(), fitted(cb)))
    land = cb.recording
    assert len(land) == 30 and [len(land.sel(phase=f)) for f in FORMS] == [10]*3
    assert land.sel(phase='folded').step.tolist() == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19]
    running, folded = (land.sel(phase=f) for f in ('running', 'folded'))
    assert running.start == pytest.approx(folded.start, rel=1e-4) # one function, one minibatch
    assert np.allclose(land.distance[:, 0]/land.weight, [1e-4, 1e-3, 1e-2], rtol=1e-6)
    assert not np.allclose(running.measure('beta_rel'), folded.measure('beta_rel'), rtol=.01)


def test_a_network_that_can_not_be_folded_is_refused_before_training():
    with pytest.raises(ValueError, match="can't be folded"): tiny_learner(tiny_model(), cbs=FormsCallback()).fit(1) # batch norm in the head


@pytest.mark.filterwarnings('ignore:Exception occured in `ActivationStats`', 'ignore:You are shadowing an attribute .modules.')
def test_hooks_and_held_statistics():
    from fastai.callback.hook import ActivationStats
    cb, losses = FormsCallback(4), []
    learn = tiny_learner(network(), cbs=[cb, ActivationStats(every=None)])
    learn.freeze_non_bn(bn_stats='hold')
    class Keep(Callback):
        order = 54
        def before_step(self): losses.append(self.loss.item())
    learn.fit(1, cbs=Keep())
    land = cb.recording
    assert land.sel(phase='batch').start == pytest.approx(losses, rel=1e-5) # with the statistics that are held
