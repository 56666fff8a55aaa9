"""Read what trackers have stored, with their own readers where they have one: name -> list of (step, value)"""
import json
import os
import struct
import sys
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np

from fastai_bnstats.export import Hist
from forks import wait_for


def plain(got):
    "What `points` yields, as lists and numbers that can be compared"
    def one(v): return (v.edges.tolist(), v.counts.tolist(), v.mean, v.var) if isinstance(v, Hist) else v
    return [(step, {k: one(v) for k, v in values.items()}) for step, values in got]


def by_name(got):
    "What `points` yields: name -> list of (step, value)"
    found = defaultdict(list)
    for step, values in got:
        for k, v in values.items(): found[k].append((step, v))
    return dict(found)


def from_tensorboard(folder):
    "A histogram is (edges, counts, HistogramValue); the first edge is not in the file"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder), size_guidance=dict(scalars=0, histograms=0, tensors=0)).Reload()
    found = {n: [(e.step, e.value) for e in events.Scalars(n)] for n in events.Tags()['scalars']}
    for n in events.Tags()['histograms']:
        hs = [(e.step, e.histogram_value) for e in events.Histograms(n)]
        found[n] = [(s, (np.array(h.bucket_limit), np.array(h.bucket), h)) for s, h in hs]
    for n in events.Tags()['tensors']: # texts
        found[n.removesuffix('/text_summary')] = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(n)]
    return found


def wandb_records(file):
    "The records of a .wandb file: a log in LevelDB's format, after a header of 7 bytes"
    from wandb.proto.wandb_internal_pb2 import Record
    raw, at, data, block = Path(file).read_bytes(), 7, b'', 32768
    assert raw[:4] == b':W&B'
    while at < len(raw):
        if block-at%block < 7: at += block-at%block # padding
        _, n, kind = struct.unpack('<IHB', raw[at:at+7])
        data, at = data+raw[at+7:at+7+n], at+7+n
        if at <= len(raw) and kind in (1, 4): # whole, or the last part of a record
            yield Record.FromString(data)
            data = b''


@contextmanager
def wandb_offline(folder):
    "wandb writes to a folder, and to nobody else"
    import wandb
    names = dict(MODE='offline', SILENT='true', CONSOLE='off', DIR=folder, **{f'{k}_DIR': folder/k for k in ('CACHE', 'CONFIG', 'DATA')})
    wandb.teardown() # it reads the environment once
    with patch.dict(os.environ, {f'WANDB_{k}': str(v) for k, v in names.items()}):
        try: yield wandb
        finally: wandb.teardown()


def from_wandb(run):
    "A histogram is (edges, counts). Also the metrics with an x axis of their own"
    found, axes = defaultdict(list), {}
    def records(): return list(wandb_records(run.settings.sync_file))
    wait_for(lambda: 'exit' in [r.WhichOneof('record_type') for r in records()]) # another process writes the end of the file
    for r in records():
        if r.WhichOneof('record_type') == 'metric' and r.metric.glob_name: axes[r.metric.glob_name] = r.metric.step_metric
        if r.WhichOneof('record_type') != 'history': continue
        line = defaultdict(dict)
        for i in r.history.item:
            name, *inner = i.nested_key or [i.key]
            if inner: line[name][inner[0]] = json.loads(i.value_json)
            else: line[name] = json.loads(i.value_json)
        for n, v in line.items():
            if n.startswith('_') or n == 'step': continue
            if isinstance(v, dict) and v['_type'] == 'histogram': v = np.array(v['bins']), np.array(v['values'])
            found[n].append((line.get('step'), v))
    return dict(found), axes


@contextmanager
def trackio_in(folder):
    "trackio keeps its data in a folder"
    with patch.dict(os.environ, TRACKIO_DIR=str(folder)):
        import trackio
        old = {name: m.TRACKIO_DIR for name, m in [*sys.modules.items()] if name.startswith('trackio') and hasattr(m, 'TRACKIO_DIR')}
        for name in old: sys.modules[name].TRACKIO_DIR = Path(folder) # each module has taken it from the environment when it was imported
        try: yield trackio
        finally:
            for name in old: sys.modules[name].TRACKIO_DIR = old[name]
            trackio.context_vars.current_run.set(None)


def from_trackio(project, run):
    "A histogram is (edges, counts)"
    from trackio.sqlite_storage import SQLiteStorage
    found = defaultdict(list)
    for line in SQLiteStorage.get_logs(project, run):
        for n, v in line.items():
            if n in ('step', 'timestamp'): continue
            if isinstance(v, dict):
                assert v['_type'] == 'trackio.histogram'
                v = np.array(v['bins']), np.array(v['values'])
            found[n].append((line['step'], v))
    return dict(found)
