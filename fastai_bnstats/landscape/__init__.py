"""The smoothness of the loss along the way of a training, measured without touching the training.

- `restore`: set everything back that a forward pass or a step of the optimizer changes
- `probe`: loss and gradient at points around the weights
- `callback`: `LandscapeCallback`; its result is a `Landscape`, see the subpackage `recording`
- `forms`: one network with its batch norm in three forms"""
from .callback import LandscapeCallback
from .forms import FORMS, FormsCallback
