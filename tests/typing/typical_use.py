"""What users type, as a program that mypy and pyright check; it is not run

`tests/test_types.py` checks this file, and that a wrong line is found."""
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from fastai_bnstats.compare import diagnose, displacement, paired_test, update_ratio
from fastai_bnstats.export import HistLogger, to_tensorboard
from fastai_bnstats.freeze import Ledger, LedgerCallback, LedgerError, bn_doctor, bn_splitter, count_bn, find_head, remove_bn
from fastai_bnstats.landscape import LandscapeCallback
from fastai_bnstats.plot import plot_hist, plot_hist_diff, plot_hists, plot_losses, plot_mean, plot_overview, plot_ridge
from fastai_bnstats.record import GradHistCallback, UpdateHistCallback, WeightHistCallback, record
from fastai_bnstats.recording import Landscape, Recording, RecordingDiff


def callbacks(folder: Path) -> list:
    "Arguments of the callbacks"
    weights = WeightHistCallback()
    some = WeightHistCallback(['0.*', nn.Conv2d], bins=60, range={'*': (-1., 1.)}, every=5, path=folder/'run', resume=True)
    none = GradHistCallback(layers=None, range=None, path=None)
    same = UpdateHistCallback(range=weights.recording)
    some.phase = 'freeze'
    weights.reset()
    figure: Figure = weights.plot(4)
    figure.savefig(folder/'weights.png')
    return [weights, some, none, same, LedgerCallback('warn'), LandscapeCallback(every=8), HistLogger('tensorboard', folder)]


def with_fastai(dls) -> Recording:
    "The six lines of the README"
    from fastai.vision.all import accuracy, vision_learner, xresnet18
    learn = vision_learner(dls, xresnet18, pretrained=False, metrics=accuracy, splitter=bn_splitter, cbs=WeightHistCallback())
    learn.freeze_non_bn(bn_stats='hold')
    print(bn_doctor(learn))
    learn.fit_one_cycle(2, 1e-2)
    rec: Recording = learn.weight_hist.recording
    return rec


def look(rec: Recording) -> tuple[RecordingDiff, np.ndarray]:
    "Selecting, subtracting, drawing"
    body: Recording = rec.sel(phase='freeze', epoch=range(3), layers=['0.*'], kind='weight')
    last = rec.sel(fit=-1, step=slice(10, None), layers=lambda name: 'conv' in name)
    diff: RecordingDiff = body-last
    moved: np.ndarray = diff.moved()
    plot_hist_diff(diff)
    ax: Axes = plot_hist(rec, 0)
    plot_losses(rec, ax=ax)
    plot_hists(rec, layers=None, ncols=3)
    plot_overview(rec, n=3).savefig('overview.png')
    ridge: Axes = plot_ridge({'a': rec, 'b': last}, layer='0.*', steps=[0, -1])
    mean: Figure = plot_mean(rec, last, labels=['a', 'b'])
    mean.savefig('mean.png')
    ridge.set_title('two runs')
    return diff, moved+rec.moved(since=2)[:3]+rec.delta_var()[:3]


def keep(rec: Recording, folder: Path) -> bool:
    "Files and containers"
    path: Path = rec.save(folder/'run.npz')
    again = Recording.load(path)
    table: pd.DataFrame = rec.to_frame()
    losses: pd.DataFrame = rec.to_frame('loss')
    rec.to_zarr(folder/'run.zarr')
    rec.to_html(folder/'run.html', again)
    to_tensorboard(rec, folder/'runs', layers='0.*', every=10)
    names: list[str] = again.names.tolist()
    print(len(rec), rec.rms.mean(), rec.meta['quantity'], names, table.head(), losses.head(), rec.to_xarray())
    return again.is_same(rec)


def numbers(a: Recording, b: Recording, updates: Recording) -> float:
    "Measures, and what they mean over several seeds"
    ratio: np.ndarray = update_ratio(updates)
    for finding in diagnose(a, updates): print(finding.step, finding.layer, finding.text)
    d: np.ndarray = displacement(a)
    return float(ratio.mean()+d.mean())


def any_loop(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Recording:
    "Without fastai"
    opt = torch.optim.AdamW(model.parameters(), 1e-3)
    led = Ledger(model, trains=['*lora_*'], on_move='warn')
    with led, record(model, opt, quantities=['weights', 'updates'], every=2) as rec:
        for x, y in batches:
            loss = nn.functional.cross_entropy(model(x), y)
            rec.add_loss(loss)
            loss.backward()
            opt.step()
        rec.next_epoch()
        rec.next_phase('unfreeze')
    broken: pd.DataFrame = led.broken
    if len(broken): raise LedgerError(led.summary())
    rec.report('run.html')
    weights: Recording = rec.weights
    return weights


def surgery(model: nn.Module) -> int:
    "Functions of models"
    remove_bn(model, fold=True)
    params, where = find_head(model)
    return count_bn(model)+len(params)+len(where)


def probes(land: Landscape, pairs: dict) -> np.ndarray:
    land.save('landscape.npz')
    print(paired_test(pairs['a'], pairs['b']))
    return land.sel(phase='freeze').measure('beta', group='body')
