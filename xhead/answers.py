"""What lazy logits answer without being built: the losses and log-probabilities that row statistics can give."""

import re
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

from xhead.lazy import LazyLogits
from xhead.losses import get_loss
from xhead.standin import StandIn, recorded


@LazyLogits.answers
def cross_entropy(
    logits: LazyLogits,  # (N, V) or (V,)
    target: Tensor,  # (N,) or ()
    weight: Tensor | None = None,  # (V,)
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """`F.cross_entropy` on lazy logits: the loss that the head was patched with, of the rows whose target counts.

    Inside a loss, it is cross-entropy itself.

    The reduction, the ignored rows and the class weights' normalisation are those of `F.cross_entropy`.
    """
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if logits.ndim not in (1, 2) or not isinstance(target, Tensor) or target.is_floating_point():
        return NotImplemented
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            f"target must have shape {tuple(logits.shape[:-1])}, one class a row of the logits, "
            f"got {tuple(target.shape)}"
        )
    rows_shape = target.shape
    target = target.reshape(-1).to(logits.device)
    options: dict[str, Any] = {}
    if weight is not None:
        options["class_weight"] = weight
    if label_smoothing:
        options["label_smoothing"] = label_smoothing
    kept = target != ignore_index
    logits._record.count_cut()
    rows, kept_target, index = _loss_rows(logits.reshape(-1, logits.shape[-1]), target, kept, options)
    dtype = torch.float32 if torch.is_autocast_enabled(logits.device.type) else logits.dtype
    if reduction == "none":
        if index is not None:
            rows = rows.new_zeros(target.shape).index_copy(0, index, rows)
        return rows.reshape(rows_shape).to(dtype)
    total = rows.sum()
    if reduction == "mean":
        counts = kept_target.new_ones(()).expand(kept_target.shape) if weight is None else weight[kept_target]
        if index is None:
            counts = counts * kept
        total = total / counts.sum()
    return total.to(dtype)


