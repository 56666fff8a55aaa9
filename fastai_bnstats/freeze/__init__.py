"""Train only the parameters that you choose, and check that no other tensor changed. Adds freezing methods to fastai's `Learner`.

- `norm`: what a batch norm layer is; remove, fold, recalibrate
- `head`: where the body ends and the head begins
- `optimizer`: an optimizer that holds every parameter and moves no frozen one
- `calls`: `freeze_non_bn` and the other methods, and `KeepFrozen`
- `ledger`: compare every tensor before and after training, in any loop
- `ledger_callback`: the same for every fit of a learner
- `doctor`: warn before training
- `drift`: running statistics against the data that the model is evaluated on
- `phases`: a schedule of freezing, from lists, tables and YAML
- `schedule`: `learn.fit_schedule` trains it, with a proof of each phase"""
from .norm import count_bn, is_bn, remove_bn
from .head import bn_splitter, find_head
from .calls import FreezePolicy, KeepFrozen
from .ledger import Ledger, LedgerError
from .ledger_callback import LedgerCallback
from .doctor import Diagnosis, bn_doctor
from .drift import Drift, bn_drift
from .phases import Phase, read_schedule
from .schedule import Schedule
