"""Recipes that are killed, by SIGKILL, while they train and while they save, and go on to the same losses."""

import json
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from recipe_support import write_text
from transformers import TrainerCallback

from recipes.common.checkpoints import ASIDE, STATE, CheckpointedTrainer, find_checkpoint, written_aside
from tests.processes import start
from tests.recipe_kills import run_and_count, run_killed_after, run_killed_while_saving
from tests.test_recipe_one_billion_word import command, losses
from tests.test_trainer import Rows, arguments
from tests.tiny import tiny

ROOT = Path(__file__).resolve().parents[1]
SAVE_STEPS, STEPS = 2, 12


def _ends(function, *arguments):
    process = start(function, *arguments)
    process.join(timeout=120)
    return process.exitcode


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_a_recipe_killed_again_and_again_ends_at_the_same_losses(seed, tmp_path):
    text = write_text(tmp_path)
    options = ("--loss", "cce", "--save_steps", str(SAVE_STEPS), "--save_total_limit", "1", "--max_steps", str(STEPS))
    assert _ends(run_and_count, command(text, tmp_path / "whole", *options), tmp_path / "counts.json") == 0
    calls = min(json.loads((tmp_path / "counts.json").read_text()))
    assert calls > 1000
    draw = random.Random(seed)
    kills = [("saving", draw.random()) for _ in range(2)] + [("training", draw.randint(1, 3))]
    draw.shuffle(kills)
    cut = tmp_path / "cut"
    again = command(text, cut, *options, "--resume")
    reached = 0
    for what, where in kills:
        if what == "saving":
            code = _ends(run_killed_while_saving, again, 1 + int(where * calls))
            last = {reached + SAVE_STEPS, reached + 2 * SAVE_STEPS}
        else:
            code = _ends(run_killed_after, again, reached + where)
            last = {reached + (where - 1) // SAVE_STEPS * SAVE_STEPS}
        assert code == -signal.SIGKILL, (what, where)
        found = find_checkpoint(cut)
        reached = int(found.name.removeprefix("checkpoint-")) if found else 0
        assert reached in last, (what, where)
        # Whatever has the name of a checkpoint is whole.
        assert all((path / STATE).is_file() and (path / "optimizer.pt").is_file() for path in cut.glob("checkpoint-*"))
    assert 0 < reached < STEPS
    assert _ends(run_and_count, again, tmp_path / "counts.json") == 0
    whole, resumed = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "whole", cut))
    assert losses(resumed) == losses(whole)
    assert resumed["test"] == whole["test"]
    assert [path.name for path in cut.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert not (cut / ASIDE).exists()


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        "accelerate.commands.launch",
        "--config_file",
        "recipes/accelerate/ddp.yaml",
        "--num_processes",
        "2",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_of_two_processes_is_killed(launcher, tmp_path):
    """The launcher names it and ends the other; the run goes on from there."""
    text = write_text(tmp_path)

    def launch(folder, module, *more):
        options = command(text, tmp_path / folder, "--loss", "cce", "--per_device_train_batch_size", "2")
        line = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", *module, *options, *more]
        return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=300)

    assert launch("whole", ["recipes.one_billion_word"]).returncode == 0
    killed = launch("cut", ["tests.recipe_kills", "1", "8"])
    assert killed.returncode != 0
    assert re.search(r"rank +: 1 ", killed.stderr), killed.stderr
    assert "SIGKILL" in killed.stderr
    assert find_checkpoint(tmp_path / "cut").name == "checkpoint-5"
    assert launch("cut", ["recipes.one_billion_word"], "--resume").returncode == 0
    whole, resumed = (json.loads((tmp_path / each / "results.json").read_text()) for each in ("whole", "cut"))
    assert resumed["processes"] == 2
    np.testing.assert_allclose([x for _, x in losses(resumed)], [x for _, x in losses(whole)], rtol=0, atol=1e-6)


def _trainer(folder, **changes):
    rows = Rows()
    settings = arguments(folder, save_strategy="steps", save_steps=1, **changes)
    return CheckpointedTrainer(model=tiny("LlamaForCausalLM"), args=settings, train_dataset=rows, eval_dataset=rows)


pytestmark = [
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def test_the_best_checkpoint_is_kept_and_found(tmp_path):
    """A learning rate that makes the model worse in the end."""
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    trainer = _trainer(tmp_path, learning_rate=0.5, **best)
    trainer.train()
    measured = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    lowest = min(measured, key=measured.__getitem__)
    assert lowest < max(measured)
    name = f"checkpoint-{lowest}"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [name]  # the Trainer removes the last at the end
    for path in tmp_path.glob("checkpoint-*"):
        assert json.loads((path / STATE).read_text())["best_model_checkpoint"] == str(tmp_path / name)


class Failing(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_a_checkpoint_is_written_again(tmp_path):
    for _ in range(2):
        trainer = _trainer(tmp_path)
        trainer.add_callback(Failing())
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_file_is_replaced_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    for content in ("first", "second"):
        with written_aside(path) as aside:
            aside.write_text(content)
    with pytest.raises(KeyError), written_aside(path) as aside:
        raise KeyError(aside.write_text("third, in part"))
    assert path.read_text() == "second"
