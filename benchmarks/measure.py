"""Time and memory of callables, and the record of where they were measured."""

import contextlib
import ctypes
import datetime
import gc
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition of one callable."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float | list[float]]:
        return {
            "median": self.median,
            "min": min(self.seconds),
            "max": max(self.seconds),
            "seconds": list(self.seconds),
        }


@dataclass(frozen=True)
class Memory:
    """Peaks over one call, in bytes, above what was held before it.

    `allocated` is what the tensor allocator handed out at once; `beyond` the same without the results that the caller
    named; `resident` the growth of the process (CPU) or of the allocator's reserve (GPU), results included, None where
    the system does not tell.
    """

    allocated: int
    beyond: int
    resident: int | None


def time_interleaved(
    callables: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    report: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Time the callables in turns, A B A B ..., so that a change of the machine's speed meets all of them alike.

    Args:
        callables: name to callable. What a call returns is freed outside the time taken.
        repeats: timed rounds; `warmup` untimed rounds come before them.
        device: on a GPU, each call is timed from an idle device until the device is idle again.
        report: called with a line after each round.

    Raises:
        ValueError: no callable, or no repetition.
    """
    if not callables:
        raise ValueError("callables is empty: there is nothing to time")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for turn in range(warmup + repeats):
        for name, function in callables.items():
            _synchronize(device)
            start = time.perf_counter()
            result = function()
            _synchronize(device)
            elapsed = time.perf_counter() - start
            del result
            if turn >= warmup:
                seconds[name].append(elapsed)
        if report is not None:
            kind = "warm-up" if turn < warmup else "round"
            report(
                f"{kind} {turn + 1 if turn < warmup else turn + 1 - warmup} of {warmup if turn < warmup else repeats}"
            )
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def peak_memory(
    function: Callable[[], object],
    *,
    results: Callable[[], Sequence[Tensor | None]] = tuple,
    reset: Callable[[], object] | None = None,
    device: torch.device | str = "cpu",
) -> Memory:
    """Peak memory of one call.

    Args:
        function: what to measure. Call it once before, so that buffers of the first call alone do not count.
        results: called afterwards; the tensors that the caller keeps, such as the gradients: `beyond` leaves them out
            from the moment they exist.
        reset: called before each measured call, to let go of the results of the one before.

    On the CPU the resident peak is the kernel's high-water mark of the process, in a second call because the profiler,
    which the first one runs under, holds memory too.
    """
    reset = reset or gc.collect
    reset()
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        return _peak_memory_cuda(function, results, device)
    allocated, beyond = peak_allocated(function, results)
    reset()
    return Memory(allocated, beyond, _resident_peak(function))


def peak_allocated(
    function: Callable[[], object], results: Callable[[], Sequence[Tensor | None]] = tuple
) -> tuple[int, int]:
    """`allocated` and `beyond` of `Memory` over one call on the CPU, by the allocator's events in torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    sizes = [t.untyped_storage().nbytes() for t in results() if t is not None]
    del kept
    # The profiler's own tables attribute memory to operators; only the raw events tell what was held at one time.
    raw: Any = profiler.profiler
    events = raw.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    return peak_of_events([nbytes for _, _, nbytes in changes], sizes)


def peak_of_events(changes: Sequence[int], result_sizes: Sequence[int] = ()) -> tuple[int, int]:
    """Peak of a running sum of allocations (positive) and frees (negative), with and without the results.

    A result is known by its size: of the blocks of that size, those that live from some event to the end hold it.
    """
    held = list(itertools.accumulate(changes))
    beyond = list(held)
    for size in set(result_sizes):
        live = list(itertools.accumulate((change == size) - (change == -size) for change in changes))
        lasting = list(result_sizes).count(size)
        for i in reversed(range(len(live))):
            lasting = max(min(lasting, live[i]), 0)
            beyond[i] -= lasting * size
    return max([0, *held]), max([0, *beyond])


def _peak_memory_cuda(function, results, device: torch.device) -> Memory:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    kept = function()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    named = sum(t.untyped_storage().nbytes() for t in results() if t is not None)
    del kept
    return Memory(peak, max(peak - named, 0), torch.cuda.max_memory_reserved(device) - reserved)


def _resident_peak(function: Callable[[], object]) -> int | None:
    """Growth of the process at its largest during a call; None where Linux's /proc cannot be asked."""
    gc.collect()
    _return_freed_memory()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before = _status_bytes("VmRSS")
        kept = function()
        peak = _status_bytes("VmHWM")
    except OSError:
        return None
    del kept
    return None if before is None or peak is None else max(peak - before, 0)


def _return_freed_memory() -> None:
    """Give the system what the C library keeps of freed memory: a call would use that first, and seem to need none."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int | None:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return None


def _synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def environment(device: torch.device | str = "cpu") -> dict[str, object]:
    """Where and when a measurement was made."""
    record: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    for package in ("torch", "triton", "transformers", "xhead"):
        try:
            record[package] = version(package)
        except PackageNotFoundError:
            record[package] = None
    device = torch.device(device)
    record["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return record


def cpu_model() -> str:
    """The processor's name, with its instruction sets that matter for a GEMM."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    name = line.split(":", 1)[1].strip()
                    break
    except OSError:
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
