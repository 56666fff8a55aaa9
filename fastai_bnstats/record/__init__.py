"""fastai callbacks that record weights, gradients, updates, layer outputs and their gradients at each optimizer step.

- `select`: which tensors or modules, and over which range
- `writer`: collect a recording during training, in memory or in a folder that is locked
- `steps`: follow the optimizer steps of a fit
- `callback`: `HistCallback`, the base, and `WeightHistCallback`
- `quantities`: gradients, updates, layer outputs and their gradients; a new quantity goes here"""
from .select import edges_of, ranges_of, select_modules, select_tensors
from .writer import Writer
from .steps import StepCallback, recorded
from .callback import HistCallback, WeightHistCallback
from .quantities import ActivationHistCallback, GradHistCallback, OutputGradHistCallback, UpdateHistCallback
