"""Moments of the weight's rows; the centred Gram matrix is kept while the weight stays as it is.

`G = sum_k (w~_k - mbar)(w~_k - mbar)'` costs V D^2, and evaluation and gradient accumulation ask for it repeatedly.
Nothing says reliably that a weight has changed: `.data`, fused optimisers and sharding write past the version counter,
and addresses are used again. So what is kept is found by the weight's contents: the mean row and a projection
`sum_k r_k w~_k` on fixed numbers r that sum to zero, which one read of the weight gives (V D). A change that leaves
both as they were to the last bit, one made to that end apart, is at the level of rounding in G too.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from xhead.engines.problem import Problem

BLOCK = 512  # rows of weight, and gathered rows, held in the accumulation dtype at a time
_STEP = 2654435769  # 2^32 by the golden ratio: multiples modulo 2^32 are spread evenly, and no two are close
_KEPT = 2  # a model that trains, and one beside it

_entries: tuple[tuple[Tensor, Tensor], ...] = ()
"""(contents (2, D + 1), G (D + 1, D + 1)) of the weights seen last, the latest first."""


def clear() -> None:
    """Forget what is kept: the memory of two (D + 1)^2 matrices at most."""
    global _entries
    _entries = ()


def centred_gram(problem: Problem) -> tuple[Tensor, Tensor]:
    """The mean row `mbar` (D + 1,) and `G` (D + 1, D + 1), tensors of the caller's own.

    On a GPU the comparison waits for the device, once a call; in a graph that is being captured nothing is kept.
    """
    global _entries
    contents = _contents(problem)
    if contents.is_cuda and torch.cuda.is_current_stream_capturing():
        return contents[0].clone(), scatter(problem, contents[0])
    kept = _entries
    gram = next((gram for found, gram in kept if _same(found, contents)), None)
    if gram is None:
        gram = scatter(problem, contents[0])
    others = tuple(entry for entry in kept if entry[1] is not gram)
    _entries = ((contents, gram), *others)[:_KEPT]
    return contents[0].clone(), gram.clone()


def _same(found: Tensor, contents: Tensor) -> bool:
    if (found.shape, found.dtype, found.device) != (contents.shape, contents.dtype, contents.device):
        return False
    return torch.equal(found, contents)


def _contents(problem: Problem) -> Tensor:
    """The mean of the extended rows, and their projection: (2, D + 1)."""
    weight, classes = problem.weight, problem.vocabulary
    share = torch.arange(classes, device=weight.device).mul_(_STEP).remainder_(2**32).to(problem.accumulate_dtype)
    share = share.div_(2**32)
    factors = torch.stack([torch.full_like(share, 1 / classes), share - share.mean()])
    total = torch.zeros(2, weight.shape[1] + 1, dtype=problem.accumulate_dtype, device=weight.device)
    for start, stop in blocks(classes):
        total.addmm_(factors[:, start:stop], extended_rows(problem, slice(start, stop)))
    return total


def extended_mean(problem: Problem, class_weight: Tensor | None) -> Tensor:
    """Weighted mean of the extended rows: (D + 1,). class_weight: (V,)"""
    dtype = problem.accumulate_dtype
    if class_weight is None:
        class_weight = torch.ones(1, dtype=dtype, device=problem.weight.device).expand(problem.vocabulary)
    class_weight = class_weight.to(dtype)
    total = torch.zeros(problem.weight.shape[1] + 1, dtype=dtype, device=problem.weight.device)
    for start, stop in blocks(problem.vocabulary):
        total += class_weight[start:stop] @ extended_rows(problem, slice(start, stop))
    return total / class_weight.sum()


def scatter(problem: Problem, centre: Tensor) -> Tensor:
    """`sum_k (w~_k - centre)(w~_k - centre)'`: (D + 1, D + 1). centre: (D + 1,)"""
    size = problem.weight.shape[1] + 1
    total = torch.zeros(size, size, dtype=problem.accumulate_dtype, device=problem.weight.device)
    for start, stop in blocks(problem.vocabulary):
        centred = extended_rows(problem, slice(start, stop)) - centre
        total.addmm_(centred.T, centred)
    return total


def extended_rows(problem: Problem, classes: slice | Tensor) -> Tensor:
    """`[w_k, bias_k]` for some classes, in the accumulation dtype: (c, D + 1)."""
    weight = problem.weight[classes].to(problem.accumulate_dtype)
    bias = weight.new_zeros(weight.shape[0]) if problem.bias is None else problem.bias[classes].to(weight.dtype)
    return torch.cat([weight, bias[:, None]], 1)


def blocks(stop: int, start: int = 0, size: int = BLOCK) -> Iterator[tuple[int, int]]:
    """[start, stop) in pieces of at most `size`."""
    for first in range(start, stop, size):
        yield first, min(first + size, stop)
