"""The update of a factored weight, and what keeps its factors well conditioned.

U is a running product of contractions, `U <- U (I - rate H' diag(2 alpha) H)`. How far its singular values can have
moved is bounded at each step. Before that bound passes a factor of 4, and every `stabilise_every` steps, they are
looked at, and those outside [1/2, 2] are set to 1: what they were goes into F. This is done between the update of U and
that of the target rows, and so it is exact however small a singular value has become, 0 included.
"""

import math

import torch
from torch import Tensor

from xhead.heads.spherical.factored import FactoredWeight
from xhead.heads.spherical.step import Step

LEAST, MOST = 0.5, 2.0  # of U's singular values, after they have been looked at
ALLOWED = math.log(4.0)  # how far they may have moved before that
NEAR_SINGULAR = 0.1  # least size of an eigenvalue of one step's factor, where there is to be no fold


@torch.no_grad()
def apply_step(
    weight: FactoredWeight,
    step: Step,
    learning_rate: float,
    weight_decay: float = 0.0,
    gradient_scale: float = 1.0,
    *,
    stabilise_every: int,
    refresh_every: int,
    fold: bool,
) -> None:
    """`W <- (1 - learning_rate weight_decay) W - learning_rate gradient_scale grad_W`: torch.optim.SGD, no momentum.

    Raises, with the state as it was:
        ValueError: a learning rate or weight decay that is not finite or below 0, or whose product is 1 or more.
        RuntimeError: without `fold`, a step whose factor is nearly singular; a gradient that is not finite.
    """
    keep = _check_rates(learning_rate, weight_decay)
    if not math.isfinite(float(step.norm) * gradient_scale):
        raise RuntimeError(
            f"the gradient's norm is {float(step.norm) * gradient_scale}: the head is left as it was; lower the "
            "learning rate, or look for hidden states that are not finite"
        )
    rate = learning_rate * gradient_scale / keep
    upper, lower = step.bounds(rate)
    if not fold and upper > 1 - NEAR_SINGULAR:
        _check_factor(step, rate, learning_rate)
    condition = weight.condition
    shrink = math.inf if upper >= 1 else condition.shrink - math.log1p(-upper) - math.log(keep)
    growth = condition.growth + math.log1p(lower)
    gradients = step.gradients
    if max(shrink, growth) > ALLOWED or condition.unchecked + 1 >= stabilise_every:
        step.apply_to_core(rate, track_inverse=False)
        rebalance(weight)
        rows = gradients.hidden @ weight.inverse
    else:
        rows = step.apply_to_core(rate, track_inverse=True)
        condition.shrink, condition.growth = shrink, growth
        condition.unchecked += 1
    assert rows is not None
    weight.add_to_rows(gradients.classes, gradients.gamma * -rate, rows)
    if keep != 1:
        weight.scale(keep)
    condition.unrefreshed += 1
    if condition.unrefreshed >= refresh_every:
        weight.refresh()


@torch.no_grad()
def rebalance(weight: FactoredWeight) -> None:
    """Bring the singular values of U into [1/2, 2] and compute U^-1 anew; W stays what it is.

    O(D^3) where none is outside, O(V D) more for each that is, O(V D^2) where more than a third are: then U becomes I.
    """
    mixing = weight.mixing.double()
    if not _within(mixing):
        left, values, right = torch.linalg.svd(mixing)
        outside = ((values < LEAST) | (values > MOST)).nonzero()[:, 0]
        if 3 * len(outside) > weight.size:
            weight.fold()
            return
        left, values, right = left[:, outside], values[outside], right[outside]
        _multiply(weight, left, left * (values - 1))
        mixing = mixing + (left * (1 - values)) @ right
        weight.mixing.copy_(mixing)
    weight.inverse.copy_(torch.linalg.inv(mixing))
    weight.condition.checked()


def _within(mixing: Tensor) -> bool:
    """Whether all singular values are in range: two Cholesky factorisations tell, for less than the values cost."""
    gram = mixing @ mixing.T
    identity = torch.eye(len(mixing), dtype=mixing.dtype, device=mixing.device)
    both = torch.stack([gram - LEAST**2 * identity, MOST**2 * identity - gram])
    return not torch.linalg.cholesky_ex(both).info.any()


def _multiply(weight: FactoredWeight, left: Tensor, right: Tensor) -> None:
    """`F <- F (I + right left')`. left, right: (D, r)"""
    left, right = left.to(weight.factor.dtype), right.to(weight.factor.dtype)
    for rows in weight.blocks():
        block = weight.factor[rows]
        block.addmm_(block @ right, left.T)


def _check_rates(learning_rate: float, weight_decay: float) -> float:
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    if learning_rate * weight_decay >= 1:
        raise ValueError(
            f"learning_rate * weight_decay must be below 1, got {learning_rate} * {weight_decay}: it is the share of "
            "the weight that a step takes away"
        )
    return 1 - learning_rate * weight_decay


def _check_factor(step: Step, rate: float, learning_rate: float) -> None:
    eigenvalues = step.eigenvalues(rate)
    distance = float((1 - eigenvalues).abs().min())
    if distance < NEAR_SINGULAR:
        most = float(eigenvalues.max())
        raise RuntimeError(
            f"the step's factor I - 2 lr H' diag(alpha) H has an eigenvalue of size {distance:.3g}; without fold=True "
            f"it has to be {NEAR_SINGULAR} at least. The largest eigenvalue of 2 lr H' diag(alpha) H is {most:.3g} at "
            f"lr = {learning_rate:.3g}: take a learning rate below {learning_rate * (1 - NEAR_SINGULAR) / most:.3g}, "
            "or fold=True. The head is left as it was"
        )
