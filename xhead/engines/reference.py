"""The truth: build the logits, take the statistics with plain PyTorch, let autograd do the rest.

For tests, tiny inputs, float64 and second derivatives. Memory is N x V.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.engines.problem import Problem, Results, cap, column_rows
from xhead.engines.summands import SUMMANDS


def eligible(problem: Problem) -> bool:
    return True


def dense_logits(problem: Problem) -> Tensor:
    """All logits (N, V) in the accumulation dtype, differentiable."""
    dtype = problem.accumulate_dtype
    bias = None if problem.bias is None else problem.bias.to(dtype)
    logits = F.linear(problem.hidden.to(dtype), problem.weight.to(dtype), bias) * problem.scale
    logits = cap(logits, problem.softcap)
    return logits if problem.transform is None else problem.transform(logits)


def statistics(problem: Problem) -> Results:
    """Every statistic of `problem.names`, each differentiable as often as one likes."""
    logits = dense_logits(problem)
    results: Results = {}
    for name in problem.names:
        value = _STATISTIC[name](logits, problem)
        if problem.row_mask is not None:
            mask = problem.row_mask
            if name == "column_logits":
                assert problem.row_offsets is not None
                mask = mask[column_rows(problem.row_offsets)]
            elif value.ndim > 1:
                mask = mask[:, None]
            value = torch.where(mask, value, torch.zeros_like(value))
        results[name] = value
    return results


def _target(logits: Tensor, problem: Problem) -> Tensor:
    assert problem.target is not None
    if problem.soft_target:
        return (logits * problem.target.to(logits.dtype)).sum(-1)
    return logits.gather(1, problem.target.long()[:, None]).squeeze(1)


def _mean(logits: Tensor, problem: Problem) -> Tensor:
    if problem.mean_weight is None:
        return logits.mean(-1)
    mean_weight = problem.mean_weight.to(logits.dtype)
    return logits @ mean_weight / mean_weight.sum()


def _entropy(logits: Tensor, problem: Problem) -> Tensor:
    lse = logits.logsumexp(-1)
    # 0 * -inf for a logit of -inf would be NaN; such a class has no part in the entropy.
    return lse - (logits.softmax(-1) * logits.clamp(min=torch.finfo(logits.dtype).min)).sum(-1)


def _expectation(logits: Tensor, problem: Problem) -> Tensor:
    assert problem.values is not None
    return logits.softmax(-1) @ problem.values.to(logits.dtype)


def _pointwise_sum(logits: Tensor, problem: Problem) -> Tensor:
    assert problem.pointwise is not None
    return SUMMANDS[problem.pointwise].value(logits, *problem.pointwise_parameters).sum(-1)


def _column_mask(logits: Tensor, problem: Problem) -> Tensor:
    assert problem.row_offsets is not None and problem.columns is not None
    mask = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    mask[column_rows(problem.row_offsets), problem.columns] = True
    return mask


def _column_logits(logits: Tensor, problem: Problem) -> Tensor:
    assert problem.row_offsets is not None and problem.columns is not None
    return logits[column_rows(problem.row_offsets), problem.columns]


def masked_logsumexp(logits: Tensor, mask: Tensor) -> Tensor:
    """`log sum exp` over the columns in the mask; -inf, with gradient 0, where there are none."""
    empty = ~mask.any(-1)
    masked = logits.masked_fill(~mask, float("-inf"))
    # The gradient of logsumexp over nothing is NaN, so an empty row takes a constant of its own.
    masked = torch.where(empty[:, None], torch.zeros_like(masked), masked)
    return torch.where(empty, float("-inf"), masked.logsumexp(-1))


_STATISTIC = {
    "lse": lambda logits, problem: logits.logsumexp(-1),
    "target": _target,
    "mean": _mean,
    # torch.var warns where there is no row.
    "variance": lambda logits, problem: (logits - logits.mean(-1, keepdim=True)).square().mean(-1),
    "entropy": _entropy,
    "expectation": _expectation,
    "max": lambda logits, problem: logits.detach().amax(-1),
    "argmax": lambda logits, problem: logits.argmax(-1),
    "subset_lse": lambda logits, problem: masked_logsumexp(logits, _column_mask(logits, problem)),
    "complement_lse": lambda logits, problem: masked_logsumexp(logits, ~_column_mask(logits, problem)),
    "pointwise_sum": _pointwise_sum,
    "column_logits": _column_logits,
}
