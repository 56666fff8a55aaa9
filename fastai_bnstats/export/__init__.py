"""Hand recordings to TensorBoard, W&B and Trackio, finished or while they grow: the same edges and counts, nothing computed again.

- `points`: what a tracker gets at each optimizer step
- `sinks`: how each tool stores it; `to_tensorboard`, `to_wandb`, `to_trackio`
- `logger`: `HistLogger`, which sends during training"""
from .points import Hist, points
from .sinks import SINKS, Sink, TensorBoardSink, TrackioSink, WandbSink, send, to_tensorboard, to_trackio, to_wandb
from .logger import HistLogger
