"""What a model may do to its logits before the loss, written down instead of done.

Pointwise steps go to a list; whatever acts on the rows alone (slices, reshapes that keep the classes last) is done to
the hidden states at once, since a row of logits is a function of its row of hidden states.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xhead import pointwise
from xhead.standin import StandIn, recorded


class Recording(StandIn):
    """The recorded operations. `LazyLogits` adds what they act on."""

    _terms: tuple[Any, ...]
    _steps: pointwise.Steps
    _classes: int
    _columns: tuple[int, int] | None
    _row_mask: Tensor | None
    _detached: bool
    _compute_dtype: torch.dtype

    def _like(self) -> Any:
        raise NotImplementedError

    def _copy(self, source: Any) -> None:
        raise NotImplementedError

    # Pointwise steps.

    def _step(self, name: str, argument: Any = None) -> Any:
        other = self._like()
        other._steps = (*self._steps, (name, argument))
        return other

    def _with(self, name: str, value: Any, negate: bool = False) -> Any:
        argument = pointwise.class_argument(value, self._classes, len(self.shape))
        if argument is None:
            return NotImplemented
        other = self._step(name, -argument if negate else argument)
        if isinstance(argument, Tensor):
            if self._detached and argument.requires_grad:
                return NotImplemented
            # A tensor of no dimensions is a number to type promotion, unless the value had some.
            if argument.is_floating_point() and value.ndim:
                other.dtype = torch.promote_types(self.dtype, argument.dtype)
        return other

    @recorded
    def mul(self, other):
        return self._with("mul", other)

    @recorded
    def div(self, other, rounding_mode=None):
        return NotImplemented if rounding_mode is not None else self._with("div", other)

    @recorded
    def add(self, other, alpha=1):
        if alpha != 1:
            return NotImplemented
        return self._sum(other) if isinstance(other, Recording) else self._with("add", other)

    @recorded
    def sub(self, other, alpha=1):
        return NotImplemented if alpha != 1 else self._with("add", other, negate=True)

    @recorded
    def rsub(self, other, alpha=1):
        return NotImplemented if alpha != 1 else self._step("mul", -1.0)._with("add", other)

    @recorded
    def neg(self):
        return self._step("mul", -1.0)

    @recorded
    def tanh(self):
        return self._step("tanh")

    @recorded
    def clamp(self, min=None, max=None):
        return self._apply("clamp", min, max)

    @recorded
    def sigmoid(self):
        return self._apply("sigmoid")

    @recorded
    def relu(self, inplace=False):
        return NotImplemented if inplace else self._apply("relu")

    @recorded
    def nan_to_num(self, nan=None, posinf=None, neginf=None):
        return self._apply("nan_to_num", nan, posinf, neginf)

    def _apply(self, name: str, *arguments: Any) -> Any:
        if any(isinstance(argument, (Tensor, StandIn)) for argument in arguments):
            return NotImplemented
        return self._step(*pointwise.pointwise(getattr(torch, name), name, *arguments))

    def _sum(self, other: "Recording") -> Any:
        """`[h1, h2] [W1, W2]'`: one projection, where both sides are multiples of projections (LoRA on the head is)."""
        factors = pointwise.linear_factor(self._steps), pointwise.linear_factor(other._steps)
        sliced = self._columns is not None or other._columns is not None
        if None in factors or sliced or self.shape != other.shape or self._detached != other._detached:
            return NotImplemented
        if other._dense is not None:
            return NotImplemented
        total = self._like()
        total._terms = tuple(
            term._replace(factor=term.factor * factor)
            for logits, factor in zip((self, other), factors, strict=True)
            for term in logits._terms
        )
        total.dtype = torch.promote_types(self.dtype, other.dtype)
        total._steps = (("cast", total.dtype),)
        return total

    def __mul__(self, other):
        return self.mul(other)

    __rmul__ = __mul__

    def __truediv__(self, other):
        return self.div(other)

    def __rtruediv__(self, other):
        return other / self._give_up("__rtruediv__")

    def __add__(self, other):
        return self.add(other)

    __radd__ = __add__

    def __sub__(self, other):
        return self.sub(other)

    def __rsub__(self, other):
        answer = self._ask("rsub", (other,), {})
        return other - self._give_up("__rsub__") if answer is NotImplemented else answer

    def __neg__(self):
        return self.neg()

    def __imul__(self, other):
        return self._become(self.mul(other))

    def __itruediv__(self, other):
        return self._become(self.div(other))

    def __iadd__(self, other):
        return self._become(self.add(other))

    def __isub__(self, other):
        return self._become(self.sub(other))

    def _become(self, result: Any) -> Any:
        if isinstance(result, Recording):
            self._copy(result)
        else:
            self._dense = result
        return self

    # Dtype and device.

    def _cast_to(self, dtype: torch.dtype) -> Any:
        if dtype == self.dtype:
            return self
        if not dtype.is_floating_point:
            return NotImplemented
        other = self._step("cast", dtype)
        other.dtype = dtype
        return other

    @recorded
    def float(self, memory_format=None):
        return self._cast_to(torch.float32)

    @recorded
    def double(self, memory_format=None):
        return self._cast_to(torch.float64)

    @recorded
    def half(self, memory_format=None):
        return self._cast_to(torch.float16)

    @recorded
    def bfloat16(self, memory_format=None):
        return self._cast_to(torch.bfloat16)

    @recorded
    def type(self, dtype=None, non_blocking=False):
        return self._cast_to(dtype) if isinstance(dtype, torch.dtype) else NotImplemented

    @recorded
    def type_as(self, other):
        return self.to(other)

    @recorded
    def to(self, *args, device=None, dtype=None, other=None, non_blocking=False, copy=False, memory_format=None):
        for argument in (*args, other):
            if isinstance(argument, torch.dtype):
                dtype = argument
            elif isinstance(argument, (torch.device, str, int)) and not isinstance(argument, bool):
                device = argument
            elif isinstance(argument, (Tensor, StandIn)):
                device, dtype = argument.device, argument.dtype
        logits = self if dtype is None else self._cast_to(dtype)
        if device is None or logits is NotImplemented or torch.device(device) == self.device:
            return logits
        # The statistics are taken where the weight is, and the answers are moved.
        logits = logits._like()
        logits.device = torch.device(device)
        return logits

    @recorded
    def contiguous(self, memory_format=torch.contiguous_format):
        return self

    @recorded
    def clone(self, memory_format=torch.preserve_format):
        return self._like()

    @recorded
    def detach(self):
        other = self._like()
        other._detached = True
        return other

    # Rows. The classes stay the last dimension.

    def _rows(self, function: Callable[[Tensor], Tensor]) -> Any:
        other = self._like()
        other._terms = tuple(term._replace(hidden=function(term.hidden)) for term in self._terms)
        if self._row_mask is not None:
            other._row_mask = function(self._row_mask.unsqueeze(-1)).squeeze(-1)
        return other

    @recorded
    def view(self, *shape):
        return self._reshaped(shape)

    @recorded
    def reshape(self, *shape, **named):
        return self._reshaped((*shape, *named.values()))

    def _reshaped(self, shape: tuple) -> Any:
        sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        if not sizes or isinstance(sizes[0], (torch.dtype, Tensor)):
            return NotImplemented
        *rows, last = sizes
        if last == -1:
            count = 1
            for size in rows:
                count *= size
            if count <= 0 or count * self._classes != self.numel():
                return NotImplemented
        elif last != self._classes:
            return NotImplemented
        return self._rows(lambda hidden: hidden.reshape(*rows, hidden.shape[-1]))

    @recorded
    def flatten(self, start_dim=0, end_dim=-1):
        start, end = self._dimension(start_dim), self._dimension(end_dim)
        return self._rows(lambda hidden: hidden.flatten(start, end)) if end < len(self.shape) - 1 else NotImplemented

    @recorded
    def unsqueeze(self, dim):
        position = dim if dim >= 0 else dim + len(self.shape) + 1
        return self._rows(lambda hidden: hidden.unsqueeze(position)) if position < len(self.shape) else NotImplemented

    @recorded
    def squeeze(self, *dim):
        last = len(self.shape) - 1
        if len(dim) > 1 or (dim and not isinstance(dim[0], int)):
            return NotImplemented
        dims = [self._dimension(dim[0])] if dim else [d for d in range(last + 1) if self.shape[d] == 1]
        if last in dims:
            # A last dimension of one class would go; a longer one stays.
            return NotImplemented if self._classes == 1 else self
        return self._rows(lambda hidden: hidden.squeeze(tuple(dims)) if dims else hidden)

    @recorded
    def transpose(self, dim0, dim1):
        first, second = self._dimension(dim0), self._dimension(dim1)
        if len(self.shape) - 1 in (first, second):
            return self if first == second else NotImplemented
        return self._rows(lambda hidden: hidden.transpose(first, second))

    @recorded
    def narrow(self, dim, start, length):
        index = (slice(None),) * self._dimension(dim)
        return self[(*index, slice(start, start + length))]

    def _dimension(self, dim: int) -> int:
        return dim if dim >= 0 else dim + len(self.shape)

    @recorded
    def __getitem__(self, index):
        items = list(index) if isinstance(index, tuple) else [index]
        consumed = 0
        for item in items:
            if isinstance(item, Tensor):
                consumed += item.ndim if item.dtype in (torch.bool, torch.uint8) else 1
            elif isinstance(item, (int, slice, list)) and not isinstance(item, bool):
                consumed += 1
            elif item is not None and item is not Ellipsis:
                return NotImplemented
        after = len(items)
        for position, item in enumerate(items):
            if item is Ellipsis:
                after = position + 1
        touches_classes = consumed == len(self.shape) or after < len(items)
        if not touches_classes:
            return self._rows(lambda hidden: hidden[tuple(items)])
        wanted = items[-1]
        if not isinstance(wanted, slice) or wanted.step not in (None, 1):
            return NotImplemented
        start, stop, _ = wanted.indices(self._classes)
        items[-1] = slice(None)
        logits = self._rows(lambda hidden: hidden[tuple(items)])
        return logits if (start, stop) == (0, self._classes) else logits._class_range(start, max(start, stop))

    def _class_range(self, start: int, stop: int) -> Any:
        if start == stop:
            return NotImplemented
        offset = 0 if self._columns is None else self._columns[0]
        other = self._like()
        other._columns = (offset + start, offset + stop)
        other._classes = stop - start
        other._steps = pointwise.of_classes(self._steps, slice(start, stop))
        return other
