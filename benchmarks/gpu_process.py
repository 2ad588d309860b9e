"""Processes of `benchmarks.gpu`: the engine's tests in one of their own, and a fresh one after a GPU's context is lost.

An illegal access in any loss's kernel leaves a process without a GPU: every later call fails. What was measured is in
the output file by then, so the command starts again in a new process, which goes on with what is not in the file.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


class ContextLost(Exception):
    """Nothing more can be done on the GPU in this process."""


class Clock:
    """What is left of the time given."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def run_tests(files: list[str], seconds: float) -> dict[str, object]:
    """The engine's tests in a process of their own: whether they passed, which failed, and what was said last."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", *files]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, ended = process.communicate(timeout=max(seconds, 1))[0], True
    except subprocess.TimeoutExpired:
        # With the processes that tests started: those would go on beside what is timed.
        os.killpg(process.pid, signal.SIGKILL)
        output, ended = process.communicate()[0], False
    lines = output.strip().splitlines()
    outcomes = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)", output, re.MULTILINE)
    said = lines[-1] if lines else ""
    if not ended:
        said = f"not finished after {seconds:.0f} s: {sum(o == 'PASSED' for _, o in outcomes)} passed; {said}"
    failed = list(dict.fromkeys(name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")))
    return {"passed": process.returncode == 0 if ended else None, "said": said, "failures": failed}


def usable(device: torch.device) -> bool:
    """Whether the device still answers."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def start_again(arguments: list[str], seconds: float) -> None:
    """This command in a fresh process, in the place of this one, for the time that is left; it does not return."""
    sys.stdout.flush()
    rest = ["--resume", "--tests", "--budget_seconds", f"{seconds:.0f}"]
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *arguments, *rest])
