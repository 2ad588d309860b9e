"""`python -m benchmarks.gpu`: the Triton engine on a GPU: its tests, then time, memory and error beside other losses.

One command for a machine with a GPU, within a time that it is given: of 9 minutes, 500 seconds are shared out and the
rest is for what runs over. What is measured is written after every shape and kind of inputs; what there was no time for
is named. A short training run beside stock comes last, then which goals were met and what the engine's constants should
be. `--smoke` runs the same on tiny shapes on a CPU, in triton's interpreter, to see that the command works.
"""

import argparse
import gc
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
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import gpu_training, gpu_verdicts, inputs, measure
from benchmarks.cpu import Training, relative_error
from benchmarks.gpu_losses import GROUPS, STOCK, Candidate, NotInstalled
from benchmarks.inputs import HeadInputs
from benchmarks.report import RESULTS, markdown_table, megabytes, save_json
from xhead.engines import active_tiles


class Shape(NamedTuple):
    rows: int
    classes: int
    width: int
    kept_entries: tuple[int, ...] = (40, 200)  # a row, of p >= 2^-12, in inputs like a trained model's


CASES = {
    "gemma": Shape(8192, 256000, 2304),
    "llama3": Shape(8192, 128256, 4096),
    "qwen": Shape(4096, 151936, 896),
    "llama2": Shape(16384, 32000, 4096),
}
SMOKE = {"smoke": Shape(32, 512, 16, (61,))}
ROOT = Path(__file__).parent.parent
TESTS = tuple(f"tests/test_triton{name}.py" for name in ("", "_slices", "_order", "_record", "_memory"))
NO_TIME = "no time left"
TRAINING_SECONDS = 75.0  # of the time given, kept for the training run
CHECKED = 64  # rows of hidden, and 4 times as many classes, whose gradient is compared


class Clock:
    """What is left of the time given."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def run_tests(files: list[str], seconds: float) -> dict[str, object]:
    """The engine's tests in a process of their own; what they said last."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(seconds, 1)
        )
    except subprocess.TimeoutExpired as expired:
        lines = (expired.stdout or b"").decode().strip().splitlines()
        return {"passed": None, "said": f"not finished after {seconds:.0f} s: {lines[-1] if lines else ''}"}
    lines = (done.stdout + done.stderr).strip().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "said": lines[-1] if lines else "", "failures": failures}


def seconds_of(function: Callable[[], object], device: torch.device, *, most: int = 20, about: float = 0.4) -> float:
    """Median seconds of a call by events on the GPU's stream, after two that compile and warm up; a CPU has one."""
    cuda = device.type == "cuda"
    for _ in range(2 if cuda else 0):
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


class Truth(NamedTuple):
    """Exact gradients of the mean loss for some rows and some classes."""

    row: Tensor
    hidden_grad: Tensor  # (r, D) float64
    classes: Tensor
    weight_grad: Tensor  # (c, D) float64

    def errors(self, hidden_grad: Tensor, weight_grad: Tensor) -> tuple[float, float]:
        return (
            relative_error(hidden_grad[self.row].double(), self.hidden_grad),
            relative_error(weight_grad[self.classes].double(), self.weight_grad),
        )


