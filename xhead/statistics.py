"""Row statistics of logits that are never built: the one differentiable primitive under every loss.

With hidden states `h_i` (N, D) and classifier rows `w_k` (V, D), the logits are
`o_ik = cap(scale * (h_i . w_k + bias_k))` with `cap(x) = softcap * tanh(x / softcap)`. A loss needs a few numbers a row
of them, and so does its gradient; neither needs N x V memory.
"""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xhead import autograd, sharded
from xhead.engines.problem import STATISTICS, FilterOptions, Problem
from xhead.engines.summands import SUMMANDS
from xhead.vocabulary import Vocabulary


@dataclass(frozen=True)
class Statistics:
    """The statistics asked for; the others are None. Each is shaped as the rows: `hidden.shape[:-1]`.

    float32, or float64 where the hidden states are float64; `argmax` is int64, `expectation` has the trailing shape
    of `values`, and `column_logits` is (E,), a number an entry of the rows' column sets. All but `max` and `argmax` are
    differentiable.
    """

    lse: Tensor | None = None
    target: Tensor | None = None
    mean: Tensor | None = None
    variance: Tensor | None = None
    entropy: Tensor | None = None
    expectation: Tensor | None = None
    max: Tensor | None = None
    argmax: Tensor | None = None
    subset_lse: Tensor | None = None
    complement_lse: Tensor | None = None
    pointwise_sum: Tensor | None = None
    column_logits: Tensor | None = None


