"""Loss and gradient around the weights agree with formulas, with plain loops, and with Hessian products of another library"""
import math
import warnings

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, Recorder, nn, partial, set_seed
from helpers import loaders, quiet, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

from fastai_bnstats.landscape import LandscapeCallback
from fastai_bnstats.landscape.probe import FINE, LARGEST, MOST_PASSES, critical_multiple, lengths, loss_and_grads, turn, walk

triples = st.lists(st.tuples(*[st.floats(-3, 3, width=32)]*3), min_size=4, max_size=4)


def probed(model, dls, loss_func=None, rate=.1, dtype=torch.float64, n=1, cbs=(), **kwargs):
    "The landscape of `n` epochs of SGD"
    cb = LandscapeCallback(every=1, **kwargs)
    opt_func, loss_func = partial(SGD, mom=0.), loss_func or CrossEntropyLossFlat()
    learn = quiet(Learner(dls, model.to(dtype), loss_func=loss_func, cbs=[cb, *cbs], opt_func=opt_func))
    learn.remove_cb(Recorder) # it takes only losses in single precision
    learn.fit(n, rate)
    return cb.recording


def doubles(n=32, bs=8):
    dls = loaders(n, bs)
    return DataLoaders(*[DataLoader([(x.double(), y) for x, y in dl.dataset], bs=bs) for dl in dls.loaders])


class Linear1(nn.Module):
    "The weights themselves are the output, so that a loss function can be any function of them"
    def __init__(self, n):
        super().__init__()
        self.body, self.head = nn.Module(), nn.Module()
        self.body.w, self.head.w = nn.Parameter(torch.randn(n, dtype=torch.float64)), nn.Parameter(torch.zeros(1, dtype=torch.float64))
    def forward(self, x): return self.body.w


def batches(n=2): return DataLoaders(*[DataLoader([(torch.zeros(1, dtype=torch.float64), torch.tensor(0))]*n, bs=1)]*2)


def parabola(n=5, seed=0):
    "Loss function w'Aw/2 with eigenvalues of both signs, and A"
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = a+a.T
    assert (ev := torch.linalg.eigvalsh(a))[0] < 0 < ev[-1]
    return (lambda w, y: w@a.to(w)@w/2), a


