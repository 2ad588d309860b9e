"""What `benchmarks.gpu` concludes: which goals were met, and what the engine's constants should be."""

import statistics
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.gpu_losses import STOCK

DENSE, SLICED = "xhead, filter off", "xhead, filter off, forward in slices"
SPARSE = "xhead, all active tiles"
DROPPED = "xhead, dropped"
APPLE, LIGER, COMPILED = "cut_cross_entropy", "Liger fused linear", "torch.compile of stock"


class Goal(NamedTuple):
    """A limit on a shape: of `dense`, the filter off, or of the sparse path at a share of active tiles."""

    case: str
    measure: str  # a key of a result
    share: float | None
    limit: float  # seconds or bytes


GOALS = (
    Goal("gemma", "both", 0.2, 30e-3),
    Goal("gemma", "both", 0.1, 22e-3),
    Goal("gemma", "both", None, 42e-3),
    Goal("gemma", "forward", None, 17e-3),
    Goal("gemma", "beyond_gradients", 0.2, 64e6),
    Goal("gemma", "beyond_gradients", None, 512e6),
    Goal("llama3", "both", None, 36e-3),
    Goal("llama3", "both", 0.2, 27e-3),
)
"""For an H200, in bfloat16."""
AHEAD = {"qwen": (APPLE, LIGER, COMPILED), "llama2": (APPLE, LIGER, COMPILED)}
"""Losses that xhead is to be faster than, by shape."""


def results_of(record: dict[str, Any], case: str) -> list[dict[str, Any]]:
    """What was measured of a shape, on all kinds of inputs; not what failed."""
    cases = [found for found in record["cases"] if found["case"] == case]
    return [result for found in cases for result in found.get("results", []) if "both" in result]


def sparse_points(results: list[dict[str, Any]], measure: str) -> list[tuple[float, float]]:
    """(share of active tiles, measured) where the sparse path was taken with compensation, by share."""
    chosen = (result for result in results if result["name"].startswith(SPARSE) and measure in result)
    return sorted((result["active_share"], result[measure]) for result in chosen if "active_share" in result)


def at_share(points: list[tuple[float, float]], share: float) -> float | None:
    """Between the two points around a share, on a line; None outside of them."""
    for (low, first), (high, second) in pairwise(points):
        if low <= share <= high:
            return first if high == low else first + (second - first) * (share - low) / (high - low)
    return None


def goals(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each goal with what was measured, None where it was not."""
    found = []
    for goal in GOALS:
        results = results_of(record, goal.case)
        if goal.share is not None:
            measured = at_share(sparse_points(results, goal.measure), goal.share)
        else:
            measured = min((r[goal.measure] for r in results if r["name"] == DENSE and goal.measure in r), default=None)
        kind = "dense" if goal.share is None else f"{goal.share:.0%} of the tiles"
        what = f"{goal.case}, {goal.measure}, {kind}"
        found.append(verdict(what, measured, goal.limit))
    for case, others in AHEAD.items():
        for one in (found for found in record["cases"] if found["case"] == case):
            by_name = {result["name"]: result for result in one.get("results", []) if "both" in result}
            ours = by_name.get("xhead", {}).get("both")
            for other in others:
                if other in by_name:
                    found.append(verdict(f"{case}, {one['kind']}, faster than {other}", ours, by_name[other]["both"]))
    return [*found, *errors(record)]


def verdict(what: str, measured: float | None, limit: float) -> dict[str, Any]:
    return {"what": what, "measured": measured, "limit": limit, "met": None if measured is None else measured <= limit}


def errors(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Filter off: no further from float64 than stock, and a hundredth. On: a third of the error of filters that drop
    what they skip and take no longer.
    """
    found = []
    for case in record["cases"]:
        results = [result for result in case.get("results", []) if "both" in result]
        by_name = {result["name"]: result for result in results}
        where = f"{case['case']}, {case['kind']}"
        for side in ("hidden_error", "weight_error"):
            if DENSE in by_name and STOCK in by_name:
                limit = by_name[STOCK][side] + 1e-2
                found.append(verdict(f"{where}, {side}, filter off", by_name[DENSE][side], limit))
            for ours in (result for result in results if result["name"].startswith(SPARSE)):
                others = [r for r in results if r["name"].startswith(DROPPED) or r["name"] == APPLE]
                rivals = [r[side] for r in others if r["both"] <= 1.05 * ours["both"]]
                if rivals:
                    found.append(verdict(f"{where}, {side}, {ours['name']}", ours[side], min(rivals) / 3))
    return found


def suggested(record: dict[str, Any]) -> dict[str, Any]:
    """The constants of `xhead/engines/triton.py`, where enough was measured to tell.

    `DENSE_SHARE` is the share of active tiles at which the sparse path takes as long as the dense one, on a line
    through what was measured: of the shapes the smallest. `FUSED_FORWARD`: whether it is the faster at the median.
    """
    shares, ratios = [], []
    for case in dict.fromkeys(found["case"] for found in record["cases"]):
        results = results_of(record, case)
        dense = [result["both"] for result in results if result["name"] == DENSE]
        points = sparse_points(results, "both")
        if dense and len(points) > 1 and points[-1][0] > points[0][0]:
            slope, start = statistics.linear_regression(*zip(*points, strict=True))
            if slope > 0:
                shares.append(min(max((statistics.median(dense) - start) / slope, 0.0), 1.0))
        fused, sliced = ([r["forward"] for r in results if r["name"] == n and "forward" in r] for n in (DENSE, SLICED))
        ratios += [one / other for one, other in zip(fused, sliced, strict=False)]
    return {
        "DENSE_SHARE": round(min(shares), 2) if shares else None,
        "FUSED_FORWARD": statistics.median(ratios) <= 1.0 if ratios else None,
    }


def lines(record: dict[str, Any]) -> list[str]:
    """What to print of the verdicts and the constants."""
    signs = {True: "met", False: "MISSED", None: "not measured"}
    found = []
    for one in record["goals"]:
        measured = "-" if one["measured"] is None else f"{one['measured']:.3g}"
        found.append(f"{signs[one['met']]}: {one['what']}: {measured}, limit {one['limit']:.3g}")
    settings = (f"{name} = {'not measured' if v is None else v}" for name, v in record["suggested"].items())
    return [*found, "xhead/engines/triton.py should have " + ", ".join(settings)]