def row_statistics(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    names: tuple[str, ...],
    *,
    bias: Tensor | None = None,  # (V,)
    scale: float = 1.0,
    softcap: float | None = None,
    target: Tensor | None = None,  # (...) class indices, or (..., V) probabilities
    values: Tensor | None = None,  # (V,) or (V, M)
    columns: Tensor | None = None,  # (..., K) class indices, -1 for none, or a sparse CSR tensor (N, V)
    mean_weight: Tensor | None = None,  # (V,)
    pointwise: str | None = None,
    pointwise_parameters: tuple[float, ...] = (),
    row_mask: Tensor | None = None,  # (...) bool
    filter_eps: float | str | None = "auto",
    compensate: bool = True,
    filter_hidden_grad: bool = True,
    filter_weight_grad: bool = True,
    engine: str = "auto",
    transform: Callable[[Tensor], Tensor] | None = None,
    vocabulary: Vocabulary | None = None,
) -> Statistics:
    """Statistics of each row of `o = cap(scale * (hidden @ weight.T + bias))`, with `p = softmax(o)` along the row.

    | name | value |
    |---|---|
    | `lse` | `log sum_k exp(o_k)` |
    | `target` | `o_target`, or `sum_k target_k o_k` for a target of probabilities |
    | `mean` | `sum_k c_k o_k / sum_k c_k`, with `c = mean_weight` (default: all ones) |
    | `variance` | `1/V sum_k (o_k - 1/V sum_j o_j)^2` |
    | `entropy` | `-sum_k p_k log p_k` in nats |
    | `expectation` | `sum_k p_k values_k` |
    | `max`, `argmax` | the largest logit and its class |
    | `subset_lse` | `log sum exp` over the row's `columns`; -inf where it has none |
    | `complement_lse` | `log sum exp` over all classes but the row's `columns`; -inf where none is left |
    | `pointwise_sum` | `sum_k s(o_k)`, with s the function named by `pointwise` |
    | `column_logits` | (E,): `o_k` of each row's `columns`, row after row, by class and without repeats |

    | pointwise | `s(o)` |
    |---|---|
    | `softplus` | `log(1 + exp(o))` |
    | `stablemax` | `o + 1` where `o >= 0`, else `1 / (1 - o)` |
    | `asymmetric` | `-x^gamma log(1 - x)`, `x = max(sigmoid(o) - margin, 0)`; `pointwise_parameters=(gamma, margin)` |
    | `adjusted_cosine` | `softplus(s (2 ((o/s + 1) / 2)^t - 1) + b)`; `pointwise_parameters=(s, t, b)` |

    Args:
        row_mask: rows that are False are left out of all work: their statistics are 0, with no gradient.
        filter_eps: softmax entries below it are not multiplied out in the gradient of `lse`. `"auto"` is
            `finfo(dtype).eps / 32`, None (or 0) is the exact gradient.
        compensate: what the filter skips is replaced by its closed form (see docs/design.md); otherwise it is dropped.
        filter_hidden_grad, filter_weight_grad: False keeps that gradient exact.
        engine: `"auto"`, or one of `xhead.engines.names()`.
        transform: a differentiable function of the capped logits (N, V), which are built for it: N x V memory.
        vocabulary: `weight` and `bias` are the rows that this process holds of those that a group shares, `hidden` is
            what `vocabulary.enter` gave, and all else is of all V classes and the same in every process, as the
            statistics are.

    Raises:
        RuntimeError: shapes or dtypes that do not fit together, in the words of the tensors concerned.
        IndexError: a target or column outside `[0, V)` (on a GPU: a device-side assertion).
        ValueError: an unknown statistic, engine or option value, or one that lacks its argument.

    Source: cut cross-entropy (arXiv 2411.09009) for `lse` and the filter; the rest in docs/design.md.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    classes = weight.shape[0]
    if vocabulary is not None:
        classes = vocabulary.classes
        asked = (
            f"{', '.join(names)}; scale={scale}, softcap={softcap}, pointwise={pointwise}{pointwise_parameters}, "
            f"filter_eps={filter_eps}, compensate={compensate}, filter_hidden_grad={filter_hidden_grad}, "
            f"filter_weight_grad={filter_weight_grad}, engine={engine}, mean_weight={mean_weight is not None}"
        )
        vocabulary.agree(hidden, weight, bias, asked)
    _check_inputs(hidden, weight, bias, classes)
    rows_shape = hidden.shape[:-1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    _check_names(names, target=target, values=values, columns=columns, pointwise=pointwise)
    _check_pointwise(pointwise, pointwise_parameters)
    _check_device(hidden, bias=bias, target=target, values=values, columns=columns, mean_weight=mean_weight)
    target = _flat_target(target, rows_shape, classes, row_mask)
    if vocabulary is None:
        _check_target(target, classes)
    sets = (None, None) if columns is None else compressed_columns(columns, rows_shape, classes)
    problem = Problem(
        hidden=flat,
        weight=weight,
        names=tuple(dict.fromkeys(names)),
        bias=bias,
        target=target,
        values=_flat_values(values, classes),
        row_offsets=sets[0],
        columns=sets[1],
        mean_weight=_class_vector("mean_weight", mean_weight, classes),
        pointwise=pointwise,
        pointwise_parameters=tuple(float(parameter) for parameter in pointwise_parameters),
        row_mask=None if row_mask is None else row_mask.reshape(-1),
        scale=check_scale(scale),
        softcap=check_softcap(softcap),
        transform=transform,
        filter=FilterOptions(
            filter_threshold(filter_eps, hidden.dtype), compensate, filter_hidden_grad, filter_weight_grad
        ),
    )
    if vocabulary is None:
        results = autograd.statistics(problem, engine)
    else:
        results = sharded.statistics(problem, engine, vocabulary)
        # Now that all know that they have the same: a process that stops before leaves the others waiting.
        _check_target(target, classes)
    shaped = {}
    for name, value in results.items():
        if name == "column_logits":
            shaped[name] = value
            continue
        trailing = values.shape[1:] if name == "expectation" and values is not None else ()
        shaped[name] = value.reshape((*rows_shape, *trailing))
    return Statistics(**shaped)


def filter_threshold(filter_eps: float | str | None, dtype: torch.dtype) -> float:
    """The probability below which the gradient filter skips: `finfo(dtype).eps / 32` for `"auto"`, 0 for None."""
    if filter_eps is None:
        return 0.0
    if filter_eps == "auto":
        # float64 is where exactness is asked for; it is not filtered unless a number is given.
        return 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps / 32
    if isinstance(filter_eps, str) or not 0.0 <= filter_eps < 1.0:
        raise ValueError(f'filter_eps must be "auto", None or a number in [0, 1), got {filter_eps!r}')
    return float(filter_eps)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As nn.Linear under autocast: float32 operands are cast to the autocast dtype."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_inputs(hidden: Tensor, weight: Tensor, bias: Tensor | None, classes: int) -> None:
    if weight.ndim != 2:
        raise RuntimeError(f"weight must be 2-D (V, D), got shape {tuple(weight.shape)}")
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"hidden must be (..., D) with D = {weight.shape[1]}, the last dimension of weight, got shape "
            f"{tuple(hidden.shape)}"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise RuntimeError(
            f"hidden and weight must have the same floating dtype, got {hidden.dtype} and {weight.dtype}; "
            "cast one of them with .to(), or run under torch.autocast"
        )
    if hidden.device != weight.device:
        raise RuntimeError(f"hidden and weight must be on one device, got {hidden.device} and {weight.device}")
    if classes == 0:
        raise RuntimeError("weight has no rows: at least one class is needed")
    _class_vector("bias", bias, weight.shape[0])


def _check_device(hidden: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != hidden.device:
            raise RuntimeError(
                f"{name} must be on the device of the hidden states, {hidden.device}, got {tensor.device}: move it "
                "there, with .to(logits.device)"
            )


def _class_vector(name: str, vector: Tensor | None, classes: int) -> Tensor | None:
    if vector is not None and vector.shape != (classes,):
        raise RuntimeError(f"{name} must have shape ({classes},), one number a class, got {tuple(vector.shape)}")
    return vector


def check_scale(scale: float) -> float:
    """Raise TypeError for anything but a number: the gradient of a tensor would be lost."""
    if not isinstance(scale, numbers.Real):
        raise TypeError(
            f"scale must be a number, got {type(scale).__name__}; a learned one is multiplied with lazy logits, "
            "xhead.LazyLogits(hidden, weight) * scale"
        )
    return float(scale)


def check_softcap(softcap: float | None) -> float | None:
    """Raise TypeError for anything but a number or None, and ValueError for a number that is not positive."""
    if softcap is not None and not isinstance(softcap, numbers.Real):
        raise TypeError(f"softcap must be a number or None, got {type(softcap).__name__}")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be a positive number or None, got {softcap!r}")
    return None if softcap is None else float(softcap)


_NEEDED = {
    "target": "target",
    "expectation": "values",
    "subset_lse": "columns",
    "complement_lse": "columns",
    "column_logits": "columns",
    "pointwise_sum": "pointwise",
}


def _check_names(names: tuple[str, ...], **given: Tensor | str | None) -> None:
    if not names:
        raise ValueError(f"no statistic was asked for; known are {', '.join(STATISTICS)}")
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"unknown statistic {name!r}; known are {', '.join(STATISTICS)}")
        argument = _NEEDED.get(name)
        if argument is not None and given[argument] is None:
            raise ValueError(f"the statistic {name!r} needs the argument {argument}=")


def _check_pointwise(pointwise: str | None, parameters: tuple[float, ...]) -> None:
    if pointwise is None:
        wanted: tuple[str, ...] = ()
    elif pointwise in SUMMANDS:
        wanted = SUMMANDS[pointwise].parameters
    else:
        raise ValueError(f"unknown pointwise {pointwise!r}; known are {', '.join(SUMMANDS)}")
    if len(parameters) != len(wanted):
        raise ValueError(
            f"pointwise={pointwise!r} takes pointwise_parameters=({', '.join(wanted)}), got {tuple(parameters)}"
        )


def _flat_target(target: Tensor | None, rows_shape: torch.Size, classes: int, row_mask: Tensor | None) -> Tensor | None:
    if target is None:
        return None
    if target.is_floating_point():
        if target.shape != (*rows_shape, classes):
            raise RuntimeError(
                f"a target of probabilities must have shape {(*rows_shape, classes)}, got {tuple(target.shape)}"
            )
        return target.reshape(-1, classes)
    if target.dtype not in (torch.int64, torch.uint8):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {target.dtype}; use target.long()")
    if target.shape != rows_shape:
        raise ValueError(f"target must have shape {tuple(rows_shape)}, one class a row, got {tuple(target.shape)}")
    flat = target.reshape(-1).long()
    if row_mask is not None:
        flat = flat.masked_fill(~row_mask.reshape(-1), 0)
    return flat


def _check_target(target: Tensor | None, classes: int) -> None:
    if target is not None and not target.is_floating_point():
        check_range("target", target, classes)


def check_range(name: str, index: Tensor, classes: int) -> None:
    """Raise IndexError, naming the first value found, if an index lies outside `[0, classes)`."""
    if torch.compiler.is_compiling() or index.numel() == 0:
        return
    wrong = (index < 0) | (index >= classes)
    if index.device.type != "cpu":
        # Reading the answer here would make every call wait for the device.
        torch._assert_async(~wrong.any())
    elif wrong.any():
        value = int(index[wrong][0])
        hint = "; leave the rows out, logits[labels != -100], that mark no class" if value == -100 else ""
        raise IndexError(f"{name} {value} is out of bounds: classes are 0 to {classes - 1}{hint}")


def _flat_values(values: Tensor | None, classes: int) -> Tensor | None:
    if values is None:
        return None
    if values.ndim not in (1, 2) or values.shape[0] != classes:
        raise RuntimeError(f"values must be ({classes},) or ({classes}, M), got {tuple(values.shape)}")
    if values.requires_grad:
        raise RuntimeError("values must not require a gradient: expectation is differentiated for the logits only")
    return values.reshape(values.shape[0], -1)


def compressed_columns(columns: Tensor, rows_shape: torch.Size, classes: int) -> tuple[Tensor, Tensor]:
    """Per-row column sets as (offsets, columns), without repeats.

    columns: (..., K) class indices, -1 for none, or sparse CSR (N, V) -> (N + 1,), (sum of the sets' sizes,)
    """
    rows = rows_shape.numel()
    if columns.layout == torch.sparse_csr:
        if columns.shape != (rows, classes):
            raise RuntimeError(f"sparse columns must have shape {(rows, classes)}, got {tuple(columns.shape)}")
        offsets, flat = columns.crow_indices().long(), columns.col_indices().long()
        row = torch.repeat_interleave(torch.arange(rows, device=flat.device), offsets.diff())
    else:
        if columns.is_floating_point() or columns.shape[:-1] != rows_shape:
            raise RuntimeError(
                f"columns must be integers of shape {(*rows_shape, 'K')} or sparse CSR, got {columns.dtype} of shape "
                f"{tuple(columns.shape)}"
            )
        padded = columns.reshape(rows, columns.shape[-1]).long()
        row, position = (padded != -1).nonzero(as_tuple=True)
        flat = padded[row, position]
    check_range("column", flat, classes)
    key = torch.unique(row * classes + flat)
    counts = torch.bincount(key // classes, minlength=rows)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]), key % classes
