"""`python -m benchmarks.gpu`: the Triton engine on a GPU: its tests, then time, memory and error beside other losses.

One command for a machine with a GPU, within a time that it is given: of 9 minutes, 500 seconds are shared out and the
rest is for what runs over. What is measured is written after every loss; what failed says why, and what there was no
time for is named. Where a loss takes the GPU from the process, a new one goes on behind it. A short training run beside
stock comes last, then which goals were met and what the engine's constants should be. `--smoke` runs the same on tiny
shapes on a CPU, in triton's interpreter, to see that the command works.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import gpu_training, gpu_verdicts, inputs, measure
from benchmarks.cpu import Training
from benchmarks.gpu_cases import CASES, SMOKE, Shape, Truth, exact, kinds
from benchmarks.gpu_losses import GROUPS, STOCK, Candidate, NotInstalled
from benchmarks.gpu_process import ROOT, Clock, ContextLost, run_tests, start_again, usable
from benchmarks.inputs import HeadInputs
from benchmarks.report import RESULTS, markdown_table, megabytes, save_json
from xhead.engines import active_tiles, class_order

TESTS = tuple(f"tests/test_triton{name}.py" for name in ("", "_slices", "_order", "_record", "_memory"))
NO_TIME = "no time left"
WARMUPS = 2  # calls
TRAINING_SECONDS = 75.0  # of the time given, kept for the training run
LEAST_SECONDS = 30.0  # for which a new process is worth its start


def seconds_of(function: Callable[[], object], device: torch.device, *, most: int = 20, about: float = 0.4) -> float:
    """Median seconds of a call by events on the GPU's stream, after some that compile and warm up; a CPU has one."""
    cuda = device.type == "cuda"
    for _ in range(WARMUPS if cuda else 0):
        function()
    taken: list[float] = []
    start = time.monotonic()
    while len(taken) < (3 if cuda else 1) or (len(taken) < most and time.monotonic() - start < about and cuda):
        if cuda:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            before.record()
            function()
            after.record()
            torch.cuda.synchronize(device)
            taken.append(before.elapsed_time(after) / 1e3)
        else:
            begin = time.perf_counter()
            function()
            taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


@contextmanager
def active_shares():
    """The share of active tiles that each filtered backward inside the context saw."""
    seen: list[float] = []
    init = active_tiles.ActiveTiles.__init__

    def watched(tiles, *arguments):
        init(tiles, *arguments)
        seen.append(tiles.share)

    with mock.patch.object(active_tiles.ActiveTiles, "__init__", watched):
        yield seen


def timed(candidate: Candidate, made: HeadInputs, truth: Truth, device: torch.device) -> dict[str, Any]:
    """One loss on some inputs: seconds forward and with the backward, memory beyond the gradients, and their errors.

    Errors and active tiles are of the calls that were timed, by an order of the classes learned from these inputs.
    """
    class_order.clear()
    loss, training = candidate.make(), Training(made)

    def forward() -> Tensor:
        with torch.no_grad():
            return loss(made.hidden, made.weight, made.target)

    with candidate.settings(), active_shares() as shares:
        record: dict[str, Any] = {"name": candidate.name, "both": seconds_of(lambda: training.step(loss), device)}
        record["hidden_error"], record["weight_error"] = truth.errors(*training.gradients())
        if shares:
            record["active_share"] = statistics.median(shares[WARMUPS:] or shares)
        try:
            record |= {"loss": float(forward()), "forward": seconds_of(forward, device)}
        except Exception as error:  # there are losses that only run with a gradient
            record["forward_why"] = reason(error)
        if device.type == "cuda":
            peak = measure.peak_memory(
                lambda: training.step(loss), results=training.gradients, reset=training.reset, device=device
            )
            record["beyond_gradients"] = peak.beyond
    return record


