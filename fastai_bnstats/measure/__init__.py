"""From tensors to numbers: histogram counts over fixed bin edges, mean and variance, on the CPU or on an accelerator."""
from .host import CHUNK, Grid, Stats, auto_range, grid, tensor_stats, uniform_edges
from .device import FLOATS, DevicePlan, Ring, combine, pack, unpack
from .fused import FusedPlan
