"""Row statistics where a group of processes shares the classes: those of each process's own rows, merged.

An engine runs on the own rows of the weight as on any weight. What R processes find is gathered once, and merged by
differentiable functions of R numbers a row. With `s_r = exp(lse_r - lse)`, the share of the softmax that lies in the
classes of process r:

| statistic | merged |
|---|---|
| `lse`, `subset_lse`, `complement_lse` | `log sum_r exp(lse_r)` |
| `target`, `column_logits`, `pointwise_sum` | `sum_r`, 0 where a process does not hold the class |
| `mean` | `sum_r C_r / C mean_r`, C the sum of `mean_weight` or the number of classes |
| `variance` | `sum_r V_r / V (variance_r + (mean_r - mean)^2)` |
| `entropy` | `sum_r s_r (entropy_r - log s_r)` |
| `expectation` | `sum_r s_r expectation_r` |
| `max`, `argmax` | the largest, and the lowest of its classes |

So the upstream gradient of `lse_r` is that of `lse` times s_r, which makes the own softmax the whole one's. The filter
compares its threshold with the own softmax, which is the larger one: what it skips, it would skip otherwise too.
"""

from dataclasses import replace

import torch
from torch import Tensor

from xhead import autograd
from xhead.engines.problem import Problem, Results, column_rows
from xhead.engines.reference import masked_logsumexp
from xhead.vocabulary import Vocabulary


def statistics(problem: Problem, engine: str, vocabulary: Vocabulary) -> Results:
    """The statistics `problem.names` over all classes, the same in every process.

    problem: with this process's rows of `weight` and `bias`, and all classes in everything else. Its `hidden` comes
    from `vocabulary.enter`.
    """
    own = _own_statistics(problem, engine, vocabulary)
    batch = (problem.target, problem.columns, problem.row_mask)
    merged = merge(own, problem.names, vocabulary, problem.rows, *batch, dtype=problem.accumulate_dtype)
    return {name: _of_counted_rows(value, name, problem) for name, value in merged.items()}


def merge(
    own: Results,
    names: tuple[str, ...],
    vocabulary: Vocabulary,
    rows: int,
    *batch: Tensor | None,
    dtype: torch.dtype,
) -> Results:
    """The statistics over all classes, of what each process found over its own.

    Args:
        own: those statistics, and what merging takes beside them.
        rows, batch: what tells one batch from another; RuntimeError where the processes' batches are not the same.
        dtype: of the statistics.
    """
    flat = [_as_numbers(_told(rows, batch, next(iter(own.values())).device), dtype)]
    flat += [_as_numbers(value, dtype).reshape(-1) for value in own.values()]
    told, *together = vocabulary.gather(torch.cat(flat)).split([each.shape[0] for each in flat], dim=1)
    _check_told(_as_integers(told), vocabulary)
    parts = {}
    for (name, value), part in zip(own.items(), together, strict=True):
        part = _as_integers(part) if name == "argmax" else part
        parts[name] = part.reshape(vocabulary.size, *value.shape)
    return {name: _MERGE.get(name, _sum)(parts, name, vocabulary) for name in names}


def _own_statistics(problem: Problem, engine: str, vocabulary: Vocabulary) -> Results:
    """Of the own classes: what is asked for, and what merging takes beside it."""
    beside = {"entropy": "lse", "expectation": "lse", "argmax": "max"}
    names = dict.fromkeys((*problem.names, *(beside[name] for name in problem.names if name in beside)))
    own = of_own_classes(problem, vocabulary).having(tuple(names))
    found = _engine_statistics(own, engine)
    if "variance" in names:
        uniform = replace(own, names=("mean",), mean_weight=None)
        plain = "mean" in names and problem.mean_weight is None
        found["class_mean"] = found["mean"] if plain else _engine_statistics(uniform, engine)["mean"]
    if "mean" in names:
        found["mean"] = found["mean"] * _weight_share(problem, vocabulary)
    if "target" in names and not problem.soft_target:
        assert problem.target is not None
        found["target"] = torch.where(vocabulary.holds(problem.target), found["target"], 0.0)
    if "column_logits" in names:
        assert problem.columns is not None
        position = vocabulary.holds(problem.columns).nonzero().squeeze(1)
        everywhere = found["column_logits"].new_zeros(problem.columns.shape)
        found["column_logits"] = everywhere.index_copy(0, position, found["column_logits"])
    return found


def _engine_statistics(own: Problem, engine: str) -> Results:
    return autograd.statistics(own, engine) if own.vocabulary else of_no_classes(own)


def _weight_share(problem: Problem, vocabulary: Vocabulary) -> Tensor | float:
    """The share of the own classes in the weights of the mean."""
    if problem.mean_weight is None:
        return (vocabulary.stop - vocabulary.start) / vocabulary.classes
    mean_weight = problem.mean_weight.to(problem.accumulate_dtype)
    return mean_weight[vocabulary.own].sum() / mean_weight.sum()


def of_own_classes(problem: Problem, vocabulary: Vocabulary) -> Problem:
    """The same problem, with the own classes alone in everything that is by class."""
    changes: dict[str, Tensor] = {}
    if problem.target is not None:
        whole = problem.target
        changes["target"] = whole[:, vocabulary.own] if problem.soft_target else vocabulary.place(whole)
    if problem.values is not None:
        changes["values"] = problem.values[vocabulary.own]
    if problem.mean_weight is not None:
        mean_weight = problem.mean_weight[vocabulary.own]
        # The mean of own classes that all have weight 0 has no part in the whole; a quotient 0 / 0 would.
        changes["mean_weight"] = torch.where(mean_weight.sum() == 0, torch.ones_like(mean_weight), mean_weight)
    if problem.columns is not None and problem.row_offsets is not None:
        held = vocabulary.holds(problem.columns)
        row = column_rows(problem.row_offsets)[held]
        count = torch.bincount(row, minlength=problem.rows)
        changes["row_offsets"] = torch.cat([count.new_zeros(1), count.cumsum(0)])
        changes["columns"] = problem.columns[held] - vocabulary.start
    return replace(problem, **changes)  # type: ignore[arg-type]


