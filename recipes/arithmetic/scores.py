"""How good answers are, as text and as numbers; and what the scores of several seeds say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from recipes.arithmetic.problems import NUMBER

SCORES = {
    "exact_match": "exact match",
    "mae": "MAE",
    "median_error": "median error",
    "r2": "R2",
    "invalid": "invalid",
}


def score(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float | None]:
    """Scores of the answers to all problems.

    `exact_match`: the share that is the expected text. `invalid`: the share that is no number. Over the others: `mae`
    and `median_error`, the mean and the median of |answer - expected|, and `r2 = 1 - sum (answer - expected)^2 /
    sum (expected - mean)^2`; None where there is nothing to take them over.
    """
    pairs = [
        (float(answer), float(right))
        for answer, right in zip(answers, expected, strict=True)
        if NUMBER.fullmatch(answer)
    ]
    errors = [abs(answer - right) for answer, right in pairs]
    mean = statistics.fmean(right for _, right in pairs) if pairs else 0.0
    spread = math.fsum((right - mean) ** 2 for _, right in pairs)
    return {
        "exact_match": statistics.fmean(answer == right for answer, right in zip(answers, expected, strict=True)),
        "mae": statistics.fmean(errors) if errors else None,
        "median_error": statistics.median(errors) if errors else None,
        "r2": 1 - math.fsum(error**2 for error in errors) / spread if spread else None,
        "invalid": 1 - len(pairs) / len(expected),
    }


def summary(runs: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float] | None:
    """Mean and sample standard deviation of a score over the seeds; None where a run has none."""
    values = [run[name] for run in runs]
    if None in values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def verdict(base: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], name: str) -> str:
    """In words, whether `other` differs from `base` in a score, seed by seed.

    An effect shows where it has one sign in every seed, of three or more, and its mean is more than twice its standard
    error.
    """
    pairs = [(mine[name], theirs[name]) for mine, theirs in zip(other, base, strict=True)]
    if any(None in pair for pair in pairs):
        return "cannot be said: a run has no such score"
    differences = [mine - theirs for mine, theirs in pairs]
    mean = statistics.fmean(differences)
    if len(differences) < 3:
        return f"{mean:+.4g}; too few seeds to say whether that is an effect"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    same_sign = all(each > 0 for each in differences) or all(each < 0 for each in differences)
    shows = same_sign and abs(mean) > 2 * error
    better = (mean > 0) == (name in ("exact_match", "r2"))
    what = ("better" if better else "worse") if shows else "no effect shows"
    return f"{mean:+.4g} +- {error:.2g}: {what}"
