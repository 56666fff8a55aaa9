"""fastai callbacks that record weights, gradients, updates and layer outputs at each optimizer step."""
from .select import choose_bins, ranges_of, select_modules, select_tensors
from .writer import Writer
from .callback import HistCallback, WeightHistCallback
from .quantities import ActivationHistCallback, GradHistCallback, UpdateHistCallback
