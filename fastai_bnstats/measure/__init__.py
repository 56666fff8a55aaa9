"""From tensors to numbers: histogram counts over fixed bin edges, mean and variance, on the CPU or on an accelerator.

- `edges`: which bins, chosen and checked
- `rows`: the packed row of one tensor, combined from parts, and a buffer of rows
- `compiled`: the loops over values in host memory, compiled by Numba
- `host`: count in host memory, in threads
- `device`: count on a CUDA device with torch operations
- `fused`: count on a CUDA device with one Triton kernel
- `meter`: measure the same tensors at every step, by the fastest method for their device
- `changes`: what each step changes, measured in one pass"""
from .edges import auto_range, check_edges, check_range, choose_edges, constant_value, finite_range, uniform_edges, weight_range
from .rows import RowBuffer, Stats, combine, euclidean_norm, pack, rows_without_values, unpack
from .host import FLOATS, compile_for, tensor_stats
from .device import DevicePlan
from .fused import FusedPlan
from .meter import Meter
from .changes import DevicePast, Past, past_of
