"""Settings of the whole test run."""

import os
import sys

# Nothing is fetched in a test: a name that is not a local folder must fail at once, not after a network timeout.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: threads of their own inside each would only wait for one another.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined: without a GPU, kernels are run by triton's interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# The same examples each time, and no time limit on one: a busy machine must not fail a test.
hypothesis.settings.register_profile("xhead", deadline=None, derandomize=True)
hypothesis.settings.load_profile("xhead")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers whether it runs alone, in another order or on another worker."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_accelerate_state():
    """accelerate keeps the first Accelerator's settings for the whole process, and refuses others."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
