"""Train every loss with every seed, test each, and report."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments

import xhead
from recipes.arithmetic.encoding import Batches, character_tokenizer
from recipes.arithmetic.model import build_model
from recipes.arithmetic.options import DataOptions, ModelOptions, RunOptions, parse_options
from recipes.arithmetic.problems import Problem, Problems, load_problems
from recipes.arithmetic.report import write_report
from recipes.arithmetic.scores import score
from recipes.common.checkpoints import (
    CheckpointedTrainer,
    check_description,
    find_checkpoint,
    write_description,
    written_aside,
)
from recipes.common.errors import RecipeError
from recipes.common.parts import Parts, in_parts
from recipes.common.processes import data_processes, is_sharded
from xhead.losses import get_loss, list_options

RESULT = "result.json"


def main(arguments: list[str] | None = None) -> None:
    """The command. What the user got wrong ends it with status 2."""
    try:
        run(*parse_options(arguments))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def run(
    data_options: DataOptions,
    model_options: ModelOptions,
    run_options: RunOptions,
    training: TrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train and compare.

    Args:
        data_options, model_options, run_options, training: what `parse_options` gives.
        callbacks: more for the Trainers.

    Returns:
        What is written to results.json in the output folder.

    Raises:
        RecipeError: data, losses or output folder cannot be used.
    """
    state = PartialState()
    tokenizer = character_tokenizer()
    patches = patch_options(run_options.losses, run_options.parsed_loss_options, tokenizer)
    problems = load_problems(data_options)
    batches = Batches(tokenizer, encoder_decoder=model_options.model == "t5")
    folder = Path(str(training.output_dir))
    about = {
        "data": problems.name,
        "train_problems": len(problems.train),
        "test_problems": len(problems.test),
        "model": dataclasses.asdict(model_options),
        "loss_options": run_options.parsed_loss_options,
        "steps": training.max_steps,
        "batch_size": training.per_device_train_batch_size * data_processes(training),
        "learning_rate": training.learning_rate,
        "sharded": is_sharded(),
    }
    state.print(f"data        {problems.name}: {len(problems.train):,} to train on, {len(problems.test):,} to test on")
    runs: dict[str, list[dict[str, Any]]] = {loss: [] for loss in run_options.losses}
    for seed in range(1, run_options.seeds + 1):
        for loss in run_options.losses:
            place = folder / f"{loss.replace('*', 'x')}-{seed}"
            description = {**about, "loss": loss, "seed": seed}
            done = _finished(place, description, resume=run_options.resume)
            if done is None:
                model = build_model(model_options, len(tokenizer), data_options.longest + 8, seed)
                parts = in_parts(model, place)
                xhead.patch(parts.trained, loss=loss, **patches[loss])
                done = _train(parts, batches, problems, place, description, training, run_options.resume, callbacks)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in done.items() if value is not None)
            state.print(f"seed {seed}  {loss:<20}{shown}", flush=True)
            runs[loss].append(done)
    return write_report(runs, about, folder)


def patch_options(losses: Sequence[str], options: dict[str, Any], tokenizer: Any) -> dict[str, dict[str, Any]]:
    """For each loss those of the options that it has, and the tokenizer where it wants one.

    Raises:
        RecipeError: an unknown loss, an option that none of them has, or a wrong value.
    """
    patches = {}
    try:
        for loss in losses:
            known = list_options(loss)
            given = {**options, "tokenizer": tokenizer}
            patches[loss] = {name: value for name, value in given.items() if name in known}
            get_loss(loss, **patches[loss])
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeError(f"--losses {' '.join(losses)}: {error}") from error
    unknown = [name for name in options if not any(name in patch for patch in patches.values())]
    if unknown:
        known = sorted({name for loss in losses for name in list_options(loss)})
        raise RecipeError(f"--loss_options has {', '.join(unknown)}; the losses know {', '.join(known)}")
    return patches


def _finished(place: Path, description: dict[str, Any], *, resume: bool) -> dict[str, Any] | None:
    """The scores of a run that is done already, or None. Raises RecipeError for a folder of another comparison."""
    check_description(place, description, resume=resume)
    path = place / RESULT
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if not resume or found["run"] != json.loads(json.dumps(description)):
        raise RecipeError(
            f"{place} holds a run that is done: add --resume to keep it, if all options are the same as then, or give "
            "another --output_dir"
        )
    return found["scores"]


def _train(
    parts: Parts,
    batches: Batches,
    problems: Problems,
    place: Path,
    description: dict[str, Any],
    training: TrainingArguments,
    resume: bool,
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    state = PartialState()
    checkpoint = find_checkpoint(place) if resume else None
    state.wait_for_everyone()
    if state.is_main_process:
        write_description(place, description)
    settings = dataclasses.replace(
        training, output_dir=str(place), seed=description["seed"], remove_unused_columns=False
    )
    trainer = CheckpointedTrainer(
        model=parts.trained,
        args=settings,
        train_dataset=[batches.encode(problem) for problem in problems.train],  # pyright: ignore
        data_collator=batches.training,  # pyright: ignore
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    with parts.gathered() as model:
        answers = answer(model, batches, problems.test, settings.per_device_eval_batch_size)
    scores = score(answers, [problem.answer for problem in problems.test])
    examples = [[*problem, given] for problem, given in zip(problems.test, answers, strict=True)][:20]
    result = {"run": description, "scores": scores, "history": trainer.state.log_history, "examples": examples}
    if state.is_main_process:
        with written_aside(place / RESULT) as path:
            path.write_text(json.dumps(result, indent=2) + "\n")
    return scores


@torch.no_grad()
def answer(model: Any, batches: Batches, problems: Sequence[Problem], size: int) -> list[str]:
    """The model's most probable answers, character by character."""
    model.eval()
    longest = max(len(problem.answer) for problem in problems) + 2
    answers: list[str] = []
    for start in range(0, len(problems), size):
        questions = batches.questions(problems[start : start + size])
        questions = {name: value.to(model.device) for name, value in questions.items()}
        generated = model.generate(**questions, max_new_tokens=longest, do_sample=False)
        answers += batches.answers(generated, questions)
    return answers
