"""The losses that `benchmarks.gpu` times: xhead's own, PyTorch's, and other packages' where they are installed."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.cpu import Loss, stock, torch_chunked, xhead_loss
from xhead.engines import triton as engine

STOCK = "F.cross_entropy(F.linear)"


class NotInstalled(Exception):
    """The package or function that a loss needs is not there."""


@dataclass(frozen=True)
class Candidate:
    """A loss to time, made when its turn comes, and the constants of the Triton engine that it runs under."""

    name: str
    make: Callable[[], Loss]
    constants: Mapping[str, object] = field(default_factory=dict)

    @contextmanager
    def settings(self) -> Iterator[None]:
        before = {name: getattr(engine, name) for name in self.constants}
        try:
            for name, value in self.constants.items():
                setattr(engine, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(engine, name, value)


def _xhead(name: str, constants: Mapping[str, object] | None = None, **options: object) -> Candidate:
    return Candidate(name, lambda: xhead_loss(engine="triton", **options), constants or {})


def _compiled() -> Loss:
    def upcast(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(torch.nn.functional.linear(hidden, weight).float(), target)

    torch._dynamo.reset()
    return torch.compile(upcast, dynamic=False)


def _torch_chunked() -> Loss:
    loss = torch_chunked()
    if loss is None:
        raise NotInstalled(f"torch {torch.__version__} has no LinearCrossEntropyOptions; it needs 2.13")
    return loss


def _installed(module: str, name: str, package: str, **options: object) -> Loss:
    try:
        return partial(getattr(importlib.import_module(module), name), **options)
    except ImportError as error:
        raise NotInstalled(f"{package} ({error})") from error


_cut_cross_entropy = partial(_installed, "cut_cross_entropy", "linear_cross_entropy", "cut-cross-entropy")
_liger = partial(_installed, "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", "liger-kernel")
_quack = partial(_installed, "quack.linear_cross_entropy", "chunked_linear_cross_entropy", "quack-kernels")


GROUPS: dict[str, tuple[Candidate, ...]] = {
    "stock": (Candidate(STOCK, lambda: stock),),
    "xhead": (
        _xhead("xhead"),
        _xhead("xhead, filter off", filter_eps=None),
        # What the engine's constants are set by, and filters that drop what they skip to compare errors with.
        _xhead("xhead, all active tiles", {"DENSE_SHARE": 1.0}),
        *(_xhead(f"xhead, all active tiles, 2^-{n}", {"DENSE_SHARE": 1.0}, filter_eps=2.0**-n) for n in (10, 8)),
        _xhead("xhead, dropped", {"DENSE_SHARE": 1.0}, compensate=False),
        _xhead("xhead, filter off, forward in slices", {"FUSED_FORWARD": False}, filter_eps=None),
    ),
    "cut_cross_entropy": (
        Candidate("cut_cross_entropy", _cut_cross_entropy),
        Candidate("cut_cross_entropy, no filter", partial(_cut_cross_entropy, filter_eps=None)),
    ),
    "liger": (Candidate("Liger fused linear", _liger),),
    "torch": (Candidate("F.linear_cross_entropy, chunked", _torch_chunked),),
    "quack": (Candidate("QuACK chunked linear", _quack),),
    "compile": (Candidate("torch.compile of stock", _compiled),),
}
"""By what `--peers` calls them, in the order in which they are timed: those that compile longest come last."""
