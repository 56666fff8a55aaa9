"""From tensors to numbers: histogram counts over fixed bin edges, mean and variance, on the CPU or on an accelerator.

- `edges`: which bins, chosen and checked
- `rows`: the packed row of one tensor, and a buffer of rows
- `host`: count in host memory
- `device`: count on a CUDA device with torch operations
- `fused`: count on a CUDA device with one Triton kernel
- `meter`: measure the same tensors at every step, by the fastest method for their device"""
from .edges import Binning, auto_range, binning, check_range, choose_binning, constant_value, finite_range, uniform_edges, weight_range
from .rows import RowBuffer, Stats, combine, euclidean_norm, pack, rows_without_values, unpack
from .host import CHUNK, FLOATS, tensor_stats
from .device import DevicePlan
from .fused import FusedPlan
from .meter import Meter
