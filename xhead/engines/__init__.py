"""How statistics are computed. Each engine is a module with `eligible(problem) -> bool`, `forward` and `backward`.

An engine's eligibility is a pure predicate on shapes, dtypes and devices; an eligible engine never fails half way.
"""

import functools
import warnings
from types import ModuleType

import torch

from xhead.engines import chunked, deferral, gram, reference, triton
from xhead.engines.problem import Problem

_ENGINES: dict[str, ModuleType] = {"gram": gram, "chunked": chunked, "triton": triton, "reference": reference}
"""In the order in which `"auto"` asks them: Triton's has to be named, until it has been measured on a GPU."""


def names() -> list[str]:
    """The engines by name, `"auto"` apart."""
    return list(_ENGINES)


def select(name: str, problem: Problem) -> str:
    """The engine that serves the problem: the one named, or for `"auto"` the first that is eligible.

    `"auto"` passes over the closed forms where tiles take fewer multiplications, unless the weight's gradient is put
    off.

    Raises ValueError for an unknown name, and for an engine that says it cannot serve this problem.
    """
    if problem.transform is not None:
        if name not in ("auto", "reference"):
            raise ValueError(f"engine {name!r} cannot transform logits that it does not build; use 'reference'")
        return "reference"
    if name == "auto":
        tiles = not gram.cheaper(problem) and not deferral.put_off(problem.weight)
        engines = [engine for engine in _ENGINES if not (engine == "gram" and tiles)]
        chosen = next(engine for engine in engines if _ENGINES[engine].eligible(problem))
        left_out = chosen == "chunked" and on_gpu(problem) and triton.eligible(problem)
        if left_out and not torch.compiler.is_compiling():
            _tell_of_triton()
        return chosen
    check_name(name)
    if not _ENGINES[name].eligible(problem):
        able = [other for other, engine in _ENGINES.items() if engine.eligible(problem)]
        raise ValueError(
            f"engine {name!r} cannot compute {', '.join(problem.names)} for {problem.hidden.dtype} on "
            f"{problem.hidden.device.type} with softcap={problem.softcap}; these can: {', '.join(able)}"
        )
    return name


def check_name(name: str) -> None:
    """Raise ValueError unless it is `"auto"` or the name of an engine."""
    if name != "auto" and name not in _ENGINES:
        raise ValueError(f'unknown engine {name!r}; known are "auto", {", ".join(map(repr, _ENGINES))}')


def on_gpu(problem: Problem) -> bool:
    return problem.hidden.device.type == "cuda"


@functools.cache
def _tell_of_triton() -> None:
    """Once: a user of a GPU expects its own kernels."""
    warnings.warn(
        "xhead computes by PyTorch's GEMMs on this GPU: its Triton kernels have not been measured on one, and "
        'engine="auto" leaves them out. python -m benchmarks.gpu measures them here; engine="triton" runs them, '
        'engine="chunked" is quiet.',
        UserWarning,
        stacklevel=3,
    )


def get(name: str) -> ModuleType:
    """The engine's module."""
    return _ENGINES[name]
