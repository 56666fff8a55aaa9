"""Record weights, gradients, updates, layer outputs and their gradients at each optimizer step, with fastai or any other loop.

- `select`: which tensors or modules, and over which range
- `targets`: what is recorded of a model, and whether it is still part of it
- `writer`: collect a recording during training, in memory or in a folder that is locked
- `steps`: follow the optimizer steps of a fit
- `recorder`: the recording while it grows, for any training loop; weights, gradients and updates
- `callback`: `HistCallback`, the base, and `WeightHistCallback`
- `quantities`: the callbacks for gradients, updates, layer outputs and their gradients
- `loop`: `record`, the same without fastai"""
from .select import edges_of, ranges_of, select_modules, select_tensors
from .writer import Writer
from .steps import StepCallback, recorded
from .recorder import HistRecorder
from .callback import HistCallback, WeightHistCallback
from .quantities import ActivationHistCallback, GradHistCallback, OutputGradHistCallback, UpdateHistCallback
from .loop import record
