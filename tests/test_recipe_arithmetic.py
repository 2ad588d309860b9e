"""The arithmetic recipe: its problems, its scores, and the whole command at a tiny size."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from recipes.arithmetic.compare import main, run
from recipes.arithmetic.encoding import ANSWER, END, IGNORED, PAD, Batches, character_tokenizer
from recipes.arithmetic.options import DataOptions, parse_options
from recipes.arithmetic.problems import Problem, load_problems
from recipes.arithmetic.report import table
from recipes.arithmetic.scores import score, summary, verdict
from recipes.common.errors import RecipeError


def test_made_problems_are_right_and_apart():
    problems = load_problems(DataOptions(operations="+-*", largest=12, train_problems=300, test_problems=50))
    assert (len(problems.train), len(problems.test)) == (300, 50)
    assert len({problem.question for problem in problems.train + problems.test}) == 350
    for question, answer in problems.train + problems.test:
        assert question.endswith("=") and eval(question[:-1]) == int(answer)
    assert problems == load_problems(DataOptions(operations="+-*", largest=12, train_problems=300, test_problems=50))


def write(path: Path, entries: list[dict]) -> Path:
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def test_problems_from_files(tmp_path: Path):
    made = [{"question": f"What is {n} + 1?", "solution": str(n + 1), "answer": f"steps {n}"} for n in range(50)]
    write(tmp_path / "train.jsonl.gz", made)
    write(tmp_path / "val.jsonl", [made[3], {"question": "What is -2 + 0.5?", "solution": "-1.5"}])
    problems = load_problems(DataOptions(data=str(tmp_path)))
    assert len(problems.train) == 50
    assert problems.test == [Problem("What is -2 + 0.5?", "-1.5")]
    school = [{"question": f"Tom has {n} apples?", "answer": f"{n}+1=<<{n}+1>>\n#### {n},000"} for n in range(1, 60)]
    alone = load_problems(DataOptions(data=str(write(tmp_path / "school.jsonl", school))))
    assert len(alone.train) + len(alone.test) == 59 and alone.test
    assert not set(alone.train) & set(alone.test)
    assert all(problem.answer.endswith("000") for problem in alone.train)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--operations", "+/"], r"--operations is '\+/'; it must be"),
        (["--largest", "3"], "there are 32 problems"),
        (["--data", "nothing.jsonl"], "nothing.jsonl cannot be read"),
        (["--model", "lstm"], "--model is 'lstm'; known: llama, gpt2, t5"),
        (["--hidden_size", "30"], "--hidden_size is 30"),
        (["--losses", "cce", "cce"], "each may be there once"),
        (["--losses", "cce", "cce+nt"], r"unknown loss 'nt' in 'cce\+nt'"),
        (["--losses", "cce+*"], "is no term of a sum"),
        (["--loss_options", '{"reweight": true}'], "--loss_options has reweight; the losses know .*reweigh"),
        (["--loss_options", "[]"], "JSON object"),
        (["--loss_options", "{"], "not JSON"),
        (["--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--step", "0"], "not understood: --step 0"),
    ],
)
def test_bad_options_are_clear_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["--output_dir", str(tmp_path), "--use_cpu", "True", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_data_that_are_none(tmp_path: Path):
    for entry, message in (({"question": "a", "answer": "b"}, "line 1 has no question with a number"),):
        with pytest.raises(RecipeError, match=message):
            load_problems(DataOptions(data=str(write(tmp_path / "a.jsonl", [entry]))))
    (tmp_path / "b.jsonl").write_text("no json\n")
    with pytest.raises(RecipeError, match="cannot be read as JSON lines"):
        load_problems(DataOptions(data=str(tmp_path / "b.jsonl")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="has no .jsonl"):
        load_problems(DataOptions(data=str(tmp_path / "empty")))
    path = write(tmp_path / "c.jsonl", [{"question": "q" * 200, "solution": "1"}])
    with pytest.raises(RecipeError, match="at least one of each is needed"):
        load_problems(DataOptions(data=str(path)))


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_batches(encoder_decoder):
    batches = Batches(character_tokenizer(), encoder_decoder=encoder_decoder)
    problems = [Problem("1+1=", "2"), Problem("10-35=", "-25")]
    batch = batches.training([batches.encode(problem) for problem in problems])
    labels = [row[row != IGNORED].tolist() for row in batch["labels"]]
    texts = ["".join(batches.tokenizer.convert_ids_to_tokens(row)) for row in labels]
    assert texts == ["2<end>", "-25<end>"]
    inside = batch["attention_mask"].bool()
    if not encoder_decoder:
        assert torch.equal(batch["input_ids"][batch["labels"] != IGNORED], batch["labels"][batch["labels"] != IGNORED])
    assert not (batch["input_ids"][inside] == PAD).any()
    questions = batches.questions(problems)
    last = questions["input_ids"][:, -1].tolist()
    assert last == ([PAD, ANSWER] if encoder_decoder else [ANSWER, ANSWER])
    start = [[PAD]] * 2 if encoder_decoder else questions["input_ids"].tolist()
    rows = [begin + label + [PAD] for begin, label in zip(start, ([7, END, 9], [7, 8, 9]), strict=True)]
    tokens = batches.tokenizer.convert_ids_to_tokens([7, 8, 9])
    assert batches.answers(torch.tensor(rows), questions) == [tokens[0], "".join(tokens) + "<pad>"]


def test_scores():
    found = score(["12", "-3", "4a", "7", ""], ["12", "-5", "4", "8", "0"])
    assert found["exact_match"] == 0.2
    assert found["invalid"] == pytest.approx(0.4)
    assert found["mae"] == pytest.approx(1)
    assert found["median_error"] == 1
    mean = (12 - 5 + 8) / 3
    assert found["r2"] == pytest.approx(1 - 5 / ((12 - mean) ** 2 + (5 + mean) ** 2 + (8 - mean) ** 2))
    nothing = score(["", "a"], ["1", "2"])
    assert (nothing["mae"], nothing["r2"], nothing["invalid"]) == (None, None, 1)
    assert summary([{"mae": 1.0}, {"mae": 3.0}], "mae") == (2, pytest.approx(math.sqrt(2)))
    assert summary([{"mae": 1.0}, {"mae": None}], "mae") is None


@pytest.mark.parametrize(
    ("base", "other", "name", "expected"),
    [
        ([1.0, 2.0, 3.0], [0.5, 1.4, 2.6], "mae", "better"),
        ([1.0, 2.0, 3.0], [1.5, 2.6, 3.4], "mae", "worse"),
        ([0.1, 0.2, 0.3], [0.2, 0.32, 0.39], "exact_match", "better"),
        ([1.0, 2.0, 3.0], [0.5, 2.1, 2.5], "mae", "no effect shows"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "mae", "no effect shows"),
        ([1.0, 2.0], [0.5, 1.5], "mae", "too few seeds"),
        ([1.0, None], [0.5, 1.5], "mae", "cannot be said"),
    ],
)
def test_what_counts_as_an_effect(base, other, name, expected):
    said = verdict([{name: value} for value in base], [{name: value} for value in other], name)
    assert expected in said


def command(output: Path, *more: str) -> list[str]:
    fixed = (
        "--hidden_size 16 --layers 1 --attention_heads 2 --largest 9 --train_problems 100 --test_problems 20 --seeds 1 "
        "--max_steps 6 --save_steps 2 --warmup_steps 1 --logging_steps 2 --per_device_train_batch_size 8 --use_cpu True"
    )
    return ["--output_dir", str(output), *fixed.split(), *more]


class KilledAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    losses = ["--losses", "cce", "cce+0.3*ntl_was"]
    options = parse_options(command(tmp_path / "whole", *losses, "--loss_options", '{"reweigh": true}'))
    whole = run(*options)
    assert list(whole["runs"]) == losses[1:]
    assert json.loads((tmp_path / "whole" / "results.json").read_text()) == whole
    assert "cce+0.3*ntl_was against cce" in (tmp_path / "whole" / "table.txt").read_text()
    assert (tmp_path / "whole" / "scores.png").stat().st_size > 5000
    assert "too few seeds" in whole["verdicts"]["cce+0.3*ntl_was"]["mae"]
    with pytest.raises(RecipeError, match="add --resume"):
        run(*options)

    cut = command(tmp_path / "cut", *losses, "--loss_options", '{"reweigh": true}')
    with pytest.raises(KeyboardInterrupt):
        run(*parse_options(cut), callbacks=[KilledAt(5)])
    assert run(*parse_options([*cut, "--resume"]))["runs"] == whole["runs"]
    with pytest.raises(RecipeError, match="another run|all options are the same"):
        run(*parse_options([*cut, "--resume", "--layers", "2"]))


@pytest.mark.parametrize("model", ["gpt2", "t5"])
def test_other_models(model, tmp_path: Path):
    results = run(
        *parse_options(command(tmp_path, "--model", model, "--losses", "cce+0.3*ntl_mse", "--max_steps", "2"))
    )
    (scores,) = results["runs"]["cce+0.3*ntl_mse"]
    assert 0 <= scores["exact_match"] <= 1
    result = json.loads((tmp_path / "cce+0.3xntl_mse-1" / "result.json").read_text())
    assert len(result["examples"]) == 20


def test_the_readme_shows_the_measured_table():
    folder = Path(__file__).parent.parent / "recipes" / "arithmetic"
    measured = json.loads((folder / "results" / "results.json").read_text())
    assert table(measured["runs"]) in (folder / "README.md").read_text()
