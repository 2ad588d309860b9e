"""xhead: the output head of a language model, the projection to the vocabulary and the loss, without the logits."""

from xhead.accumulate import accumulate
from xhead.faults import MissingRanksError, roll_call
from xhead.heads import list_heads
from xhead.lazy import LazyLogits
from xhead.losses import list_losses
from xhead.losses.cross_entropy import linear_cross_entropy
from xhead.patch import patch, status, unpatch
from xhead.replacement import load
from xhead.standin import MaterializedWarning
from xhead.statistics import Statistics
from xhead.vocabulary import Vocabulary

__version__ = "0.1.0"

__all__ = [
    "LazyLogits",
    "MaterializedWarning",
    "MissingRanksError",
    "Statistics",
    "Vocabulary",
    "accumulate",
    "linear_cross_entropy",
    "list_heads",
    "list_losses",
    "load",
    "patch",
    "roll_call",
    "status",
    "unpatch",
]