def of_no_classes(problem: Problem) -> Results:
    """The statistics over no classes, from the inputs: every process has to take part in the backward."""
    nothing = problem.hidden[:, :0].sum(-1, dtype=problem.accumulate_dtype) + problem.weight.sum()
    if problem.bias is not None:
        nothing = nothing + problem.bias.sum()
    results: Results = {}
    for name in problem.names:
        if name in ("lse", "max", "subset_lse", "complement_lse"):
            results[name] = nothing + float("-inf")
        elif name == "expectation":
            assert problem.values is not None
            results[name] = nothing[:, None].expand(-1, problem.values.shape[1])
        elif name == "column_logits":
            results[name] = nothing[:0]
        else:
            results[name] = nothing.long() if name == "argmax" else nothing
    return results


def _sum(parts: Results, name: str, vocabulary: Vocabulary) -> Tensor:
    return parts[name].sum(0)


def _log_sum_exp(parts: Results, name: str, vocabulary: Vocabulary) -> Tensor:
    by_row = parts[name].T
    return masked_logsumexp(by_row, by_row != float("-inf"))


def _variance(parts: Results, name: str, vocabulary: Vocabulary) -> Tensor:
    means = parts["class_mean"]
    sizes = [(stop - start) / vocabulary.classes for start, stop in vocabulary.ranges]
    shares = torch.tensor(sizes, dtype=means.dtype, device=means.device)[:, None]
    return (shares * (parts["variance"] + (means - (shares * means).sum(0)).square())).sum(0)


def _entropy(parts: Results, name: str, vocabulary: Vocabulary) -> Tensor:
    lse = _log_sum_exp(parts, "lse", vocabulary)
    # A process without classes has a share of 0, whose product with its infinite logarithm is 0 too.
    own = parts["lse"].masked_fill(parts["lse"] == float("-inf"), 0.0)
    return ((parts["lse"] - lse).exp() * (parts["entropy"] + lse - own)).sum(0)


def _expectation(parts: Results, name: str, vocabulary: Vocabulary) -> Tensor:
    shares = (parts["lse"] - _log_sum_exp(parts, "lse", vocabulary)).exp()
    return (shares[..., None] * parts["expectation"]).sum(0)


def _max(parts: Results, name: str, vocabulary: Vocabulary) -> Tensor:
    return parts["max"].detach().amax(0)


def _argmax(parts: Results, name: str, vocabulary: Vocabulary) -> Tensor:
    starts = torch.tensor([start for start, _ in vocabulary.ranges], device=parts["argmax"].device)
    largest = parts["max"].detach()
    classes = torch.where(largest == largest.amax(0), parts["argmax"] + starts[:, None], vocabulary.classes)
    return classes.amin(0).clamp(max=vocabulary.classes - 1)


_MERGE = {
    "lse": _log_sum_exp,
    "subset_lse": _log_sum_exp,
    "complement_lse": _log_sum_exp,
    "variance": _variance,
    "entropy": _entropy,
    "expectation": _expectation,
    "max": _max,
    "argmax": _argmax,
}


def _of_counted_rows(value: Tensor, name: str, problem: Problem) -> Tensor:
    """0 in the rows that are left out."""
    mask = problem.row_mask
    if mask is None:
        return value
    if name == "column_logits":
        assert problem.row_offsets is not None
        mask = mask[column_rows(problem.row_offsets)]
    elif value.ndim > 1:
        mask = mask[:, None]
    return torch.where(mask, value, torch.zeros_like(value))


def check_batch(vocabulary: Vocabulary, device: torch.device, rows: int, *batch: Tensor | None) -> None:
    """Raise RuntimeError, in every process alike, where the processes' batches are not the same."""
    _check_told(vocabulary.gather(_told(rows, batch, device)), vocabulary)


def _told(rows: int, batch: tuple[Tensor | None, ...], device: torch.device) -> Tensor:
    """A few integers that tell one batch from another: (1 + len(batch),)."""
    told = [torch.tensor(rows, device=device)]
    for each in batch:
        if each is None or each.is_floating_point():
            told.append(told[0])
        else:
            told.append((each.long() * torch.arange(1, each.shape[0] + 1, device=device)).sum())
    return torch.stack(told)


def _check_told(told: Tensor, vocabulary: Vocabulary) -> None:
    """told: (R, 1 + what tells a batch)"""
    same = told == told[0]
    if told.device.type != "cpu":
        # Reading the answer here would make every call wait for the device.
        torch._assert_async(same.all())
    elif not same.all():
        wrong = [rank for rank in range(vocabulary.size) if not same[rank].all()]
        raise RuntimeError(
            f"processes that share a vocabulary must be given the same batch, and the labels of rank {wrong} are not "
            "those of rank 0: let them read the same data, with one data-parallel rank for the whole group"
        )


def _as_numbers(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers as the floating point numbers of the same bits, to travel beside others; nothing is computed of them."""
    return value if value.is_floating_point() else value.long().view(dtype)


def _as_integers(numbers: Tensor) -> Tensor:
    return numbers.detach().clone(memory_format=torch.contiguous_format).view(torch.int64)
