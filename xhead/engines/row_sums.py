"""The gradient of the hidden states while it is being added up, by kernels that each add some tiles to it."""

import torch
from torch import Tensor

from xhead.engines.gram import ClosedFormGradient, blocks
from xhead.engines.operands import kernels


class RowSums:
    """(N, D) sums of more digits than their result has; in half precision, half as much memory as in float32.

    `result` is what the gradient will be. What is written first is rounded to the result's precision, like the means
    that stand for skipped tiles; after `widen`, what is added is kept to 17 binary digits.
    """

    def __init__(self, like: Tensor):
        """like: (N, D)"""
        self.half = like.dtype != torch.float32
        self.result = torch.zeros_like(like, memory_format=torch.contiguous_format)
        self.lower: Tensor | None = None

    def widen(self) -> None:
        """From here on, sums are kept to more digits."""
        if self.half:
            self.lower = torch.zeros(self.result.shape, dtype=torch.uint8, device=self.result.device)

    def finish(
        self,
        weight: Tensor,  # (V, D)
        target: Tensor | None,  # (N,)
        lone: Tensor | None,  # (N,)
        closed_form: ClosedFormGradient,
    ) -> None:
        """Add `lone_i weight[target_i]` and the closed forms, and round to the result."""
        write = kernels("sums").finish
        if closed_form.any():
            # In float32 for some rows at a time, and so rounded once.
            for first, last in blocks(self.result.shape[0]):
                rows = slice(first, last)
                lower, wanted, share = (None if t is None else t[rows] for t in (self.lower, target, lone))
                total = torch.empty_like(self.result[rows], dtype=torch.float32)
                write(total, self.result[rows], lower, weight, wanted, share)
                closed_form.add_hidden_grad(total, first)
                self.result[rows] = total
        else:
            write(self.result, self.result, self.lower, weight, target, lone)
        self.lower = None