def reason(error: Exception) -> str:
    """An error's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def attempt(candidate: Candidate, *arguments: Any) -> dict[str, Any]:
    """The record of a loss, or why there is none."""
    try:
        return timed(candidate, *arguments)
    except NotInstalled as missing:
        return {"name": candidate.name, "why": f"not installed: {missing}"}
    except Exception as error:  # what a peer raises is its result
        return {"name": candidate.name, "why": reason(error)}
    finally:
        gc.collect()
        with suppress(RuntimeError):  # where the context is lost
            torch.cuda.empty_cache()


def measure_case(
    case: dict[str, Any],
    shape: Shape,
    make: Callable[..., HeadInputs],
    candidates: list[Candidate],
    device: torch.device,
    clock: Clock,
    save: Callable[[], object] = dict,
) -> None:
    """Every loss on one kind of inputs that the case does not have, and the bare GEMM, until the clock has run out.

    case: filled, and saved after each loss.

    Raises:
        ContextLost: by a loss, which the case has with its error.
    """
    wide = make(device)
    softmax = inputs.softmax_of(HeadInputs(wide.hidden[:256], wide.weight, wide.target[:256], wide.source))
    made = HeadInputs(wide.hidden.bfloat16(), wide.weight.bfloat16(), wide.target, wide.source)
    del wide
    truth = exact(made)
    out = torch.empty(shape.rows, min(shape.classes, 32768), dtype=made.hidden.dtype, device=device)
    part = made.weight[: out.shape[1]].T
    gemm = seconds_of(partial(torch.mm, made.hidden, part, out=out), device) * shape.classes / out.shape[1]
    del out, part
    case |= {"gemm": gemm, **vars(softmax)}
    results = case.setdefault("results", [])
    for candidate in without(case, candidates):
        if clock.left > 0:
            results.append(attempt(candidate, made, truth, device))
            save()
            if not usable(device):
                raise ContextLost(candidate.name)
        else:
            results.append({"name": candidate.name, "why": NO_TIME})


def without(case: dict[str, Any], candidates: list[Candidate]) -> list[Candidate]:
    """The candidates that a case has no result of."""
    known = {result["name"] for result in case.get("results", [])}
    return [candidate for candidate in candidates if candidate.name not in known]


def table(record: dict[str, Any]) -> str:
    results = record.get("results", [])
    base = next((r["both"] for r in results if r["name"] == STOCK and "both" in r), None)
    rows = [["GEMM", f"{record['gemm'] * 1e3:.2f}", *["-"] * 6]] if "gemm" in record else []
    reasons = [record["why"]] if "why" in record else []
    for found in results:
        if "why" in found:
            rows.append([found["name"], *["-"] * 7])
            reasons.append(f"{found['name']}: {found['why']}")
            continue
        if "forward_why" in found:
            reasons.append(f"{found['name']}, forward alone: {found['forward_why']}")
        rows.append(
            [
                found["name"],
                f"{found['forward'] * 1e3:.2f}" if "forward" in found else "-",
                f"{found['both'] * 1e3:.2f}",
                f"{found['both'] / base:.2f}" if base else "-",
                megabytes(found.get("beyond_gradients")),
                f"{found['hidden_error']:.1e}",
                f"{found['weight_error']:.1e}",
                f"{found['active_share']:.0%}" if "active_share" in found else "-",
            ]
        )
    columns = ["loss", "forward ms", "with backward ms", "x stock", "MB beyond gradients"]
    made = markdown_table([*columns, "hidden error", "weight error", "active tiles"], rows)
    return "\n".join([made, "", *reasons])


def environment(device: torch.device) -> dict[str, object]:
    record = measure.environment(device)
    for package in ("cut-cross-entropy", "liger-kernel", "quack-kernels"):
        record[package] = None
        with suppress(PackageNotFoundError):
            record[package] = version(package)
    if device.type == "cuda":
        record["cuda"] = torch.version.cuda
        record["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return record


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="shapes to measure")
    parser.add_argument("--peers", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="losses to time")
    parser.add_argument("--budget_seconds", type=float, default=500.0, help="for all of it (default %(default)s)")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="test files to run first; none: no tests")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU in triton's interpreter")
    parser.add_argument("--resume", action="store_true", help="go on with what the output file does not have")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    sys.path.insert(0, str(ROOT / "kernels"))  # for a checkout that is not installed
    clock = Clock(options.budget_seconds)
    if options.smoke and not os.environ.get("TRITON_INTERPRET"):
        # Read when triton is imported, which torch has done by now.
        again = [sys.executable, "-m", "benchmarks.gpu", *arguments]
        raise SystemExit(subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode)
    if not options.smoke and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a GPU, and torch finds none; --smoke tries the command without one")
    device = torch.device("cpu" if options.smoke else "cuda")
    record: dict[str, Any] = {"environment": environment(device), "smoke": options.smoke, "cases": []}
    if options.resume and options.output.exists():
        record = json.loads(options.output.read_text())
    print(record["environment"], flush=True)
    save = partial(save_json, options.output, record)
    if options.tests:
        try:
            record["tests"] = run_tests(options.tests, clock.left / 3)
        except Exception as error:  # the numbers do not need them
            record["tests"] = {"passed": None, "said": reason(error)}
        print(f"tests: {record['tests']}", flush=True)
    save()
    try:
        measure_cases(record, options, device, clock, save)
        compared = partial(gpu_training.compare, device, smoke=options.smoke, seconds=clock.left)
        record["training"] = compared() if clock.left > 0 else {"why": NO_TIME}
    except ContextLost as lost:
        save()
        if clock.left > LEAST_SECONDS:
            print(f"the GPU was lost by {lost}: going on in a new process", flush=True)
            start_again(arguments, clock.left)
        record["training"] = {"why": f"the GPU was lost by {lost}"}
    except Exception as error:  # what was measured before must not be lost
        record["training"] = {"why": reason(error)}
    save()
    record |= {"goals": gpu_verdicts.goals(record), "suggested": gpu_verdicts.suggested(record)}
    apart = record["training"].get("apart")
    record["goals"].append(gpu_verdicts.verdict("training, stock and xhead apart", apart, gpu_training.ALLOWED))
    save()
    print("\n".join(["", *gpu_verdicts.lines(record), "", f"written: {options.output}"]))
    return record


def measure_cases(
    record: dict[str, Any],
    options: argparse.Namespace,
    device: torch.device,
    clock: Clock,
    save: Callable[[], object],
) -> None:
    """Fill in the record's cases that it does not have: each kind of inputs of every shape before the next kind, so
    that a short run has seen every shape.

    Raises:
        ContextLost: in the case that the record has last.
    """
    candidates = [candidate for group in options.peers for candidate in GROUPS[group]]
    shapes = SMOKE if options.smoke else {name: CASES[name] for name in options.cases}
    work = [
        (name, kind) for turn in range(3) for name, shape in shapes.items() for kind in list(kinds(shape))[turn:][:1]
    ]
    for index, (name, kind) in enumerate(work):
        shape = shapes[name]
        case = next((known for known in record["cases"] if (known["case"], known["kind"]) == (name, kind)), None)
        if case is None:
            case = {"case": name, "kind": kind, "N": shape.rows, "V": shape.classes, "D": shape.width}
            record["cases"].append(case)
        elif "why" in case or not without(case, candidates):
            continue
        share = Clock((clock.left - TRAINING_SECONDS) / (len(work) - index))
        try:
            measure_case(case, shape, kinds(shape)[kind], candidates, device, share, save)
        except ContextLost:
            raise
        except Exception as error:  # one kind of inputs that cannot be made, say, must not cost the others
            case["why"] = reason(error)
            if not usable(device):
                raise ContextLost(f"{name}, {kind}") from error
        save()
        print(f"\n{name}, {kind}: N {shape.rows:,}, V {shape.classes:,}, D {shape.width:,}, bfloat16\n", flush=True)
        print(table(case), flush=True)


if __name__ == "__main__":
    main()
