"""From tensors to numbers: histogram counts over fixed bin edges, mean and variance, on the CPU or on an accelerator."""
from .host import CHUNK, Binning, Stats, auto_range, binning, tensor_stats, uniform_edges
from .device import FLOATS, DevicePlan, RowBuffer, combine, pack, unpack
from .fused import FusedPlan
