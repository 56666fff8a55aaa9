"""fastai callbacks that record weights, gradients, updates and layer outputs at each optimizer step.

- `select`: which tensors or modules, and over which range
- `writer`: the recording while it grows, in memory or in a folder that is locked
- `steps`: when an optimizer step begins and ends, in all the corners of a fit
- `callback`: `HistCallback`, the base, and `WeightHistCallback`
- `quantities`: gradients, updates and layer outputs; a new quantity goes here"""
from .select import choose_bins, ranges_of, select_modules, select_tensors
from .writer import Writer
from .callback import HistCallback, WeightHistCallback
from .quantities import ActivationHistCallback, GradHistCallback, UpdateHistCallback
