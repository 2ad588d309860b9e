"""The recipes under `accelerate launch`, with the file that is shipped: any number of processes, the same losses."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from recipe_support import write_text

from recipes.common.errors import RecipeError
from recipes.one_billion_word.options import parse_options
from tests import test_recipe_arithmetic, test_recipe_forecasting, test_recipe_one_billion_word
from tests.processes import in_forks

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "recipes" / "accelerate" / "ddp.yaml"
ROWS = 4


def _one_billion_word(folder, output):
    text = folder / "text"
    if not text.exists():
        write_text(folder)
    return test_recipe_one_billion_word.command(text, output, "--loss", "cce", "--max_steps", "6")


def _arithmetic(folder, output):
    return test_recipe_arithmetic.command(output, "--losses", "cce+0.3*ntl_was", "--logging_steps", "1")


def _forecasting(folder, output):
    return test_recipe_forecasting.command(output, "--heads", "dense", "fourier-8")


def _losses(name, output):
    """Of each step that is logged, and of the test."""
    results = json.loads((output / "results.json").read_text())
    if name == "one_billion_word":
        assert results["patch"] == {"cut": 6, "materialized": 0}
        return [*(loss for _, loss in test_recipe_one_billion_word.losses(results)), results["test"]["loss"]]
    if name == "arithmetic":
        history = json.loads((output / "cce+0.3xntl_was-1" / "result.json").read_text())["history"]
        return [entry["loss"] for entry in history if "loss" in entry]
    return [score[key] for (score,) in results["runs"].values() for key in ("nll", "smoothness")]


COMMANDS = {"one_billion_word": _one_billion_word, "arithmetic": _arithmetic, "forecasting": _forecasting}


def _launch(processes, name, *arguments, file=FILE):
    launcher = ["accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0"]
    line = [sys.executable, "-m", *launcher, "--num_processes", str(processes), "-m", f"recipes.{name}", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)


def _main(rank, name, arguments):
    module = importlib.import_module(f"recipes.{name}.{'train' if name == 'one_billion_word' else 'compare'}")
    module.main(arguments)


def _fork(processes, name, *arguments):
    """Without the launcher and its imports, which take most of the time."""
    folder = Path(arguments[arguments.index("--output_dir") + 1]).with_name("group")
    folder.mkdir()
    in_forks(_main, processes, folder, name, list(arguments))


SLOW = [
    pytest.param(_launch, each, name, marks=pytest.mark.slow)
    for each in (1, 2, 4)
    for name in COMMANDS
    if (each, name) != (2, "one_billion_word")
]


@pytest.mark.parametrize(
    ("start", "processes", "name"), [*((_fork, 2, name) for name in COMMANDS), (_launch, 2, "one_billion_word"), *SLOW]
)
def test_as_one_process(start, processes, name, tmp_path):
    _main(0, name, [*COMMANDS[name](tmp_path, tmp_path / "alone"), "--per_device_train_batch_size", str(ROWS)])
    output = tmp_path / "several"
    share = ("--per_device_train_batch_size", str(ROWS // processes))
    done = start(processes, name, *COMMANDS[name](tmp_path, output), *share)
    assert done is None or done.returncode == 0, done.stderr
    expected = _losses(name, tmp_path / "alone")
    assert len(expected) >= 4
    np.testing.assert_allclose(_losses(name, output), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "distributed_type: FSDP, and would run plain data parallel"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "distributed_type: MEGATRON_LM, and would"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, "tp_size: 2, and would .*ddp.yaml"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "1", "ACCELERATE_USE_FSDP": "false"}, None),
    ],
)
def test_what_accelerate_would_leave_out_is_refused(variables, message, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = _one_billion_word(tmp_path, tmp_path / "run")
    if message is None:
        parse_options(command)
        return
    with pytest.raises(RecipeError, match=message):
        parse_options(command)


@pytest.mark.slow
def test_a_launch_of_shards_on_a_cpu_is_refused(tmp_path):
    arguments = _forecasting(tmp_path, tmp_path / "run")
    launched = _launch(2, "forecasting", *arguments, file=FILE.with_name("fsdp2.yaml"))
    assert launched.returncode != 0
    assert "would run plain data parallel" in launched.stderr
    assert not (tmp_path / "run").exists()
