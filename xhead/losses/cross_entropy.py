"""Cut cross-entropy: `lse - target`, with label smoothing, class weights and the squared-lse penalty.

Source: arXiv 2411.09009 for the cut; label smoothing and class weights as `torch.nn.functional.cross_entropy`; the
penalty is PaLM's "z-loss" (arXiv 2204.02311), which shares nothing with the spherical Z-loss.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xhead.losses import register
from xhead.losses.config import FilterConfig, check_number
from xhead.statistics import Statistics, row_statistics
from xhead.vocabulary import Vocabulary, own_rows


@dataclass(frozen=True)
class CrossEntropyConfig(FilterConfig):
    """Options of the loss `"cce"`; see `xhead.linear_cross_entropy` for what they mean."""

    label_smoothing: float = 0.0
    lse_penalty: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_smoothing(self.label_smoothing)
        check_number("lse_penalty", self.lse_penalty, 0)


@register(
    "cce",
    CrossEntropyConfig,
    formula="-log p_y, with label smoothing, class weights, lse_penalty lse^2",
    statistics=("lse", "target", "mean"),
    source="cut cross-entropy, arXiv 2411.09009",
)
def cross_entropy_rows(
    logits: Any,  # LazyLogits (n, V)
    labels: Tensor,  # (n,)
    config: CrossEntropyConfig,
    *,
    class_weight: Tensor | None = None,  # (V,)
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy a row: `(1 - e) c_y (lse - o_y) + e/V sum_k c_k (lse - o_k) + lse_penalty lse^2`, in nats.

    e is the config's label smoothing, or the call's where that is not 0; c the class weights, all ones without.
    """
    smoothing = label_smoothing or config.label_smoothing
    statistics = logits.statistics(
        *_names(smoothing),
        target=labels,
        mean_weight=class_weight if smoothing else None,
        **config.statistics_options(),
    )
    main, penalty = _rows(statistics, labels, logits.shape[-1], class_weight, smoothing, config.lse_penalty)
    return main + penalty


