"""The gradient of the hidden states while it is being added up, by kernels that each add some tiles to it."""

import torch
from torch import Tensor

from xhead.engines.operands import kernels


class RowSums:
    """(n, D) sums of more digits than their result has; in half precision, half as much memory as in float32.

    `result` is what the gradient will be. What is written first is rounded to the result's precision, like the means
    that stand for skipped tiles; after `widen`, what is added is kept to 17 binary digits.
    """

    def __init__(self, rows: int, like: Tensor, *, half: bool):
        """half: in the dtype of `like` (N, D), one of half precision; otherwise in float32."""
        self.half = half
        dtype = like.dtype if half else torch.float32
        self.result = torch.zeros(rows, like.shape[1], dtype=dtype, device=like.device)
        self.lower: Tensor | None = None

    def widen(self) -> None:
        """From here on, sums are kept to more digits."""
        if self.half:
            self.lower = torch.zeros(self.result.shape, dtype=torch.uint8, device=self.result.device)

    def finish(self, weight: Tensor, target: Tensor | None, lone: Tensor | None) -> None:
        """Add `lone_i weight[target_i]`, and round to the result. weight: (V, D), target, lone: (n,)"""
        kernels("sums").finish(self.result, self.lower, weight, target, lone)
        self.lower = None
