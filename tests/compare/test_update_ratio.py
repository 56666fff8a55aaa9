"""update_ratio against snapshots of the weights in float64"""
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from fastai.basics import Callback
from fastai.callback.all import GradientAccumulation
from helpers import make, tiny_learner

from fastai_bnstats.compare import path_length, update_ratio
from fastai_bnstats.record import UpdateHistCallback


class Snapshots(Callback):
    "All weights before and after each step"
    order = 70
    def before_fit(self):
        if not hasattr(self, 'seen'): self.seen = []
    def now(self): return [p.detach().double().numpy().ravel().copy() for n, p in self.model.named_parameters() if n in self.names]
    def before_batch(self):
        if self.training: self.was = self.now()
    def after_batch(self):
        if not self.training: return
        self.seen.append([np.linalg.norm(b-a)/np.linalg.norm(a) if a.any() else np.nan for a, b in zip(self.was, self.now())])


@cache
def trained(every=1, layers=None):
    "Two fits, the first with frozen layers; the recording and the exact ratios of its rows"
    learn = tiny_learner(cbs=[UpdateHistCallback(layers=layers, every=every), snaps := Snapshots()])
    learn.create_opt()
    snaps.names = [n for n, _ in learn.model.named_parameters() if layers == 'all' or n in ('0.0.weight', '0.3.weight', '1.3.weight')]
    for p in learn.model[0].parameters(): p.requires_grad_(False)
    learn.fit(2)
    for p in learn.model[0].parameters(): p.requires_grad_(True)
    learn.fit(2)
    rec = learn.update_hist.recording.sel(layers=snaps.names)
    return rec, np.array(snaps.seen)[rec.step]


def test_every_step_is_exact():
    rec, exact = trained(layers='all')
    r = update_ratio(rec)
    np.testing.assert_allclose(r, exact, rtol=1e-4, atol=1e-9)
    frozen = r[rec.fit == 0][:, ~rec.trainable[0]]
    assert (frozen[~np.isnan(frozen)] == 0).all() and np.nanmin(r[rec.fit == 1]) > 0
    assert np.isnan(exact).any() and np.isnan(r).any() # biases begin at 0
    one = rec.sel(fit=1) # a selection does not change a ratio
    np.testing.assert_array_equal(update_ratio(one), r[rec.fit == 1])


def test_a_thinned_recording_is_within_its_bounds():
    rec, exact = trained(every=3)
    r = update_ratio(rec)
    assert len(rec) == 6 and (r <= exact*(1+exact)*1.0001).all() and (exact <= r/(1-r)*1.0001).all() and (exact >= r/(1+r)*.9999).all()
    np.testing.assert_allclose(r[0], exact[0], rtol=1e-4) # from the start of the fit
    moved = exact > 0
    assert moved.any() and np.abs(r/np.where(moved, exact, 1)-1)[moved].max() < np.nanmax(exact)*1.01


def test_by_hand():
    rec = make(fits=(('a', 1),), batches=3, P=1)
    some = dict(norm=[[4.], [5], [0]], step_norm=[[2.], [2], [5]], start_norm=[[2.]]*3, fit_norm=[[2.]]*3)
    rec = replace(rec, **{k: np.array(v) for k, v in some.items()}, meta={**rec.meta, 'quantity': 'updates'})
    assert update_ratio(rec).ravel().tolist() == [1, .5, 1]
    assert path_length(rec.sel(step=[0, 1])) == [.5+.4] # by the norm after the step
    assert update_ratio(rec.sel(step=[0, 2])).ravel()[0] == 1 and np.isnan(update_ratio(rec.sel(step=2))).all() # 0 after the step
    assert np.isnan(update_ratio(replace(rec, start_norm=rec.start_norm*0))[0]).all() # weights of length 0


def test_refusals_and_empty_recordings():
    with pytest.raises(ValueError, match='Expected a recording of updates. Found one of weights: record with UpdateHistCallback'):
        update_ratio(make())
    rec, _ = trained(layers='all')
    assert update_ratio(rec.sel(epoch=7)).shape == (0, len(rec.names))


@pytest.mark.parametrize('n', [1, 2])
def test_the_first_step_with_accumulation_uses_the_norm_at_the_start(n):
    learn = tiny_learner(cbs=UpdateHistCallback(layers='1.3.weight'))
    learn.fit(1, 10., cbs=GradientAccumulation(16*n)) # so large a rate that the norms before and after the step differ
    rec = learn.update_hist.recording
    assert rec.batch[0] == n-1 and abs(rec.norm[0, 0]/rec.start_norm[0, 0]-1) > .5
    np.testing.assert_allclose(update_ratio(rec)[0], rec.step_norm[0]/rec.start_norm[0])
