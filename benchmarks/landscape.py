"""Measure what a probe of the loss costs, in comparison with a training step of the same run.

    python benchmarks/landscape.py --out landscape.md"""

import platform
from datetime import date
from pathlib import Path

import numpy as np
import torch
from fastai.vision.all import *
from fastcore.script import call_parse

from fastai_bnstats.landscape import LandscapeCallback

WAYS = { # how a probe is described -> its arguments
    "`'update'`, with the critical step": dict(along='update'),
    "`'gradient'`": dict(along='gradient', lr=.1),
    "`'distance'`": dict(along='distance')}

class Times(Callback):
    "Seconds of each training step, without its probe"
    order = 90
    def __init__(self, probe): self.probe,self.seconds = probe,[]
    def before_batch(self): self.start,self.was = time.perf_counter(),self.probe.cost.recording
    def after_batch(self):
        if self.training: self.seconds.append(time.perf_counter()-self.start-(self.probe.cost.recording-self.was))

def measure(size, bs, steps, kwargs):
    "Seconds of each step, and of each probe, of one training"
    set_seed(0)
    x,y = torch.randn(bs,3,size,size),torch.randint(10, (bs,))
    dls = DataLoaders(*(DataLoader([(x,y)]*n, bs=None) for n in (steps,1)))
    probe,probes = LandscapeCallback(every=2, **kwargs),[]
    original = probe._probe
    def timed():
        start = time.perf_counter()
        row = original()
        probes.append(time.perf_counter()-start)
        return row
    probe._probe = timed
    times = Times(probe)
    learn = Learner(dls, xresnet18(n_out=10), loss_func=CrossEntropyLossFlat(), cbs=[probe,times])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return times.seconds[2:],probes[1:] # without the first, which allocate memory

@call_parse
def main(
    out:str=None, # file to write; prints if it is missing
    size:int=64, # pixels
    bs:int=64, # images in a minibatch
    steps:int=24, # of each training
    threads:int=2,
):
    "Write a table"
    torch.set_num_threads(threads)
    rows = []
    for name,kwargs in WAYS.items():
        seconds,probes = measure(size, bs, steps, kwargs)
        step,probe = np.median(seconds),np.median(probes)
        ratios = np.sort(np.array(probes)/step)
        rows.append(f"| {name} | {1000*step:.0f} ms | {1000*probe:.0f} ms | {probe/step:.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}) | "
                    f"{probe/step/16/(1+probe/step/16):.0%} |")
    versions = f'{platform.machine()}, torch {torch.__version__}, {date.today()}'
    where = f'xresnet18, {size} px, batches of {bs}, {threads} threads, CPU; {versions}.'
    what = 'Medians of one training for each line; in parentheses the smallest and the largest.'
    head = '| `along=` | training step | probe | probe / step | share of the training with `every=16` |'
    text = '\n'.join([f'{where} {what}', '', head, '|---|---|---|---|---|', *rows, ''])
    Path(out).write_text(text) if out else print(text)