def exact(made: HeadInputs, block: int = 1024) -> Truth:
    """The truth from dense logits, a block of rows at a time: log-sum-exps in float32, the rest in float64."""
    hidden, weight, target = made.hidden, made.weight, made.target
    rows, classes, device = hidden.shape[0], weight.shape[0], hidden.device
    row = torch.arange(0, rows, max(rows // CHECKED, 1), device=device)[:CHECKED]
    # Half of the classes are targets, which rare ones seldom are.
    spread = torch.arange(0, classes, max(classes // (2 * CHECKED), 1), device=device)
    column = torch.cat([spread, target[: 2 * CHECKED]]).unique()
    wide = weight.float()
    lse = torch.cat([torch.logsumexp(part.float() @ wide.T, 1) for part in hidden.split(block)]).double()
    del wide
    residual = torch.exp(hidden.double() @ weight[column].double().T - lse[:, None])
    residual -= (target[:, None] == column).double()
    weight_grad = residual.T @ hidden.double() / rows
    hidden_grad = torch.zeros(row.shape[0], hidden.shape[1], dtype=torch.float64, device=device)
    for start in range(0, classes, 16384):
        part = weight[start : start + 16384].double()
        hidden_grad += torch.exp(hidden[row].double() @ part.T - lse[row, None]) @ part
    hidden_grad = (hidden_grad - weight[target[row]].double()) / rows
    return Truth(row, hidden_grad, column, weight_grad)


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
    """One loss on some inputs: seconds forward and with the backward, memory beyond the gradients, and their errors."""
    loss, training = candidate.make(), Training(made)

    def forward() -> Tensor:
        with torch.no_grad():
            return loss(made.hidden, made.weight, made.target)

    with candidate.settings(), active_shares() as shares:
        training.step(loss)
        hidden_error, weight_error = truth.errors(*training.gradients())
        record: dict[str, Any] = {
            "name": candidate.name,
            "both": seconds_of(lambda: training.step(loss), device),
            "hidden_error": hidden_error,
            "weight_error": weight_error,
        }
        try:
            record |= {"loss": float(forward()), "forward": seconds_of(forward, device)}
        except Exception as error:  # there are losses that only run with a gradient
            record["forward_why"] = reason(error)
        if device.type == "cuda":
            peak = measure.peak_memory(
                lambda: training.step(loss), results=training.gradients, reset=training.reset, device=device
            )
            record["beyond_gradients"] = peak.beyond
    if shares:
        record["active_share"] = shares[0]
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
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def kinds(shape: Shape) -> dict[str, Callable[..., HeadInputs]]:
    """Kinds of inputs by name: each a function of the device and the dtype."""

    def initialisation(device: torch.device) -> HeadInputs:
        return inputs.random_initialisation(*shape[:3], device=device)

    def trained(entries: int) -> Callable[..., HeadInputs]:
        share = entries / shape.classes
        return lambda device: inputs.trained_like(*shape[:3], kept_share=share, device=device)

    found: dict[str, Callable[..., HeadInputs]] = {"random initialisation": initialisation}
    for entries in shape.kept_entries:
        found[f"like trained, {entries} entries a row"] = trained(entries)
    return found


def measure_case(
    shape: Shape, make: Callable[..., HeadInputs], candidates: list[Candidate], device: torch.device, clock: Clock
) -> dict[str, Any]:
    """Every loss on one kind of inputs, and the bare GEMM, until the clock has run out."""
    wide = make(device)
    softmax = inputs.softmax_of(HeadInputs(wide.hidden[:256], wide.weight, wide.target[:256], wide.source))
    made = HeadInputs(wide.hidden.bfloat16(), wide.weight.bfloat16(), wide.target, wide.source)
    del wide
    truth = exact(made)
    out = torch.empty(shape.rows, min(shape.classes, 32768), dtype=made.hidden.dtype, device=device)
    part = made.weight[: out.shape[1]].T
    gemm = seconds_of(partial(torch.mm, made.hidden, part, out=out), device) * shape.classes / out.shape[1]
    del out, part
    record: dict[str, Any] = {"gemm": gemm, **vars(softmax), "results": []}
    for candidate in candidates:
        if clock.left > 0:
            record["results"].append(attempt(candidate, made, truth, device))
        else:
            record["results"].append({"name": candidate.name, "why": NO_TIME})
    return record


def table(record: dict[str, Any]) -> str:
    base = next((r["both"] for r in record["results"] if r["name"] == STOCK and "both" in r), None)
    rows = [["GEMM", f"{record['gemm'] * 1e3:.2f}", *["-"] * 6]]
    reasons = []
    for found in record["results"]:
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
        record["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return record


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="shapes to measure")
    parser.add_argument("--peers", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="losses to time")
    parser.add_argument("--budget_seconds", type=float, default=500.0, help="for all of it (default %(default)s)")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="test files to run first; none: no tests")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on a CPU in triton's interpreter")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse_arguments(arguments)
    sys.path.insert(0, str(ROOT / "kernels"))  # for a checkout that is not installed
    clock = Clock(options.budget_seconds)
    if options.smoke and not os.environ.get("TRITON_INTERPRET"):
        # Read when triton is imported, which torch has done by now.
        again = [sys.executable, "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
        raise SystemExit(subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode)
    if not options.smoke and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu needs a GPU, and torch finds none; --smoke tries the command without one")
    device = torch.device("cpu" if options.smoke else "cuda")
    record: dict[str, Any] = {"environment": environment(device), "smoke": options.smoke, "cases": []}
    print(record["environment"], flush=True)
    if options.tests:
        record["tests"] = run_tests(options.tests, clock.left / 3)
        print(f"tests: {record['tests']}", flush=True)
    save_json(options.output, record)
    candidates = [candidate for group in options.peers for candidate in GROUPS[group]]
    shapes = SMOKE if options.smoke else {name: CASES[name] for name in options.cases}
    # Each kind of inputs of every shape before the next kind, so that a short run has seen every shape.
    work = [
        (name, kind) for turn in range(3) for name, shape in shapes.items() for kind in list(kinds(shape))[turn:][:1]
    ]
    for index, (name, kind) in enumerate(work):
        shape = shapes[name]
        share = Clock((clock.left - TRAINING_SECONDS) / (len(work) - index))
        case: dict[str, Any] = {"case": name, "kind": kind, "N": shape.rows, "V": shape.classes, "D": shape.width}
        try:
            case |= measure_case(shape, kinds(shape)[kind], candidates, device, share)
        except (RuntimeError, ValueError) as error:
            case["why"] = reason(error)
        record["cases"].append(case)
        save_json(options.output, record)
        print(f"\n{name}, {kind}: N {shape.rows:,}, V {shape.classes:,}, D {shape.width:,}, bfloat16\n", flush=True)
        print(case["why"] if "why" in case else table(case), flush=True)
    try:
        record["training"] = gpu_training.compare(device, smoke=options.smoke) if clock.left > 0 else {"why": NO_TIME}
    except Exception as error:  # what was measured before must not be lost
        record["training"] = {"why": reason(error)}
    record |= {"goals": gpu_verdicts.goals(record), "suggested": gpu_verdicts.suggested(record)}
    apart = record["training"].get("apart")
    record["goals"].append(gpu_verdicts.verdict("training, stock and xhead apart", apart, gpu_training.ALLOWED))
    save_json(options.output, record)
    print("\n".join(["", *gpu_verdicts.lines(record), "", f"written: {options.output}"]))
    return record


if __name__ == "__main__":
    main()
