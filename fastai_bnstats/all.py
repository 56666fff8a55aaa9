"""Everything that a notebook needs: `from fastai_bnstats.all import *`"""
from .recording import Landscape, Recording, RecordingDiff
from .record import ActivationHistCallback, GradHistCallback, OutputGradHistCallback, UpdateHistCallback, WeightHistCallback, record
from .freeze import (KeepFrozen, Ledger, LedgerCallback, LedgerError, bn_doctor, bn_drift, bn_splitter, count_bn, find_head, is_bn,
                     remove_bn)
from .landscape import LandscapeCallback
from .plot import (HeatMap, heat_html, plot_bands, plot_drift, plot_finding, plot_hist, plot_hist_diff, plot_hists, plot_landscape,
                   plot_losses, plot_forest, plot_mean, plot_overview, plot_ridge, plot_rms, plot_update_ratio, plot_var_change)
from .compare import (angle, change_size, depth_slope, diagnose, displacement, drift_share, geometric_mean, grad_rms, log_var_change,
                      loss_variability, paired_test, path_length, relative_grad, roughness, unshared_variability, update_ratio, zero_share)
from .export import HistLogger, to_tensorboard, to_trackio, to_wandb
from .study import digits, fig1, fig2, fig3, fig4, fig5, fig6, fig7, fig8, fig9

__all__ = [n for n in dir() if not n.startswith('_')]
