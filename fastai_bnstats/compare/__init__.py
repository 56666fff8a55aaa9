"""From recordings to numbers: distances and measures of a run, and paired tests over several seeds.

- `measures`: one number per layer or run
- `paired`: tests of two arms with the same seeds
- `spikes`: of the training loss
- `diagnose`: what went wrong in a run, at which step and in which layer"""
from .measures import (angle, change_size, depth_slope, displacement, drift_share, geometric_mean, grad_rms, log_var_change,
                       loss_variability, path_length, relative_grad, roughness, unshared_variability, update_ratio, zero_share)
from .paired import ALPHA, MARGINS, Paired, bootstrap_band, detectable, holm, least_pairs, paired_test, sign_flip, tost, verdict
from .spikes import Spike, find_spikes
from .diagnose import DEAD_SCALE, Finding, Findings, diagnose
