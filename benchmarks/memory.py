"""Measure whether memory stays constant in a long training that records to disk.

Trains twice, without and with a recording, each in a process of its own (Linux only)."""
import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path


def rss():
    "Memory of this process in MB"
    return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20


def train(steps, epochs, folder):
    "Train in this process and print lines of steps and MB"
    warnings.simplefilter('ignore')
    import torch
    from fastai.basics import Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, nn, noop
    from fastai.callback.progress import ProgressCallback

    from fastai_bnstats.all import WeightHistCallback
    torch.set_num_threads(1)
    n = steps//epochs
    class Data:
        "Made when it is read, so that it needs no memory"
        def __len__(self): return 8*n
        def __getitem__(self, i): return torch.full((16,), i%7/7.), i%2
    class PrintMemory(Callback):
        order = 80
        def after_batch(self):
            if not self.training: return
            for values in (self.recorder.losses, self.recorder.lrs): values.clear() # fastai keeps those of all batches
            if self.train_iter%(steps//10) == 0 or self.train_iter == 1000: print(f'{self.train_iter} {rss():.1f}', flush=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 2))
    dls = DataLoaders(DataLoader(Data(), bs=8, num_workers=0), DataLoader([Data()[0]]*8, bs=8, num_workers=0))
    cbs = [PrintMemory(), *([WeightHistCallback('all', path=folder)] if folder else [])]
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=cbs)
    learn.logger = noop
    learn.remove_cb(ProgressCallback).fit(epochs)


def measure(steps, epochs, *folder):
    "Steps -> MB of a training in a new process"
    args = ['--child', '--steps', str(steps), '--epochs', str(epochs), *folder]
    out = subprocess.run([sys.executable, __file__, *args], capture_output=True, text=True)
    if out.returncode: sys.exit(out.stderr[-3000:])
    return dict(l.split() for l in out.stdout.splitlines())


def main():
    p = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    p.add_argument('--steps', type=int, default=100_000)
    p.add_argument('--epochs', type=int, default=10)
    p.add_argument('--folder', help=argparse.SUPPRESS)
    p.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return train(a.steps, a.epochs, a.folder)
    with tempfile.TemporaryDirectory() as tmp:
        without, recorded = measure(a.steps, a.epochs), measure(a.steps, a.epochs, '--folder', f'{tmp}/run')
        files = list(Path(tmp, 'run').iterdir())
        print('| steps | MB without recording | MB with recording to disk |\n|---|---|---|')
        for k in without: print(f'| {int(k):,} | {without[k]} | {recorded[k]} |')
        print(f'\n{len(files)} files, {sum(f.stat().st_size for f in files)/1e6:.1f} MB on disk')


if __name__ == '__main__': main()