@pytest.mark.parametrize('along, kwargs', [('update', {}), ('gradient', dict(lr=.05)), ('distance', {})])
@pytest.mark.parametrize('dtype, rtol', [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_a_parabola_with_eigenvalues_of_both_signs(along, kwargs, dtype, rtol):
    set_seed(0)
    f, a = parabola()
    model = Linear1(5)
    w = model.body.w.detach().clone()
    land = probed(model, batches(1), f, along=along, dtype=dtype, head='head', **kwargs)
    g = a@w
    eta = {'update': .1*np.array([.5, 1, 2, 4]), 'gradient': .05*np.array([.5, 1, 2, 4]),
           'distance': np.array([1e-4, 1e-3, 1e-2])*(w.norm()/g.norm()).item()}[along]
    ag = (a@g).norm().item()
    if along == 'distance' and dtype is torch.float32: eta = eta[-1:] # nearer points drown in rounding errors
    k = slice(-len(eta), None)
    assert land.change[0, 0, k] == pytest.approx(eta*ag, rel=rtol)
    assert land.change[0, 0, k]/land.distance[0, 0, k] == pytest.approx(ag/g.norm().item(), rel=rtol)
    if dtype is torch.float64:
        assert land.measure('beta')[0] == pytest.approx(ag/g.norm().item(), rel=1e-5)
        assert land.measure('grad_change')[0] == pytest.approx(eta.max()*ag, rel=1e-5)
        exact = np.array([f(w-e*g, 0).item() for e in eta])
        assert land.loss[0] == pytest.approx(exact) and land.start[0] == pytest.approx(f(w, 0).item())
        assert land.measure('loss_range')[0] == pytest.approx(np.ptp(exact))
        assert land.slope[0] == pytest.approx(-eta*(g@g).item())
        h = g[None]-torch.tensor(eta)[:, None]*(a@g)
        cos = (h@g/h.norm(dim=1)/g.norm()).numpy()
        assert land.turn[0, 0] == pytest.approx(1-cos, abs=1e-12)
    assert (land.weight[0, 0], land.grad[0, 0]) == pytest.approx((w.norm().item(), g.norm().item()), rel=1e-6)


@pytest.mark.parametrize('along, kwargs', [('update', {}), ('gradient', dict(lr=.1)), ('distance', {})])
def test_a_linear_loss_has_the_same_gradient_everywhere(along, kwargs):
    set_seed(0)
    b = torch.arange(1., 6, dtype=torch.float64)
    land = probed(Linear1(5), batches(1), lambda w, y: w@b, along=along, head='head', **kwargs)
    for name in ('grad_change', 'beta', 'turn', 'beta_rel', 'rel_change'): assert land.measure(name)[0] == 0
    assert land.measure('linearity')[0] == pytest.approx(1)
    if along == 'update': assert (land.critical[0], land.censored[0]) == (LARGEST, 1)


def reference(model, params, x, y, loss_func, u, cs, parts):
    "The arrays of a row by plain loops: flat vectors, a function of the weights, no module is touched"
    names, buffers = [n for n, _ in params], dict(model.named_buffers())
    def loss(ps): return loss_func(functional_call(model, {**dict(zip(names, ps)), **{n: b.clone() for n, b in buffers.items()}}, x), y)
    def grads(ps):
        ps = [p.detach().clone().requires_grad_() for p in ps]
        l = loss(ps)
        return l.item(), torch.autograd.grad(l, ps)
    def flat(ts, part): return np.concatenate([[], *(t.detach().numpy().ravel() for t, n in zip(ts, names) if part in ('all', parts[n]))])
    ws = [p.detach().clone() for _, p in params]
    start, g = grads(ws)
    res = dict(start=start, weight=[], grad=[], distance=[], change=[], turn=[], loss=[], slope=[])
    points = [(c, *grads([w+c*d for w, d in zip(ws, u)])) for c in cs]
    for _, l, _ in points: res['loss'].append(l)
    for c, *_ in points: res['slope'].append(c*flat(g, 'all')@flat(u, 'all'))
    for part in ('all', 'body', 'norm', 'head'):
        gf, uf = flat(g, part), flat(u, part)
        norm = np.linalg.norm
        res['weight'].append(norm(flat(ws, part)))
        res['grad'].append(norm(gf))
        res['distance'].append([abs(c)*norm(uf) for c in cs])
        hs = [flat(h, part) for *_, h in points]
        res['change'].append([norm(h-gf) for h in hs])
        res['turn'].append([1-h@gf/norm(h)/norm(gf) for h in hs])
    return res


class Compare(Callback):
    "Just before the probe, compute its row by plain loops"
    order = 54
    def __init__(self, along, lr): self.along, self.lr, self.rows = along, lr, []
    def before_step(self):
        model, lf = self.learn.model, self.loss_func
        params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        parts = {n: 'head' if n.startswith('1.') else 'norm' if n[:4] in ('0.1.', '0.4.') else 'body' for n, _ in params}
        g = [p.grad.clone() for _, p in params]
        if self.along == 'update': u, cs = [-self.opt.hypers[-1]['lr']*x for x in g], (.5, 1, 2, 4)
        elif self.along == 'gradient': u, cs = g, [-c*self.lr for c in (.5, 1, 2, 4)]
        else:
            size = lambda ts: math.sqrt(sum(t.double().pow(2).sum().item() for t in ts))
            u, cs = g, [-c*size([p.detach() for _, p in params])/size(g) for c in (1e-4, 1e-3, 1e-2)]
        self.rows.append(reference(model, params, *self.xb, *self.yb, lf, u, cs, parts))


@pytest.mark.parametrize('along, lr', [('update', None), ('gradient', .3), ('distance', None)])
def test_a_network_agrees_with_plain_loops(along, lr):
    set_seed(0)
    model = nn.Sequential(tiny_model()[0], nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    plain = Compare(along, lr)
    land = probed(model, doubles(), n=2, cbs=[plain], along=along, lr=lr)
    assert len(land) == len(plain.rows) == 8
    for key in plain.rows[0]:
        want = np.array([r[key] for r in plain.rows])
        np.testing.assert_allclose(getattr(land, key), want, rtol=1e-7, atol=1e-12, err_msg=key, equal_nan=True)
    assert np.isnan(land.measure('beta', 'norm')).sum() == 0


def test_short_steps_give_the_length_of_the_hessian_times_the_direction():
    from curvlinops import HessianLinearOperator
    set_seed(0)
    x, y = torch.randn(16, 3, dtype=torch.float64), torch.randint(0, 2, (16,))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    lf, params = nn.CrossEntropyLoss(), list(model.parameters())
    def loss(): return lf(model(x), y)
    start, g = loss_and_grads(loss, params)
    was = [p.detach().clone() for p in params]
    def at(c):
        with torch.no_grad():
            for p, w, d in zip(params, was, g): p.copy_(w+c*d)
    row = walk(loss, at, params, start, g, g, [-1e-5], dict(all=list(range(len(params)))))
    at(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # of that library
        H = HessianLinearOperator(model, lf, params, [(x, y)])
    flat = torch.cat([t.flatten() for t in g])
    hd = torch.as_tensor(H@flat)
    assert row['change'][0, 0]/row['distance'][0, 0] == pytest.approx((hd.norm()/flat.norm()).item(), rel=1e-4)


def test_parameters_that_share_a_gradient():
    "Of a + b, autograd returns one tensor for both"
    a, b = (nn.Parameter(torch.randn(3, dtype=torch.float64)) for _ in range(2))
    was = torch.cat([a, b]).detach().clone()
    def loss(): return (a+b).pow(4).sum()
    start, gs = loss_and_grads(loss, [a, b])
    assert gs[0] is gs[1]
    def at(c):
        with torch.no_grad():
            for p, w, g in zip((a, b), was.split(3), gs): p.copy_(w+c*g)
    row = walk(loss, at, [a, b], start, gs, gs, [-.01, -.02], dict(all=[0, 1], first=[0]))
    g = 4*(was[:3]+was[3:])**3
    h = torch.stack([4*(was[:3]+was[3:]-2*c*g)**3 for c in (.01, .02)])
    change = (h-g).norm(dim=1)
    assert row['grad'] == pytest.approx([g.norm().item()*2**.5, g.norm().item()])
    assert row['change'] == pytest.approx(torch.stack([change*2**.5, change]).numpy())
    assert row['turn'] == pytest.approx(np.tile(1-(h@g/h.norm(dim=1)/g.norm()).numpy(), (2, 1)))


@pytest.mark.parametrize('c', [.25, 3.])
def test_scaling_a_convolution_before_batch_norm_divides_beta_and_leaves_its_relative_form(c):
    def run(c):
        set_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-30))
        model = nn.Sequential(body, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))).double()
        with torch.no_grad(): body[0].weight *= c
        for n, p in model.named_parameters(): p.requires_grad = n == '0.0.weight'
        return probed(model, doubles(16, 16), along='distance')
    a, b = run(1.), run(c)
    for name in ('beta_rel', 'turn', 'rel_change'): assert b.measure(name, 'body') == pytest.approx(a.measure(name, 'body'), rel=1e-6)
    assert b.measure('beta') == pytest.approx(a.measure('beta')/c**2, rel=1e-6)
    assert np.isnan(a.measure('beta', 'head')).all() and np.isnan(a.measure('beta', 'norm')).all() # they don't train


