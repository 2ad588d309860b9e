"""Which classes lie in a tile together, so that the backward has few tiles to visit.

A tile is visited where any of its rows gives any of its classes a probability of at least the threshold. So the classes
are put in the order of the largest probability that any row gave them: most of them have never passed the threshold,
and share tiles that no row needs. In the order of their frequencies or of their mean logits many more tiles have a
class that some row needs (`python -m benchmarks.class_order` compares them).

The order is learned from the calls themselves: some calls look at a sample of their rows, and later ones are served by
it. It changes what is skipped, never what is counted, so one for each number of classes is enough.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from xhead.engines.gram import blocks
from xhead.engines.matmul import multiply
from xhead.engines.operands import Operands
from xhead.engines.problem import cap

EVERY = 32  # calls between two looks, after the first few
_SAMPLE = 1024  # rows
_CLASSES = 2048  # met at a time
_FORGET = 0.7  # of the logarithm of a peak, between two looks: it halves


@dataclass
class _Learned:
    peak: Tensor  # (V,) float32, largest log-probability of late
    order: Tensor  # (V,) int32
    calls: int = 0

    def due(self) -> bool:
        """The first calls look more often: a fresh model changes fast."""
        return self.calls % EVERY == 0 or (self.calls < EVERY and self.calls & (self.calls - 1) == 0)


_learned: dict[tuple[torch.device, int], _Learned] = {}


def clear() -> None:
    """Forget every order: the next calls take the classes as they are numbered."""
    _learned.clear()


def current(classes: int, device: torch.device) -> Tensor:
    """(V,) int32: the order for a call."""
    known = _learned.get((device, classes))
    return torch.arange(classes, dtype=torch.int32, device=device) if known is None else known.order


@torch.no_grad()
def learn(operands: Operands, lse: Tensor) -> None:
    """Count a call and, now and then, look at its probabilities. lse: (n,), of the operands' rows"""
    classes, device = operands.weight.shape[0], operands.weight.device
    known = _learned.get((device, classes))
    if known is None:
        peak = torch.full((classes,), float("-inf"), device=device)
        known = _learned[device, classes] = _Learned(peak, current(classes, device))
    known.calls += 1
    if known.due() and lse.numel():
        peak = torch.maximum(known.peak - _FORGET, _peaks(operands, lse))
        # A number that is none says nothing of its class.
        known.peak = peak.nan_to_num_(nan=float("-inf"))
        known.order = known.peak.argsort(descending=True, stable=True).int()


def _peaks(operands: Operands, lse: Tensor) -> Tensor:
    """The largest log-probability of each class among some of the rows, (V,)."""
    sample = torch.arange(0, lse.shape[0], -(-lse.shape[0] // _SAMPLE), device=lse.device)
    hidden, lse = operands.hidden_of(sample), lse[sample]
    scale, softcap = operands.options["scale"], operands.options["softcap"]
    products = torch.empty(sample.shape[0], _CLASSES, device=lse.device)
    found = []
    for start, stop in blocks(operands.weight.shape[0], size=_CLASSES):
        logits = products[:, : stop - start]
        multiply(hidden, operands.weight[start:stop].T, logits)
        if operands.bias is not None:
            logits += operands.bias[start:stop]
        found.append(cap(logits.mul_(scale), softcap).sub_(lse[:, None]).amax(0))
    return torch.cat(found)
