"""The One Billion Word recipe as a command: training, resuming, outputs, memory and the demo."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from recipe_support import tiny_model, write_text
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import LlamaForCausalLM, TrainerCallback

import xhead
from recipes.common.checkpoints import STATE, find_checkpoint
from recipes.common.errors import RecipeError
from recipes.one_billion_word.corpora import load_corpus
from recipes.one_billion_word.demo import comparison, loss_difference
from recipes.one_billion_word.memory import _peak_cpu, measure_loss_memory
from recipes.one_billion_word.options import parse_options
from recipes.one_billion_word.train import main, run
from recipes.one_billion_word.vocabulary import Vocabulary


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    return write_text(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "nonsense"], r"--loss is 'nonsense'; known: stock, .*cce"),
        (["--loss", "cce+0.1*nonsense"], "--loss cce.0.1.nonsense .*unknown loss 'nonsense' in 'cce.0.1.nonsense'"),
        (["--hidden_size", "30", "--attention_heads", "4"], "--hidden_size is 30"),
        (["--loss_options", "{}}", "--loss", "cce"], "not JSON"),
        (["--loss_options", "[1]", "--loss", "cce"], "JSON object"),
        (["--loss_options", '{"filter_eps": 0}'], "needs a --loss other than stock"),
        (["--loss", "cce", "--loss_options", '{"nonsense": 1}'], "nonsense"),
        (["--bloc_length", "3"], "not understood: --bloc_length 3"),
        (["--block_length", "3"], "--block_length is 3; it must be at least 8"),
        (["--save_steps", "15", "--logging_steps", "10"], "--save_steps 15 must be a multiple"),
        (["--vocab", "x", "--vocab_size", "9"], "exclude each other"),
        (["--vocab", "nothing.txt"], "nothing.txt cannot be read"),
    ],
)
def test_bad_options_are_clear_errors(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--data", str(text_folder), "--output_dir", str(tmp_path / "run"), "--use_cpu", "True", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_a_sum_of_losses(text_folder: Path, tmp_path: Path) -> None:
    results = run(*parse_options(command(text_folder, tmp_path / "run", "--loss", "cce+0.5*focal", "--max_steps", "2")))
    assert results["patch"] == {"cut": 2, "materialized": 0}
    assert results["valid"]["perplexity"] > 1


def command(data: Path, output: Path, *more: str) -> list[str]:
    fixed = {
        "data": data,
        "output_dir": output,
        "hidden_size": 16,
        "layers": 1,
        "attention_heads": 2,
        "block_length": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "logging_steps": 1,
        "save_steps": 5,
        "valid_steps": 4,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return [word for name, value in fixed.items() for word in (f"--{name}", str(value))] + list(more)


def losses(results: dict) -> list[tuple[int, float]]:
    return [
        (entry["step"], entry[key]) for entry in results["history"] for key in ("loss", "valid_loss") if key in entry
    ]


class KilledAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.taken: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.taken.append(state.global_step)


@pytest.mark.parametrize(("step", "checkpoint"), [(3, 0), (8, 5)])
def test_a_killed_run_goes_on_to_the_same_losses(text_folder: Path, tmp_path: Path, step: int, checkpoint: int) -> None:
    whole = run(*parse_options(command(text_folder, tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        run(*parse_options(command(text_folder, tmp_path / "cut")), callbacks=[KilledAt(step)])
    steps = Steps()
    resumed = run(*parse_options(command(text_folder, tmp_path / "cut", "--resume")), callbacks=[steps])
    assert steps.taken == list(range(checkpoint + 1, 13))
    assert resumed["steps"] == 12
    assert [place for place, _ in losses(whole)] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]
    assert [place for place, _ in losses(resumed)] == [place for place, _ in losses(whole)]
    np.testing.assert_allclose([x for _, x in losses(resumed)], [x for _, x in losses(whole)], rtol=0, atol=1e-6)
    assert resumed["test"] == pytest.approx(whole["test"], abs=1e-5)


def test_output_folders_of_other_runs_are_refused(text_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(*parse_options(command(text_folder, output, "--max_steps", "5")))
    with pytest.raises(RecipeError, match="add --resume"):
        run(*parse_options(command(text_folder, output)))
    with pytest.raises(RecipeError, match="belong to another run: layers was 1 and is 2"):
        run(*parse_options(command(text_folder, output, "--layers", "2", "--resume")))
    with pytest.raises(RecipeError, match="belong to another run: data was"):
        run(*parse_options(command(text_folder, output, "--vocab_size", "20", "--resume")))


def test_a_checkpoint_cut_while_written_is_passed_over(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    for step in (5, 10, 100, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step, content in ((5, "{}"), (10, "{}"), (100, '{"cut":')):
        (tmp_path / f"checkpoint-{step}" / STATE).write_text(content)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_outputs_of_a_run(text_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    results = run(*parse_options(command(text_folder, output, "--save_head_inputs", "50", "--measure_memory")))
    assert json.loads((output / "results.json").read_text()) == results
    assert (output / "losses.png").stat().st_size > 1000
    vocabulary = Vocabulary.read(output / "vocabulary.txt")
    test_words = (text_folder / "test.txt").read_text()
    assert results["test"]["tokens"] == len(test_words.split()) + len(test_words.splitlines())
    first = [entry["valid_loss"] for entry in results["history"] if "valid_loss" in entry]
    assert first[-1] < first[0] < math.log(len(vocabulary)) + 0.5

    saved = load_file(output / "head_inputs.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
        "hidden": (50, 16),
        "weight": (len(vocabulary), 16),
        "target": (50,),
    }
    model = LlamaForCausalLM.from_pretrained(output / "model").eval()
    corpus = load_corpus(str(text_folder))
    predicted: list[int] = []
    nll: list[torch.Tensor] = []
    for line in corpus.lines("valid"):
        ids = torch.tensor([[vocabulary.start, *vocabulary.encode(line), vocabulary.end]])
        with torch.no_grad():
            nll.append(F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"))
        predicted += ids[0, 1:].tolist()
    assert saved["target"].tolist() == predicted[:50]
    from_saved = F.cross_entropy(saved["hidden"] @ saved["weight"].T, saved["target"], reduction="none")
    torch.testing.assert_close(from_saved, torch.cat(nll)[:50], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tie", [True, False])
def test_patched_training_equals_stock(text_folder: Path, tmp_path: Path, tie: bool) -> None:
    arguments = ("--tie_embeddings", str(tie), "--gradient_accumulation_steps", "2")
    stock = run(*parse_options(command(text_folder, tmp_path / "stock", *arguments)))
    patched = run(*parse_options(command(text_folder, tmp_path / "cce", *arguments, "--loss", "cce")))
    np.testing.assert_allclose([x for _, x in losses(patched)], [x for _, x in losses(stock)], rtol=0, atol=1e-4)
    assert patched["patch"] == {"cut": 24, "materialized": 0}
    assert patched["valid"]["tokens"] == stock["valid"]["tokens"]


def test_peak_counts_what_is_held_at_once() -> None:
    def call() -> None:
        first = torch.ones(250_000)
        second = first + 1
        del first
        third = second + 1
        del second, third

    assert _peak_cpu(call) == pytest.approx(2 * 250_000 * 4, rel=0.01)


def test_loss_memory_of_stock_holds_the_logits_and_of_the_patch_does_not() -> None:
    model = tiny_model(5000)
    ids = torch.randint(0, 5000, (4, 64))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(64).expand(4, -1)}
    stock = measure_loss_memory(model, batch, torch.enable_grad())
    assert stock["logits"] == 4 * 64 * 5000 * 4
    assert stock["gradients"] == (5000 + 4 * 64) * 16 * 4
    assert stock["peak"] > 2 * stock["logits"]
    assert all(parameter.grad is None for parameter in model.parameters())
    xhead.patch(model, loss="cce", filter_eps=None)
    patched = measure_loss_memory(model, batch, torch.enable_grad())
    assert patched["peak"] - patched["gradients"] < stock["logits"]


def side(loss: str, train: float, valid: float, peak: int) -> dict:
    return {
        "data": "some text",
        "loss": loss,
        "vocabulary": 1000,
        "parameters": 5000,
        "steps": 10,
        "tokens_per_step": 64,
        "train_loss": train,
        "valid": {"loss": valid},
        "loss_memory_bytes": {"peak": peak, "gradients": 10_000_000, "logits": 100_000_000},
        "process_peak_bytes": 500_000_000,
        "seconds_per_step_in_turn_median": 0.5,
    }


def test_demo_table() -> None:
    stock, patched = side("stock", 5.0, 5.2, 310_000_000), side("cce", 5.0002, 5.2, 13_000_000)
    assert loss_difference(stock, patched) == pytest.approx(2e-4)
    table = comparison(stock, patched)
    assert "equal: they differ by 2.0e-04" in table
    (beyond,) = (line.split() for line in table.splitlines() if "beyond" in line)
    assert beyond[-3:] == ["300.0", "3.0", "0.010"]
    assert "DIFFERENT: they differ by 2.0e-01" in comparison(stock, side("cce", 5.0, 5.4, 13_000_000))


@pytest.mark.slow
def test_demo_end_to_end(text_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    small = [
        "--max_steps",
        "6",
        "--hidden_size",
        "16",
        "--layers",
        "1",
        "--valid_steps",
        "3",
        "--data",
        str(text_folder),
    ]
    subprocess.run(
        [sys.executable, "-m", "recipes.one_billion_word.demo", "--output_dir", str(output), *small],
        check=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert (output / "losses.png").exists()
    assert "patched / stock" in (output / "table.txt").read_text()


@pytest.mark.slow
def test_two_processes_train_and_measure_as_one(text_folder: Path, tmp_path: Path) -> None:
    one = run(*parse_options(command(text_folder, tmp_path / "one", "--loss", "cce")))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "recipes.one_billion_word"]
    arguments = command(text_folder, tmp_path / "two", "--loss", "cce", "--per_device_train_batch_size", "2")
    subprocess.run([sys.executable, *launch, *arguments], check=True, cwd=Path(__file__).resolve().parents[1])
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["tokens_per_step"] == one["tokens_per_step"]
    np.testing.assert_allclose([x for _, x in losses(two)], [x for _, x in losses(one)], rtol=0, atol=1e-4)
    assert two["test"] == pytest.approx(one["test"], abs=1e-4)
