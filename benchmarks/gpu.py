"""Do all ways to record agree on this GPU, and what does each cost?

    python benchmarks/gpu.py            # compare, then measure: two tables
    python benchmarks/gpu.py --rounds 0 # compare only

xresnet18 on random pictures, so neither data nor a disk is needed. Ends with an error if any count differs from that of `tensor_stats`."""
import argparse
import math
import statistics
import sys
import time
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from fastai.vision.models.xresnet import xresnet18

from fastai_bnstats.record import choose_bins, select_tensors
from fastai_bnstats.measure import DevicePlan, RowBuffer, pack, unpack
from fastai_bnstats.measure import FusedPlan
from fastai_bnstats.measure import binning, tensor_stats


def around(edges):
    "The edges as float32 and their neighbours: where rounding would show"
    e = edges.float()
    return torch.cat([e, *(torch.nextafter(e, torch.full_like(e, v)) for v in (-math.inf, math.inf))])


def plans(xs, binnings):
    "Each way to make packed rows of `xs`"
    res = {'tensor_stats': lambda xs: pack(tensor_stats(xs, binnings)), 'DevicePlan': DevicePlan(xs, binnings)}
    try: res['FusedPlan'] = FusedPlan(xs, binnings)
    except ImportError as e: print(f'FusedPlan is left out: {e}')
    return res


def compare(model, layers, bins):
    "Counts and moments of each way on weights, half precision copies, values next to edges, holes, NaN and infinities, and edges that are not uniform"
    picked = select_tensors(model, layers)
    xs, gs = [t.detach() for _, t, _ in picked], choose_bins(picked, bins)
    bad = xs[0].clone()
    bad.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf], device=bad.device)
    more = [(bad, gs[0]), (xs[0].half(), gs[0]), (xs[0].bfloat16(), gs[0]), (xs[0].flip(-1).transpose(0, -1), gs[0]), (xs[0].abs(), binning(np.geomspace(1e-9, 10, bins+1)))]
    more += [(around(g.edges).to(x.device), g) for x, g in zip(xs, gs)]
    xs, gs = xs+[x for x, _ in more], gs+[g for _, g in more]
    made = plans(xs, gs)
    want = unpack(made.pop('tensor_stats')(xs))
    oracle = [x.detach().cpu().double() for x in xs]
    oracle = [o[o.isfinite()] for o in oracle]
    mean, var = (torch.stack([f(o) for o in oracle]) for f in (torch.mean, lambda o: o.var(correction=0)))
    searched = sum(len(g.seg.index_select(0, g.odd).unique()) for g in made['DevicePlan'].groups if g.odd is not None)
    print(f'{len(xs)} tensors, {sum(x.numel() for x in xs):,} values; bins searched for {searched} of them, since the arithmetic of this device does not fit or edges are not uniform\n')
    print(f'{"":12} {"counts that differ":>20} {"mean, off by":>14} {"var, off by":>12}')
    wrong = 0
    for name, plan in made.items():
        got = unpack(plan(xs).cpu())
        n = sum((a != b).sum().item() for a, b in zip(got[:5], want[:5]))
        off = [((a-b).abs()/s)[s > 0].max().item() for a, b, s in ((got.mean, mean, var.sqrt()), (got.var, var, var))]
        print(f'{name:12} {n:20} {off[0]:14.1e} {off[1]:12.1e}')
        wrong += n
    return wrong


class Trainer:
    "A training loop on one random batch"
    def __init__(self, device, bs, px, amp):
        self.model = xresnet18(n_out=10).to(device)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=.9)
        self.x, self.y = torch.randn(bs, 3, px, px, device=device), torch.randint(0, 10, (bs,), device=device)
        self.amp, self.kind = amp, torch.device(device).type
        self.scaler = torch.amp.GradScaler(self.kind, enabled=amp)

    def step(self):
        with torch.autocast(self.kind, torch.float16 if self.kind == 'cuda' else torch.bfloat16, enabled=self.amp): loss = F.cross_entropy(self.model(self.x), self.y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.opt)
        self.scaler.update()
        self.opt.zero_grad()


def recorders(xs, binnings):
    "What to call after each step, by name; rows of a ring are taken whenever it is full"
    def ringed(plan):
        ring = RowBuffer()
        def f():
            ring.push(plan(xs))
            if ring.full: ring.take()
        return f
    made = plans(xs, binnings)
    host = made.pop('tensor_stats')
    return {'none': lambda: None, 'tensor_stats': lambda: host(xs), **{k: ringed(p) for k, p in made.items()}}


def timed(step, record, n):
    "Milliseconds a step"
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n): step(); record()
    torch.cuda.synchronize()
    return (time.perf_counter()-start)/n*1e3


def syncs(step, record, n=10):
    "Waits of the host that torch knows of, a step"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            for _ in range(n): step(); record()
        finally: torch.cuda.set_sync_debug_mode('default')
    return sum('synchronizing' in str(w.message) for w in told)/n


def alone(record, n):
    "Median milliseconds of one recording by the clock of the device, its queue empty at the start"
    def once():
        torch.cuda.synchronize()
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); record(); b.record(); b.synchronize()
        return a.elapsed_time(b)
    return statistics.median(once() for _ in range(n))


def measure(a, amp):
    train = Trainer('cuda', a.batch, a.px, amp)
    picked = select_tensors(train.model, a.layers)
    ways = recorders([t for _, t, _ in picked], choose_bins(picked, a.bins))
    for record in ways.values(): timed(train.step, record, a.warmup)
    ms = {k: [] for k in ways}
    for _ in range(a.rounds): # each in turn, so that a change of the clock meets all
        for k, record in ways.items(): ms[k].append(timed(train.step, record, a.steps))
    base = statistics.median(ms['none'])
    print(f'\nxresnet18, batch {a.batch}, {a.px} px, {"float16 autocast" if amp else "float32"}; {len(picked)} tensors of {sum(t.numel() for _, t, _ in picked):,} values a step; '
          f'medians of {a.rounds} rounds of {a.steps} steps\n')
    print(f'{"":12} {"ms a step":>10} {"added, share":>13} {"waits a step":>13} {"alone, ms":>10}')
    for k, record in ways.items():
        t = statistics.median(ms[k])
        print(f'{k:12} {t:10.2f} {t/base-1:13.1%} {syncs(train.step, record):13.1f} {alone(record, a.steps):10.3f}')


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--px', type=int, default=128)
    p.add_argument('--bins', type=int, default=40)
    p.add_argument('--layers', default=None, help="default: weights of convolutions and linear layers; 'all', or a glob")
    p.add_argument('--steps', type=int, default=50, help='a round')
    p.add_argument('--rounds', type=int, default=7, help='0: compare counts only')
    p.add_argument('--warmup', type=int, default=20)
    a = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f'This benchmark needs a CUDA device. Found none (torch {torch.__version__}): run it where torch.cuda.is_available() is True.')
    warnings.filterwarnings('ignore', message='Not recorded')
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}')
    train = Trainer('cuda', a.batch, a.px, amp=False)
    for _ in range(5): train.step()
    wrong = compare(train.model, a.layers, a.bins)
    if a.rounds:
        for amp in (False, True): measure(a, amp)
    if wrong: sys.exit(f'{wrong} counts differ from those of tensor_stats; expected none. Do not use that way on this device, and please report the lines above.')


if __name__ == '__main__': main()
