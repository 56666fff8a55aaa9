"""Train only the layers you chose, and prove it: freezing methods for `Learner`, a ledger of every tensor, and a check before training."""
from .norm import count_bn, is_bn, remove_bn
from .head import bn_splitter, find_head
from .calls import FreezePolicy, KeepFrozen
from .audit import Diagnosis, LedgerCallback, LedgerError, bn_doctor
