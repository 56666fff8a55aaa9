"Does memory stay flat in a long training? The same training with and without a recording that goes to disk, one process each"
import argparse,os,subprocess,sys,tempfile,warnings
from pathlib import Path


def rss():
    "Memory of this process in MB"
    return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')/2**20


def train(steps, epochs, folder):
    warnings.simplefilter('ignore')
    import torch
    from fastai.basics import Callback,CrossEntropyLossFlat,DataLoader,DataLoaders,Learner,Recorder,nn,noop
    from fastai.callback.progress import ProgressCallback
    from fastai_bnstats.all import WeightHistCallback
    torch.set_num_threads(1)
    n = steps//epochs
    class Data:
        "Pictures that take no memory"
        def __len__(self): return 8*n
        def __getitem__(self, i): return torch.full((16,), i%7/7.),i%2
    class Say(Callback):
        order = 80
        def after_batch(self):
            if self.training: self.recorder.losses.clear(); self.recorder.lrs.clear() # fastai keeps all of them
            if self.training and (self.train_iter%(steps//10)==0 or self.train_iter==1000): print(f'{self.train_iter} {rss():.1f}', flush=True)
    model = nn.Sequential(nn.Linear(16,64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64,2))
    dls = DataLoaders(DataLoader(Data(), bs=8, num_workers=0), DataLoader([Data()[0]]*8, bs=8, num_workers=0))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), cbs=[Say(), *([WeightHistCallback('all', path=folder)] if folder else [])])
    learn.logger = noop
    learn.remove_cb(ProgressCallback).fit(epochs)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--steps', type=int, default=100_000)
    p.add_argument('--epochs', type=int, default=10)
    p.add_argument('--folder', help=argparse.SUPPRESS)
    p.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child: return train(a.steps, a.epochs, a.folder)
    with tempfile.TemporaryDirectory() as tmp:
        got = []
        for folder in ([], ['--folder', f'{tmp}/run']):
            out = subprocess.run([sys.executable, __file__, '--child', '--steps', str(a.steps), '--epochs', str(a.epochs), *folder], capture_output=True, text=True)
            if out.returncode: sys.exit(out.stderr[-3000:])
            got.append(dict(l.split() for l in out.stdout.splitlines()))
        files = list(Path(tmp, 'run').iterdir())
        print('| steps | MB without recording | MB with recording to disk |\n|---|---|---|')
        for k in got[0]: print(f'| {int(k):,} | {got[0][k]} | {got[1][k]} |')
        print(f'\n{len(files)} files, {sum(f.stat().st_size for f in files)/1e6:.1f} MB on disk')


if __name__=='__main__': main()
