"""The recipes under `accelerate launch`, with the files that are shipped: any number of processes, the same losses."""

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from recipe_support import launched_environment, write_text
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from recipes.common.errors import RecipeError
from recipes.common.parts import in_parts
from recipes.extreme_classification.neural.processes import processes
from recipes.one_billion_word import train
from recipes.one_billion_word.options import parse_options
from tests import test_recipe_arithmetic, test_recipe_forecasting, test_recipe_one_billion_word
from tests.processes import in_forks
from tests.tiny import tiny

ROOT = Path(__file__).resolve().parents[1]
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
    """Of each step that is logged, and of the test where there is one."""
    results = json.loads((output / "results.json").read_text())
    if name == "one_billion_word":
        assert results.get("patch", {"cut": 6, "materialized": 0}) == {"cut": 6, "materialized": 0}
        test = [results["test"]["loss"]] if "test" in results else []
        return [*(loss for _, loss in test_recipe_one_billion_word.losses(results)), *test]
    if name == "arithmetic":
        history = json.loads((output / "cce+0.3xntl_was-1" / "result.json").read_text())["history"]
        return [entry["loss"] for entry in history if "loss" in entry]
    return [score[key] for (score,) in results["runs"].values() for key in ("nll", "smoothness")]


COMMANDS = {"one_billion_word": _one_billion_word, "arithmetic": _arithmetic, "forecasting": _forecasting}


FILES = ("ddp", "fsdp2", "tensor_parallel")


def _file(name):
    return ROOT / "recipes" / "accelerate" / f"{name}.yaml"


def _launch(file, processes, name, *arguments):
    launcher = ["accelerate.commands.launch", "--config_file", str(_file(file)), "--main_process_port", "0"]
    if file == "tensor_parallel":
        launcher += ["--parallelism_config_tp_size", str(processes)]
    line = [sys.executable, "-m", *launcher, "--num_processes", str(processes), "-m", f"recipes.{name}", *arguments]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def _main(rank, name, arguments, environment=None):
    os.environ.update(environment or {})
    module = importlib.import_module(f"recipes.{name}.{'train' if name == 'one_billion_word' else 'compare'}")
    module.main(arguments)