def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...) class indices, or (..., V) probabilities
    *,
    bias: Tensor | None = None,  # (V,)
    class_weight: Tensor | None = None,  # (V,)
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    scale: float = 1.0,
    lse_penalty: float = 0.0,
    return_lse: bool = False,
    return_accuracy: bool = False,
    filter_eps: float | str | None = "auto",
    compensate: bool = True,
    filter_hidden_grad: bool = True,
    filter_weight_grad: bool = True,
    engine: str = "auto",
    vocabulary: Vocabulary | None = None,
) -> Any:
    """Cross-entropy of logits `o = cap(scale * (hidden @ weight.T + bias))` that are never built.

    A row's loss is `(1 - e) c_y (lse - o_y) + e/V sum_k c_k (lse - o_k) + lse_penalty lse^2` nats, with e the label
    smoothing, c the class weights and `lse = log sum_k exp(o_k)`. For probabilities q the first term is
    `(1 - e) sum_k c_k q_k (lse - o_k)`. Rows whose target is `ignore_index` are dropped before the projection.

    Args:
        reduction: `"mean"` (over the rows that count, weighted by their target's class weight; over all rows for
            probabilities), `"sum"` or `"none"`. The penalty's mean is over the rows that count.
        softcap: `cap(x) = softcap * tanh(x / softcap)`.
        return_lse: also return lse, shaped as the rows, differentiable, 0 where ignored.
        return_accuracy: also return the share of the rows that count whose largest logit is the target's.
        filter_eps, compensate, filter_hidden_grad, filter_weight_grad, engine: see `xhead.LazyLogits.statistics`.
        vocabulary: weight and bias are the rows of this process, of those that a group shares; all else is the same in
            every process, and of all classes. A weight that is a DTensor split along its rows says so itself.

    Returns:
        The loss in float32 (float64 for float64 input); or (loss, lse), (loss, accuracy) or (loss, lse, accuracy).

    Raises:
        As `torch.nn.functional.linear_cross_entropy`: RuntimeError for shapes and dtypes that do not fit and for a
        label smoothing outside [0, 1], ValueError for a target of another batch size and an unknown reduction,
        IndexError for a target out of range.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'{reduction} is not a valid value for reduction; allowed are "mean", "sum" and "none"')
    _check_smoothing(label_smoothing)
    check_number("lse_penalty", lse_penalty, 0)
    if ignore_index is None:  # torch's default, which is this number
        ignore_index = -100
    weight, bias, vocabulary = own_rows(weight, bias, vocabulary)
    classes = weight.shape[0] if weight.ndim else 0
    if vocabulary is not None:
        classes = vocabulary.classes
        hidden = vocabulary.enter(hidden)
    _check_class_weight(class_weight, classes)
    soft = target.is_floating_point()
    mask = None
    if soft:
        _check_soft_target(target, hidden, ignore_index)
        weighted_target = target if class_weight is None else target * class_weight
    else:
        mask = target != ignore_index
        weighted_target = target
    statistics = row_statistics(
        hidden,
        weight,
        (*_names(label_smoothing), *(("argmax",) if return_accuracy else ())),
        bias=bias,
        scale=scale,
        softcap=softcap,
        target=weighted_target,
        mean_weight=class_weight if label_smoothing else None,
        row_mask=mask,
        filter_eps=filter_eps,
        compensate=compensate,
        filter_hidden_grad=filter_hidden_grad,
        filter_weight_grad=filter_weight_grad,
        engine=engine,
        vocabulary=vocabulary,
    )
    labels = weighted_target if mask is None else target.long().masked_fill(~mask, 0)
    main, penalty = _rows(statistics, labels, classes, class_weight, label_smoothing, lse_penalty)
    if mask is not None:
        main, penalty = main.masked_fill(~mask, 0.0), penalty.masked_fill(~mask, 0.0)
    loss = _reduce(main, penalty, reduction, mask, None if soft else class_weight, labels)
    extra = []
    if return_lse:
        extra.append(statistics.lse)
    if return_accuracy:
        assert statistics.argmax is not None
        extra.append(_accuracy(statistics.argmax, target.argmax(-1) if soft else labels, mask))
    return (loss, *extra) if extra else loss


def _names(label_smoothing: float) -> tuple[str, ...]:
    return ("lse", "target", "mean") if label_smoothing else ("lse", "target")


def _rows(
    statistics: Statistics,
    target: Tensor,
    classes: int,
    class_weight: Tensor | None,
    label_smoothing: float,
    lse_penalty: float,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy and the penalty a row. A target of probabilities comes multiplied by the class weights."""
    lse = statistics.lse
    assert lse is not None and statistics.target is not None
    if target.is_floating_point():
        main = target.sum(-1, dtype=lse.dtype) * lse - statistics.target
    else:
        main = lse - statistics.target
        if class_weight is not None:
            main = main * class_weight.to(lse.dtype)[target.long()]
    if label_smoothing:
        assert statistics.mean is not None
        total = float(classes) if class_weight is None else class_weight.sum(dtype=lse.dtype)
        main = (1 - label_smoothing) * main + (label_smoothing / classes) * total * (lse - statistics.mean)
    return main, lse_penalty * lse.square() if lse_penalty else torch.zeros_like(lse)


def _reduce(
    main: Tensor,
    penalty: Tensor,
    reduction: str,
    mask: Tensor | None,
    class_weight: Tensor | None,
    labels: Tensor,
) -> Tensor:
    if reduction == "none":
        return main + penalty
    if reduction == "sum":
        return main.sum() + penalty.sum()
    count = main.new_tensor(float(main.numel())) if mask is None else mask.sum().to(main.dtype)
    if class_weight is None:
        return (main.sum() + penalty.sum()) / count
    row_weight = class_weight.to(main.dtype)[labels]
    total = row_weight.sum() if mask is None else row_weight.masked_fill(~mask, 0.0).sum()
    return main.sum() / total + penalty.sum() / count


def _accuracy(predicted: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    correct = (predicted == labels).float()
    return correct.mean() if mask is None else correct.masked_fill(~mask, 0.0).sum() / mask.sum()


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}")


def _check_class_weight(class_weight: Tensor | None, classes: int) -> None:
    if class_weight is None:
        return
    if class_weight.shape != (classes,):
        raise RuntimeError(f"class_weight must have shape ({classes},), one a class, got {tuple(class_weight.shape)}")
    if not class_weight.is_floating_point() or class_weight.requires_grad:
        raise RuntimeError(
            f"class_weight must be floating and need no gradient, got {class_weight.dtype} with "
            f"requires_grad={class_weight.requires_grad}"
        )


def _check_soft_target(target: Tensor, hidden: Tensor, ignore_index: int) -> None:
    if target.ndim == hidden.ndim - 1:
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {target.dtype}; use target.long()")
    if ignore_index >= 0:
        raise RuntimeError(f"ignore_index cannot be specified when target contains probabilities, got {ignore_index}")
    if target.requires_grad:
        raise RuntimeError("a target of probabilities must not require a gradient; use target.detach()")
