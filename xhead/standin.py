"""A stand-in for a tensor that has not been computed: it answers what it can, and otherwise becomes the tensor.

It is no `torch.Tensor` subclass: torch.compile, pickle and the tree maps of FSDP see an ordinary Python object. PyTorch
hands every function called on it to `__torch_function__`.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor


class MaterializedWarning(UserWarning):
    """Logits were built after all, and the memory and time of building them were spent."""


@dataclass
class Record:
    """What became of the stand-ins of one source: counted here, shown by `xhead.status`."""

    cut: int = 0
    materialized: int = 0
    operations: dict[str, int] = field(default_factory=dict)
    compiled: bool = False
    compiled_materialized: str | None = None
    loss: Any = None
    answered: bool = False
    """Whether a cross-entropy was answered with the loss since this was last set to False."""
    warned: set[str] = field(default_factory=set)

    def count_cut(self) -> None:
        if torch.compiler.is_compiling():
            # A counter would be a guard that fails at the next call; a constant written is none.
            self.compiled = True
        else:
            self.cut += 1

    def count_materialized(self, operation: str, consequence: str) -> None:
        if torch.compiler.is_compiling():
            self.compiled_materialized = operation
            return
        self.materialized += 1
        self.operations[operation] = self.operations.get(operation, 0) + 1
        self.warn(operation, f"`{operation}` needs the logits themselves: {consequence}")

    def other_loss(self) -> str | None:
        """What the head was patched with, where that is not the cross-entropy that the logits themselves give."""
        plain = self.loss is None or getattr(self.loss, "is_cross_entropy", False)
        return None if plain else repr(getattr(self.loss, "name", self.loss))

    def warn(self, key: str, message: str, category: type[Warning] = MaterializedWarning) -> None:
        """Warn once about `key`."""
        if torch.compiler.is_compiling() or key in self.warned:
            return
        self.warned.add(key)
        warnings.warn(f"xhead: {message}", category, stacklevel=4)


def recorded(method: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a method as the answer to the torch function and the tensor method of its name.

    Where it returns NotImplemented, the tensor is built and asked instead.
    """
    name = method.__name__

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        answer = self._ask(name, args, kwargs)
        if answer is NotImplemented:
            return getattr(self._give_up(name), name)(*_dense_of(args, name), **_dense_of(kwargs, name))
        return answer

    call.answer = method  # type: ignore[attr-defined]
    return call


_REFLECTED = {"add": "add", "mul": "mul", "sub": "rsub"}
"""Functions of a tensor and a stand-in -> the one that gives the same with the stand-in first."""


class StandIn:
    """Base of the lazy objects. Subclasses give `shape`, `dtype`, `device`, `_record` and `_build()`."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    _record: Record
    _dense: Tensor | None = None
    _answers: ClassVar[dict[str, Callable[..., Any]]] = {}

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        own = {name: value.answer for name, value in vars(cls).items() if hasattr(value, "answer")}
        cls._answers = {**cls._answers, **own}

    @classmethod
    def answers(cls, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register `function(stand_in, *args, **kwargs)` as the answer to the torch function of its name."""
        cls._answers[function.__name__] = function
        return function

    def _ask(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The answer to a torch function, or NotImplemented where it takes the tensor itself."""
        if self._dense is not None or name not in self._answers:
            return NotImplemented
        return self._answers[name](self, *args, **kwargs)

    def _build(self) -> Tensor:
        raise NotImplementedError

    def materialize(self) -> Tensor:
        """The tensor itself, differentiable. It is kept, and from then on answers everything asked of this object."""
        if self._dense is not None:
            return self._dense
        dense = self._build()
        if not torch.is_inference_mode_enabled():
            self._dense = dense
        return dense

    def _give_up(self, operation: str) -> Tensor:
        if self._dense is None:
            size, other = self.numel() * self.dtype.itemsize, self._record.other_loss()
            meaning = "Slower and larger, not wrong."
            if other is not None and self.requires_grad:
                meaning = (
                    f"Slower and larger, and a loss computed of them is not {other}, which answers F.cross_entropy."
                )
            self._record.count_materialized(operation, f"{tuple(self.shape)} were built, {_readable(size)}. {meaning}")
        return self.materialize()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        name = func.__name__
        if not args and "input" in kwargs:
            args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
        answer = NotImplemented
        if "out" in kwargs or not args:
            pass
        elif isinstance(args[0], StandIn):
            answer = args[0]._ask(name, args[1:], kwargs)
        elif name in _REFLECTED and len(args) == 2 and not kwargs:
            answer = args[1]._ask(_REFLECTED[name], (args[0],), kwargs)
        if answer is not NotImplemented:
            return answer
        return func(*_dense_of(args, name), **_dense_of(kwargs, name))

    # What a tensor answers without its values.

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    layout = torch.strided
    is_sparse = is_quantized = is_nested = is_leaf = False
    grad = None
    names = property(lambda self: (None,) * self.ndim)
    itemsize = property(lambda self: self.dtype.itemsize)
    nbytes = property(lambda self: self.numel() * self.dtype.itemsize)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    ndimension = dim

    def numel(self) -> int:
        return self.shape.numel()

    nelement = numel

    def element_size(self) -> int:
        return self.dtype.itemsize

    def get_device(self) -> int:
        return -1 if self.device.type == "cpu" else self.device.index

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def is_complex(self) -> bool:
        return False

    def is_contiguous(self, memory_format=torch.contiguous_format) -> bool:
        return memory_format == torch.contiguous_format

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-d tensor")
        return self.shape[0]

    def __iter__(self):
        for position in range(len(self)):
            yield self[position]  # type: ignore[index]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is not defined here. Names with an underscore are probes of pickle, copy and others.
        if name.startswith("_") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if callable(getattr(torch.Tensor, name)):

            def method(*args, **kwargs):
                answer = self._ask(name, args, kwargs)
                if answer is not NotImplemented:
                    return answer
                return getattr(self._give_up(name), name)(*_dense_of(args, name), **_dense_of(kwargs, name))

            return method
        return getattr(self._give_up(name), name)

    __hash__ = object.__hash__


for _name in ("numel", "is_floating_point", "is_complex"):
    StandIn._answers[_name] = getattr(StandIn, _name)


def _dense_operator(name: str) -> Callable[..., Any]:
    def operator(self, *args):
        return getattr(self._give_up(name), name)(*_dense_of(args, name))

    operator.__name__ = name
    return operator


_OPERATORS = (
    "eq ne lt le gt ge matmul rmatmul imatmul pow rpow ipow mod rmod imod floordiv rfloordiv ifloordiv",
    "and or xor invert abs bool float int complex index array contains setitem reversed",
)
for _name in " ".join(_OPERATORS).split():
    if hasattr(torch.Tensor, f"__{_name}__"):
        setattr(StandIn, f"__{_name}__", _dense_operator(f"__{_name}__"))


def _dense_of(value: Any, operation: str) -> Any:
    """`value` with every stand-in in it replaced by its tensor."""
    if isinstance(value, StandIn):
        return value._give_up(operation)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_dense_of(item, operation) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)([_dense_of(item, operation) for item in value])
    if isinstance(value, dict):
        return {key: _dense_of(item, operation) for key, item in value.items()}
    return value


def _readable(size: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.1f} GB"