def _loss_rows(
    logits: LazyLogits, target: Tensor, kept: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss rows, their targets, and which rows they are (None: all, with 0 for a row that is left out)."""
    index = None
    loss = get_loss("cce") if logits._inside_loss else logits._record.loss or get_loss("cce")
    logits._record.answered = True
    if loss.ordered or torch.compiler.is_compiling() or target.device.type != "cpu" or logits._sharded:
        # Finding which rows count would make the host wait for the device; the engines are given the mask instead.
        # Processes that share the classes send one another numbers of a size that does not depend on the labels.
        logits = logits._like()
        logits._row_mask = kept
        target = target.masked_fill(~kept, 0)
    elif not kept.all():
        index = kept.nonzero().squeeze(1)
        logits, target = logits[index], target[index]

    def compute(bound: LazyLogits) -> Tensor:
        labels = target.to(bound._terms[0].hidden.device)
        vocabulary = bound._factors().vocabulary if bound._sharded else None
        if vocabulary is not None:
            described = re.sub(r" at 0x[0-9a-f]+", "", repr(loss))
            vocabulary.exchange(f"loss {described}, with {', '.join(options) or 'no options'}")
        bound._inside_loss = True
        with torch.autocast(labels.device.type, enabled=False):
            rows = loss(bound, labels, **options)
        if not isinstance(rows, Tensor) or rows.shape != labels.shape:
            got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
            raise ValueError(f"a loss must return one number a row, shape {tuple(labels.shape)}, got {got}")
        return rows

    rows = logits.evaluate(compute).to(logits.device)
    if logits._row_mask is not None:
        rows = torch.where(kept, rows, torch.zeros_like(rows))
    return rows, target, index


@LazyLogits.answers
def log_softmax(
    logits: LazyLogits, dim: int | None = None, _stacklevel: Any = 3, dtype: torch.dtype | None = None
) -> Any:
    """`log_softmax(dim=-1)`, still lazy: `LazyLogProbs`."""
    if dim is None or not logits.ndim or dim not in (-1, logits.ndim - 1):
        return NotImplemented
    dtype = _stacklevel if isinstance(_stacklevel, torch.dtype) else dtype
    return LazyLogProbs(logits, dtype or logits.dtype)


@LazyLogits.answers
def logsumexp(logits: LazyLogits, dim: Any, keepdim: bool = False) -> Any:
    """`logsumexp(dim=-1)`."""
    if dim not in (-1, logits.ndim - 1, (-1,)):
        return NotImplemented
    logits._record.count_cut()
    lse = logits.statistics("lse").lse
    assert lse is not None
    lse = lse.to(logits.device, logits.dtype)
    return lse.unsqueeze(-1) if keepdim else lse


@LazyLogits.answers
def argmax(logits: LazyLogits, dim: int | None = None, keepdim: bool = False) -> Any:
    """`argmax(dim=-1)`."""
    if dim is None or dim not in (-1, logits.ndim - 1):
        return NotImplemented
    logits._record.count_cut()
    classes = logits.detach().statistics("argmax").argmax.to(logits.device)
    return classes.unsqueeze(-1) if keepdim else classes


@LazyLogits.answers
def gather(logits: LazyLogits, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
    """`gather(-1, index)` of one class a row."""
    if not _one_class_a_row(logits, dim, index):
        return NotImplemented
    logits._record.count_cut()
    found = logits.statistics("target", target=index.squeeze(-1)).target
    assert found is not None
    return found.to(logits.device, logits.dtype).unsqueeze(-1)


def _one_class_a_row(logits: StandIn, dim: int, index: Tensor) -> bool:
    last = dim in (-1, logits.ndim - 1)
    return last and isinstance(index, Tensor) and index.shape == (*logits.shape[:-1], 1) and index.dtype == torch.int64


class LazyLogProbs(StandIn):
    """`sign * log_softmax(logits, -1)`, not computed: what label smoothing asks of it takes row statistics only.

    It answers `-`, `gather(-1, index)` of one class a row and `sum(-1)`, in its dtype.
    """

    def __init__(
        self, logits: LazyLogits, dtype: torch.dtype, sign: float = 1.0, lse: dict[bool, Tensor] | None = None
    ):
        self._logits, self._sign = logits, sign
        self._record = logits._record
        self._lse = {} if lse is None else lse
        self._dense = None
        self.shape, self.dtype, self.device = logits.shape, dtype, logits.device

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return self._logits.requires_grad

    def _build(self) -> Tensor:
        logits = self._logits.materialize()
        with torch.set_grad_enabled(logits.requires_grad):
            return torch.log_softmax(logits, -1, dtype=self.dtype) * self._sign

    def _statistic(self, name: str, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A statistic of the logits and their lse, which is computed once."""
        self._record.count_cut()
        other = None if self._logits._inside_loss else self._record.other_loss()
        if other is not None and self.requires_grad:
            self._record.warn(
                "log_softmax",
                f"log-probabilities were asked of logits that are patched with the loss {other}: what is made of them "
                "is cross-entropy, and not that loss",
                UserWarning,
            )
        with_grad = torch.is_grad_enabled()
        wanted = (name,) if with_grad in self._lse else (name, "lse")
        found = self._logits.statistics(*wanted, target=target)
        if found.lse is not None:
            self._lse[with_grad] = found.lse
        return getattr(found, name), self._lse[with_grad]

    @recorded
    def neg(self):
        return LazyLogProbs(self._logits, self.dtype, -self._sign, self._lse)

    def __neg__(self):
        return self.neg()

    @recorded
    def nll_loss(self, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean"):
        """`F.nll_loss(F.log_softmax(logits, -1), target)` is `F.cross_entropy(logits, target)`."""
        if self._sign != 1:
            return NotImplemented
        loss = cross_entropy(self._logits.to(self.dtype), target, weight, size_average, ignore_index, reduce, reduction)
        return loss

    @recorded
    def gather(self, dim, index, *, sparse_grad=False):
        if not _one_class_a_row(self, dim, index):
            return NotImplemented
        target, lse = self._statistic("target", index.squeeze(-1))
        return (self._sign * (target - lse)).to(self.device, self.dtype).unsqueeze(-1)

    @recorded
    def sum(self, dim=None, keepdim=False, *, dtype=None):
        if dim not in (-1, self.ndim - 1):
            return NotImplemented
        mean, lse = self._statistic("mean")
        total = (self._sign * self.shape[-1] * (mean - lse)).to(self.device, dtype or self.dtype)
        return total.unsqueeze(-1) if keepdim else total