def _fork(file, processes, name, *arguments):
    """Without the launcher and its imports, which take most of the time."""
    folder = Path(arguments[arguments.index("--output_dir") + 1] + "-group")
    folder.mkdir()
    environment = launched_environment(_file(file))
    if file == "tensor_parallel":
        environment["PARALLELISM_CONFIG_TP_SIZE"] = str(processes)
    in_forks(_main, processes, folder, name, list(arguments), environment)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of a recipe in one process, and the folder they were found in."""

    @functools.cache
    def run(name, *more):
        folder = tmp_path_factory.mktemp(name)
        _main(0, name, [*COMMANDS[name](folder, folder / "run"), *more, "--per_device_train_batch_size", str(ROWS)])
        losses = _losses(name, folder / "run")
        assert len(losses) >= 4
        return folder, losses

    return run


def _rows(file, processes):
    """Of each process: with tensor parallelism all have the same ones."""
    return ROWS if file == "tensor_parallel" else ROWS // processes


def _assert_same(start, file, processes, name, alone, output, *more):
    folder, expected = alone(name, *more)
    share = ("--per_device_train_batch_size", str(_rows(file, processes)))
    start(file, processes, name, *COMMANDS[name](folder, output), *more, *share)
    np.testing.assert_allclose(_losses(name, output), expected, rtol=0, atol=1e-4)


SLOW = [
    pytest.param(_launch, file, each, name, marks=pytest.mark.slow)
    for file in FILES
    for each in (1, 2, 4)
    for name in COMMANDS
    if (file, each, name) != ("ddp", 2, "one_billion_word") and (file, each) != ("tensor_parallel", 1)
]


@pytest.mark.parametrize(
    ("start", "file", "processes", "name"),
    [
        *((_fork, file, 2, name) for file in FILES for name in COMMANDS),
        (_launch, "ddp", 2, "one_billion_word"),
        *SLOW,
    ],
)
def test_as_one_process(start, file, processes, name, alone, tmp_path):
    more = ("--attention_heads", "4") if (file, processes) == ("tensor_parallel", 4) else ()
    _assert_same(start, file, processes, name, alone, tmp_path / "run", *more)


SPHERICAL = ("--loss", "stock", "--head", "spherical", "--head_options")
HEADS = {
    "spherical": (*SPHERICAL, '{"loss": "log_taylor", "learning_rate": 5, "stabilise_every": 3}'),
    "Z-loss": (
        *SPHERICAL,
        '{"learning_rate": 0.3}',
        *["--network", "ngram", "--hidden_sizes", "32,16", "--embedding_size", "8"],
    ),
    "vq": ("--loss", "stock", "--head", "vq"),
    "adaptive": ("--loss", "stock", "--head", "adaptive"),
    "untied": ("--tie_embeddings", "False"),
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    ("file", "head"),
    # A spherical head shares its rows itself.
    [(file, head) for file in FILES for head in HEADS if file == "ddp" or SPHERICAL[3] not in HEADS[head]],
)
def test_heads(file, head, processes, alone, tmp_path):
    more = (*HEADS[head], "--attention_heads", "4")
    _assert_same(_fork, file, processes, "one_billion_word", alone, tmp_path / "run", *more)


RESUMED = [
    ("fsdp2", (), 1),
    pytest.param("fsdp2", (), 2, marks=pytest.mark.slow),
    pytest.param("fsdp2", (), 4, marks=pytest.mark.slow),
    ("ddp", HEADS["spherical"], 4),
    pytest.param("ddp", HEADS["spherical"], 2, marks=pytest.mark.slow),
    pytest.param("ddp", (), 4, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("file", "head", "processes"), RESUMED)
def test_a_run_of_two_processes_goes_on_in_others(file, head, processes, alone, tmp_path):
    more = (*head, "--save_steps", "2", "--save_total_limit", "9")
    _assert_same(_fork, file, 2, "one_billion_word", alone, tmp_path / "run", *more)
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again)
    for unwanted in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(again / unwanted)
    (again / "results.json").unlink()
    folder, expected = alone("one_billion_word", *more)
    command = [*COMMANDS["one_billion_word"](folder, again), *more, "--resume"]
    _fork(file, processes, "one_billion_word", *command, "--per_device_train_batch_size", str(ROWS // processes))
    results = json.loads((again / "results.json").read_text())
    assert results.get("patch", {"cut": 4})["cut"] == 4  # steps since the checkpoint
    found = [*(loss for _, loss in test_recipe_one_billion_word.losses(results)), results["test"]["loss"]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    if file == "fsdp2" or head:
        with pytest.raises(RecipeError, match="(sharded|head_shared) was True and is False"):
            train.run(*parse_options(command))


@pytest.mark.parametrize(
    ("variables", "options", "message"),
    [
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            (),
            "fsdp_version: 1 and .*, which this recipe does not",
        ),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, (), "distributed_type: MEGATRON_LM, which"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, (), "distributed_type: DEEPSPEED, which .*fsdp2.yaml"),
        ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, (), "cp_size: 2, which"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "2"}, ("--resume",), "--resume needs checkpoints"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "1", "ACCELERATE_USE_FSDP": "false"}, ("--resume",), None),
    ],
)
def test_what_accelerate_would_leave_out_is_refused(variables, options, message, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = [*_one_billion_word(tmp_path, tmp_path / "run"), *options]
    if message is None:
        parse_options(command)
        return
    with pytest.raises(RecipeError, match=message):
        parse_options(command)


def test_models_that_cannot_be_in_parts(tmp_path, monkeypatch):
    """GPT-2's layers have no plan for being split; T5's embeddings are in the encoder and the decoder."""
    sizes = {"vocab_size": 9, "num_heads": 1, "num_layers": 1, "d_model": 8, "d_kv": 8, "d_ff": 8}
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "2")
    with pytest.raises(RecipeError, match="no plan for splitting the layers of GPT2LMHeadModel: launch with fsdp2"):
        in_parts(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1)), tmp_path)
    monkeypatch.setenv("PARALLELISM_CONFIG_TP_SIZE", "1")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="cannot share out T5ForConditionalGeneration"):
        in_parts(T5ForConditionalGeneration(T5Config(**sizes)), tmp_path)


def test_parts_that_were_not_made(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    parts = in_parts(tiny("LlamaForCausalLM"), tmp_path)
    with pytest.raises(RuntimeError, match="left it whole in every process"), parts.gathered():
        pass


def test_extreme_classification_shares_its_labels_itself(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(
        RecipeError, match="distributed_type: FSDP, which this recipe does not run: launch with ddp.yaml"
    ):
        processes()
