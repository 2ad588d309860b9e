"""Questions whose answers are numbers: made on the spot, or read from JSON lines."""

from __future__ import annotations

import gzip
import json
import operator
import random
import re
import zlib
from pathlib import Path
from typing import NamedTuple

from recipes.arithmetic.options import DataOptions
from recipes.common.errors import RecipeError

NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


class Problem(NamedTuple):
    question: str
    answer: str  # a number


class Problems(NamedTuple):
    name: str
    train: list[Problem]
    test: list[Problem]


def load_problems(options: DataOptions) -> Problems:
    """The problems to train on and those to test on, none of which is in both.

    Raises:
        RecipeError: no data there, or not in this form.
    """
    if options.data is None:
        return _made(options)
    path = Path(options.data)
    files = sorted(each for each in path.glob("*.jsonl*")) if path.is_dir() else [path]
    testing = [each for each in files if re.search("val|test", each.name)]
    training = [each for each in files if each not in testing] or testing
    if not training:
        raise RecipeError(f"--data {path} has no .jsonl or .jsonl.gz file")
    pool = [problem for each in training for problem in _read(each)]
    if training != testing and testing:
        train, test = pool, [problem for each in testing for problem in _read(each)]
    else:
        # One in ten, by a checksum of the question: the same ones whatever the order.
        train = [problem for problem in pool if zlib.crc32(problem.question.encode()) % 10]
        test = [problem for problem in pool if not zlib.crc32(problem.question.encode()) % 10]
    known = {problem.question for problem in train}
    short = [[each for each in side if len(each.question + each.answer) <= options.longest] for side in (train, test)]
    train, test = short[0], [each for each in short[1] if each.question not in known]
    if not train or not test:
        raise RecipeError(
            f"--data {path} has {len(train)} problems to train on and {len(test)} to test on that are at most "
            f"--longest {options.longest} characters long; at least one of each is needed"
        )
    order = random.Random(0)
    order.shuffle(train)
    order.shuffle(test)
    return Problems(str(path), train[: options.train_problems], test[: options.test_problems])


def _made(options: DataOptions) -> Problems:
    every = len(options.operations) * (options.largest + 1) ** 2
    wanted = options.train_problems + options.test_problems
    if wanted > every:
        raise RecipeError(
            f"there are {every} problems with --operations {options.operations} --largest {options.largest}, and "
            f"--train_problems plus --test_problems is {wanted}; raise --largest or lower these"
        )
    problems = []
    for index in random.Random(0).sample(range(every), wanted):
        rest, operation = divmod(index, len(options.operations))
        left, right = divmod(rest, options.largest + 1)
        sign = options.operations[operation]
        problems.append(Problem(f"{left}{sign}{right}=", str(_OPERATIONS[sign](left, right))))
    name = f"a {' or '.join(options.operations)} b, with a and b from 0 to {options.largest}"
    return Problems(name, problems[: options.train_problems], problems[options.train_problems :])


def _read(path: Path) -> list[Problem]:
    problems = []
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines, 1):
                entry = json.loads(line)
                # Grade-school problems tell the steps first; the number comes after four hashes.
                answer = str(entry.get("solution", entry.get("answer", ""))).split("####")[-1]
                answer = answer.strip().replace(",", "")
                if not NUMBER.fullmatch(answer) or not entry.get("question"):
                    raise RecipeError(
                        f"{path} line {number} has no question with a number for an answer, got {line[:80]!r}"
                    )
                problems.append(Problem(entry["question"], answer))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise RecipeError(f"{path} cannot be read as JSON lines: {error}") from error
    return problems
