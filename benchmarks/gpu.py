"""Compare the counts and the cost of all ways to record on this GPU.

    python benchmarks/gpu.py            # compare the counts, then measure the cost
    python benchmarks/gpu.py --rounds 0 # compare only

The model is xresnet18 with random inputs, so no data is needed. Exits with an error if any count differs from that of `tensor_stats`."""
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

from fastai_bnstats.measure import DevicePlan, FusedPlan, RowBuffer, pack, tensor_stats, unpack
from fastai_bnstats.record import edges_of, select_tensors


def around(edges):
    "The edges as float32 and both neighbours of each, where rounding errors would show"
    e = torch.from_numpy(edges).float()
    return torch.cat([e, *(torch.nextafter(e, torch.full_like(e, v)) for v in (-math.inf, math.inf))])


def plans(xs, edges):
    "All functions that make packed rows of `xs`, by name"
    res = {'tensor_stats': lambda xs: pack(tensor_stats(xs, edges)), 'DevicePlan': DevicePlan(xs, edges)}
    try: res['FusedPlan'] = FusedPlan(xs, edges)
    except ImportError as e: print(f'FusedPlan is skipped: {e}')
    return res


def difficult(x, e, bins):
    "Difficult tensors made of `x`, each with its edges: nan and infinities, half precision, another layout, edges that are not uniform"
    bad = x.clone()
    bad.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf], device=bad.device)
    other_layout, geometric = x.flip(-1).transpose(0, -1), np.geomspace(1e-9, 10, bins+1)
    return [(bad, e), (x.half(), e), (x.bfloat16(), e), (other_layout, e), (x.abs(), geometric)]


def compare(model, layers, bins):
    "Print how counts and moments of each way differ for weights, difficult tensors and values next to edges; return how many counts differ"
    selected = select_tensors(model, layers)
    pairs = list(zip([t.detach() for _, t, _ in selected], edges_of(selected, bins)))
    xs, edges = zip(*pairs, *difficult(*pairs[0], bins), *((around(e).to(x.device), e) for x, e in pairs))
    xs, edges = list(xs), list(edges)
    ways = plans(xs, edges)
    want = unpack(ways.pop('tensor_stats')(xs))
    exact = [x.detach().cpu().double() for x in xs]
    exact = [x[x.isfinite()] for x in exact]
    mean, var = (torch.stack([f(x) for x in exact]) for f in (torch.mean, lambda x: x.var(correction=0)))
    print(f'{len(xs)} tensors, {sum(x.numel() for x in xs):,} values\n')
    print(f'{"":12} {"counts that differ":>20} {"error of mean":>14} {"error of var":>13}')
    wrong = 0
    for name, plan in ways.items():
        got = unpack(plan(xs).cpu())
        n = sum((a != b).sum().item() for a, b in zip(got[:5], want[:5]))
        off = [((a-b).abs()/s)[s > 0].max().item() for a, b, s in ((got.mean, mean, var.sqrt()), (got.var, var, var))]
        print(f'{name:12} {n:20} {off[0]:14.1e} {off[1]:13.1e}')
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
        dtype = torch.float16 if self.kind == 'cuda' else torch.bfloat16
        with torch.autocast(self.kind, dtype, enabled=self.amp): loss = F.cross_entropy(self.model(self.x), self.y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.opt)
        self.scaler.update()
        self.opt.zero_grad()


def recorders(xs, edges):
    "Functions to call after each step, by name; rows on the device are fetched whenever their buffer is full"
    def buffered(plan):
        buffer = RowBuffer()
        def f():
            buffer.push(plan(xs))
            if buffer.full: buffer.take()
        return f
    ways = plans(xs, edges)
    host = ways.pop('tensor_stats')
    return {'none': lambda: None, 'tensor_stats': lambda: host(xs), **{k: buffered(p) for k, p in ways.items()}}


def timed(step, record, n):
    "Milliseconds per step"
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(n):
        step()
        record()
    torch.cuda.synchronize()
    return (time.perf_counter()-start)/n*1e3


def syncs(step, record, n=10):
    "Synchronisations per step that torch reports"
    with warnings.catch_warnings(record=True) as ws:
        warnings.simplefilter('always')
        torch.cuda.set_sync_debug_mode('warn')
        try:
            for _ in range(n):
                step()
                record()
        finally: torch.cuda.set_sync_debug_mode('default')
    return sum('synchronizing' in str(w.message) for w in ws)/n


def alone(record, n):
    "Median milliseconds of one recording, measured on the device with an empty queue"
    def once():
        torch.cuda.synchronize()
        a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record()
        record()
        b.record()
        b.synchronize()
        return a.elapsed_time(b)
    return statistics.median(once() for _ in range(n))


def measure(a, amp):
    "Print what each way of recording costs in training, with or without mixed precision"
    train = Trainer('cuda', a.batch, a.px, amp)
    selected = select_tensors(train.model, a.layers)
    xs = [t for _, t, _ in selected]
    ways = recorders(xs, edges_of(selected, a.bins))
    for record in ways.values(): timed(train.step, record, a.warmup)
    ms = {k: [] for k in ways}
    for _ in range(a.rounds): # in turn, so that a change of the clock rate affects all
        for k, record in ways.items(): ms[k].append(timed(train.step, record, a.steps))
    base = statistics.median(ms['none'])
    print(f'\nxresnet18, batch size {a.batch}, {a.px} px, {"float16 autocast" if amp else "float32"}; '
          f'{len(xs)} tensors with {sum(x.numel() for x in xs):,} values; medians of {a.rounds} rounds of {a.steps} steps\n')
    print(f'{"":12} {"ms per step":>11} {"added":>9} {"syncs per step":>15} {"ms alone":>9}')
    for k, record in ways.items():
        t = statistics.median(ms[k])
        print(f'{k:12} {t:11.2f} {t/base-1:9.1%} {syncs(train.step, record):15.1f} {alone(record, a.steps):9.3f}')


def main():
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('--batch', type=int, default=64)
    p.add_argument('--px', type=int, default=128)
    p.add_argument('--bins', type=int, default=40)
    p.add_argument('--layers', default=None, help="tensors to record: 'all' or a glob (default: weights of convolutions and linear layers)")
    p.add_argument('--steps', type=int, default=50, help='steps per round')
    p.add_argument('--rounds', type=int, default=7, help='rounds; 0 only compares counts')
    p.add_argument('--warmup', type=int, default=20, help='steps before the first round')
    a = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f'This benchmark needs a CUDA device. Found none (torch {torch.__version__}): '
                 'run it where torch.cuda.is_available() is True.')
    warnings.filterwarnings('ignore', message='Not recorded')
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    print(f'{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}')
    train = Trainer('cuda', a.batch, a.px, amp=False)
    for _ in range(5): train.step()
    wrong = compare(train.model, a.layers, a.bins)
    if a.rounds:
        for amp in (False, True): measure(a, amp)
    if wrong:
        sys.exit(f'{wrong} counts differ from those of tensor_stats; expected none. '
                 'Do not record on this device, and please report the lines above.')


if __name__ == '__main__': main()
