"""Products with float32 results of half-precision matrices, at the speed of half precision where torch has them.

On a GPU, torch multiplies such matrices into a float32 result from 2.8 on, and adds to one from 2.10 on. Elsewhere they
are converted first: on a CPU in any version.
"""

import torch
from torch import Tensor

_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """`out = left @ right`; out is float32 or of the operands' dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda and _VERSION >= (2, 8):
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def multiply_add(left: Tensor, right: Tensor, total: Tensor) -> None:
    """`total += left @ right`; total is float32 or of the operands' dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda and _VERSION >= (2, 10):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    elif left.is_cuda and _VERSION >= (2, 8):
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
