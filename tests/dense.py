"""Definitions of the statistics in float64, straight from their formulas, for tests to compare with."""

import torch
from torch import Tensor


def dense_logits(hidden, weight, bias=None, scale=1.0, softcap=None) -> Tensor:
    """cap(scale * (hidden @ weight.T + bias)) in float64."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = scale * logits
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def dense_statistic(name: str, logits: Tensor, *, target=None, values=None, sets=None, mean_weight=None) -> Tensor:
    """One statistic a row, by its formula. sets: a list of lists of columns."""
    shifted = logits - logits.max(-1, keepdim=True).values
    exponentials = shifted.exp()
    total = exponentials.sum(-1)
    p = exponentials / total[:, None]
    if name == "lse":
        return total.log() + logits.max(-1).values
    if name == "target":
        if target.is_floating_point():
            return (target.double() * logits).sum(-1)
        return torch.stack([row[index] for row, index in zip(logits, target, strict=True)])
    if name == "mean":
        c = logits.new_ones(logits.shape[1]) if mean_weight is None else mean_weight.double()
        return (c * logits).sum(-1) / c.sum()
    if name == "variance":
        return ((logits - logits.mean(-1, keepdim=True)) ** 2).mean(-1)
    if name == "entropy":
        return -(p * (shifted - total.log()[:, None])).sum(-1)
    if name == "expectation":
        return p @ values.double()
    if name == "max":
        return logits.max(-1).values
    if name == "argmax":
        return logits.max(-1).indices
    rows = []
    for row, columns in zip(logits, sets, strict=True):
        inside = set(columns) - {-1}
        if name == "complement_lse":
            inside = set(range(logits.shape[1])) - inside
        chosen = row[sorted(inside)]
        rows.append(chosen.logsumexp(0) if len(chosen) else row.new_tensor(float("-inf")))
    return torch.stack(rows)


def relative_error(found: Tensor, exact: Tensor, floor: float = 1e-30) -> float:
    """Norm of the difference by the norm of the exact one, or by `floor` where that is larger."""
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm().clamp(min=floor))
