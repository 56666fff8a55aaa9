"""Train only the parameters that you choose, and check that no other tensor changed. Adds freezing methods to fastai's `Learner`."""
from .norm import count_bn, is_bn, remove_bn
from .head import bn_splitter, find_head
from .calls import FreezePolicy, KeepFrozen
from .ledger import LedgerCallback, LedgerError
from .doctor import Diagnosis, bn_doctor