@given(triples, triples)
def test_angle_from_lengths(xs, ys):
    xs, ys = (torch.tensor(v, dtype=torch.float64) for v in (xs, ys))
    a, b = xs.flatten().numpy(), ys.flatten().numpy()
    if min(np.linalg.norm(a), np.linalg.norm(b)) < 1e-3: return
    groups = dict(all=list(range(len(xs))))
    h, g, d = (lengths(list(t), groups) for t in (xs, ys, xs-ys))
    assert turn(h, g, d).item() == pytest.approx(1-a@b/np.linalg.norm(a)/np.linalg.norm(b), abs=1e-9)


@given(st.floats(1e-3, 200), st.lists(st.floats(.01, 60), max_size=4))
def test_a_single_crossing_is_found_within_eight_passes(at, points):
    passes = []
    def loss(c):
        passes.append(c)
        return 1. if c > at else 0.
    c, censored = critical_multiple(loss, .5, {p: float(p > at) for p in points})
    assert len(passes) <= MOST_PASSES and max(passes, default=0) <= LARGEST
    tried = [*points, *passes]
    if censored == 1: assert c == LARGEST <= at
    elif censored == -1: assert c == min(tried) > at
    else:
        assert c > at and c == min(p for p in tried if p > at)
        if len(passes) < MOST_PASSES: assert c <= FINE*at


@given(st.lists(st.booleans(), min_size=70, max_size=70))
def test_the_loss_is_higher_at_what_is_found(higher):
    def loss(c): return float(higher[min(int(c), 69)])
    c, censored = critical_multiple(loss, .5, {})
    assert loss(c) == (0. if censored == 1 else 1.)


def test_a_point_that_is_not_finite_counts_as_higher():
    assert critical_multiple(lambda c: math.nan, 1., {1.: 0., 2.: math.inf})[1] == 0


def test_points_that_are_not_finite_are_recorded_as_such():
    set_seed(0)
    def lf(w, y): return w@w/2+torch.where((w@w) > 1.2*start, torch.inf, 0.)*(w@w)
    model = Linear1(5)
    start = (model.body.w@model.body.w).item()
    land = probed(model, batches(1), lf, rate=-.1, head='head') # uphill
    assert np.isfinite(land.loss[0, 0]) and land.loss[0, -1] == np.inf
    assert land.measure('loss_range')[0] == land.measure('beta')[0] == np.inf and land.measure('turn')[0] == 2
