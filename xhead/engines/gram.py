"""Statistics without a pass over the logits: what is linear or quadratic in them, or concerns a few columns a row.

With rows extended by the bias, `w~_k = [w_k, bias_k]` and `h~_i = [h_i, 1]`, the uncapped logits are
`o_ik = scale * h~_i . w~_k`, so that

    mean_i     = scale * h~_i . wbar,                 wbar = sum_k c_k w~_k / sum_k c_k
    variance_i = scale^2 / V * h~_i' G h~_i,          G = sum_k (w~_k - mbar)(w~_k - mbar)',  mbar = 1/V sum_k w~_k

`target` and `subset_lse` gather the rows of weight that they name. The cost is V D^2 + N D^2 in place of N V D; G is
centred before it is squared, because `E[o^2] - E[o]^2` cancels in float32 where the rows of weight share a large mean.
G is kept while the weight stays as it is, and `deferral` can put off the weight's gradient until many calls were made.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from xhead.engines.problem import Problem, Results, cap, cap_slope, column_rows
from xhead.engines.weight_moments import blocks, centred_gram, extended_mean, extended_rows


def eligible(problem: Problem) -> bool:
    return set(problem.closed_names) == set(problem.names)


def cheaper(problem: Problem) -> bool:
    """Whether the closed forms take fewer multiplications than tiles of logits, forward and backward.

    `variance` costs V D^2 a way and 3 N D^2, tiles cost 4 N V D: few rows beside D are cheaper in tiles.
    """
    rows, classes, size = problem.rows, problem.vocabulary, problem.weight.shape[1]
    return "variance" not in problem.names or size * (2 * classes + 3 * rows) <= 4 * rows * classes


def empty_state(problem: Problem, save: bool) -> list[Tensor]:
    """`wbar`, `mbar` (each D + 1) and `G` (D + 1, D + 1), of size 0 where not needed."""
    size = problem.weight.shape[1] + 1
    options = {"dtype": problem.accumulate_dtype, "device": problem.weight.device}
    mean = torch.empty(size if "mean" in problem.names else 0, **options)
    centre = torch.empty(size if "variance" in problem.names else 0, **options)
    return [mean, centre, torch.empty(centre.shape[0], centre.shape[0], **options)]


def forward(problem: Problem, save: bool) -> tuple[Results, list[Tensor]]:
    """Every statistic of `problem.names` that has a closed form, and the moments of weight that gave them."""
    mean, centre, gram = empty_state(problem, save)
    results: Results = {}
    hidden = problem.hidden
    if "variance" in problem.names:
        centre, gram = centred_gram(problem)
    if "mean" in problem.names:
        known = "variance" in problem.names and problem.mean_weight is None
        mean = centre.clone() if known else extended_mean(problem, problem.mean_weight)
        results["mean"] = problem.scale * _rowwise(hidden, lambda h: h @ mean[:-1] + mean[-1])
    if "variance" in problem.names:
        results["variance"] = problem.scale**2 / problem.vocabulary * _rowwise(hidden, lambda h: quadratic(gram, h))
    if "target" in problem.names:
        assert problem.target is not None
        rows = torch.arange(problem.rows, device=hidden.device)
        results["target"] = gathered_logits(problem, rows, problem.target)
    if "subset_lse" in problem.names:
        results["subset_lse"] = _subset_lse(problem)[2]
    if "column_logits" in problem.names:
        results["column_logits"] = gathered_logits(problem, *_entries_of_sets(problem))
    return _of_counted_rows(problem, results), [mean, centre, gram]


def _of_counted_rows(problem: Problem, values: Results) -> Results:
    """The same, 0 for the rows that do not count."""
    if problem.row_mask is None:
        return values
    masked = {}
    for name, value in values.items():
        ignored = ~problem.row_mask
        masked[name] = value.masked_fill(
            ignored[_entries_of_sets(problem)[0]] if name == "column_logits" else ignored, 0.0
        )
    return masked


def backward(
    problem: Problem,
    results: Results,
    state: list[Tensor],
    grads: Results,
    needs: tuple[bool, bool, bool],
    take_weight: Callable[["ClosedFormGradient"], None] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """take_weight: called with the terms in the place of the weight's gradient, which is then None."""
    terms = ClosedFormGradient(problem, state, grads)
    hidden_grad = weight_grad = bias_grad = None
    dtype = problem.accumulate_dtype
    if needs[0]:
        hidden_grad = torch.zeros(problem.hidden.shape, dtype=dtype, device=problem.hidden.device)
        terms.add_hidden_grad(hidden_grad)
        hidden_grad = hidden_grad.to(problem.hidden.dtype)
    if needs[1] and take_weight is not None:
        take_weight(terms)
    elif needs[1]:
        weight_grad = torch.empty_like(problem.weight)
        for start, stop in blocks(problem.vocabulary):
            tile = torch.zeros(stop - start, problem.weight.shape[1], dtype=dtype, device=problem.weight.device)
            terms.add_weight_grad(tile, start, stop)
            weight_grad[start:stop] = tile
    if needs[2]:
        assert problem.bias is not None
        bias_grad = torch.zeros(problem.vocabulary, dtype=dtype, device=problem.weight.device)
        terms.add_bias_grad(bias_grad, 0, problem.vocabulary)
        bias_grad = bias_grad.to(problem.bias.dtype)
    return hidden_grad, weight_grad, bias_grad


class ClosedFormGradient:
    """Gradients of the closed-form statistics, added to accumulators a block of classes at a time.

    With upstream gradients g_i: `mean` gives `scale g_i wbar` to hidden and `scale c_k / sum(c) sum_i g_i h~_i` to
    class k; `variance` gives `2 scale^2/V g_i G h~_i` and `2 scale^2/V (w~_k - mbar) M`, `M = sum_i g_i h~_i h~_i'`;
    gathered logits give `d_ik scale w_k` and `d_ik scale h_i`.
    """

    def __init__(self, problem: Problem, state: list[Tensor], grads: Results, order: Tensor | None = None):
        """order: (V,) the class at each position that `add_weight_grad` and `add_bias_grad` speak of."""
        self.problem, self.order = problem, order
        self.mean, self.centre, self.gram = state
        grads = _of_counted_rows(problem, {name: grad for name, grad in grads.items() if name in problem.names})
        self.mean_grad, self.variance_grad = grads.get("mean"), grads.get("variance")
        if self.mean_grad is not None:
            self.mean_moment = extended_sum(problem, self.mean_grad)
        if self.variance_grad is not None:
            self.variance_moment = weighted_gram(problem, self.variance_grad)
        self.entries = _gathered_entries(problem, grads, order)

    def any(self) -> bool:
        """Whether there is anything to add."""
        return self.mean_grad is not None or self.variance_grad is not None or self.entries is not None

    def add_hidden_grad(self, hidden_grad: Tensor, first: int = 0) -> None:
        """hidden_grad: (n, D), the accumulator for the rows from `first` on."""
        problem, last = self.problem, first + hidden_grad.shape[0]
        if self.mean_grad is not None:
            hidden_grad.addr_(self.mean_grad[first:last], self.mean[:-1], alpha=problem.scale)
        if self.variance_grad is not None:
            factor = 2 * problem.scale**2 / problem.vocabulary
            for start, stop in blocks(last, first):
                hidden = problem.hidden[start:stop].to(hidden_grad.dtype)
                tilt = torch.addmm(self.gram[-1, :-1], hidden, self.gram[:-1, :-1])
                hidden_grad[start - first : stop - first] += tilt.mul_(factor * self.variance_grad[start:stop, None])
        if self.entries is not None:
            row, column, value = self.entries
            if last - first < problem.rows:
                some = ((row >= first) & (row < last)).nonzero().squeeze(1)
                row, column, value = row[some] - first, column[some], value[some]
            for start, stop in blocks(row.shape[0]):
                classes = column[start:stop] if self.order is None else self.order[column[start:stop]]
                rows_of_weight = problem.weight[classes].to(hidden_grad.dtype)
                hidden_grad.index_add_(0, row[start:stop], rows_of_weight * value[start:stop, None])

    def add_weight_grad(self, tile: Tensor, start: int, stop: int) -> None:
        """tile: (stop - start, D), the accumulator for the classes at positions start to stop."""
        problem = self.problem
        if self.mean_grad is not None:
            tile.addr_(self._mean_share(start, stop), self.mean_moment[:-1])
        if self.variance_grad is not None:
            centred = extended_rows(problem, self._classes(start, stop)) - self.centre
            tile.addmm_(centred, self.variance_moment[:, :-1], alpha=2 * problem.scale**2 / problem.vocabulary)
        if self.entries is not None:
            row, column, value = self._entries_of(start, stop)
            for first, last in blocks(row.shape[0]):
                hidden = problem.hidden[row[first:last]].to(tile.dtype)
                tile.index_add_(0, column[first:last] - start, hidden * value[first:last, None])

    def add_bias_grad(self, tile: Tensor, start: int, stop: int) -> None:
        """tile: (stop - start,)"""
        problem = self.problem
        if self.mean_grad is not None:
            tile += self._mean_share(start, stop) * self.mean_moment[-1]
        if self.variance_grad is not None:
            for first, last in blocks(stop, start):
                centred = extended_rows(problem, self._classes(first, last)) - self.centre
                slope = centred @ self.variance_moment[:, -1]
                tile[first - start : last - start] += 2 * problem.scale**2 / problem.vocabulary * slope
        if self.entries is not None:
            _, column, value = self._entries_of(start, stop)
            tile.index_add_(0, column - start, value)

    def _classes(self, start: int, stop: int) -> slice | Tensor:
        return slice(start, stop) if self.order is None else self.order[start:stop]

    def _mean_share(self, start: int, stop: int) -> Tensor:
        problem = self.problem
        if problem.mean_weight is None:
            return self.mean.new_full((stop - start,), problem.scale / problem.vocabulary)
        mean_weight = problem.mean_weight.to(self.mean.dtype)
        return mean_weight[self._classes(start, stop)] * (problem.scale / mean_weight.sum())

    def _entries_of(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        assert self.entries is not None
        row, column, value = self.entries
        first, last = torch.searchsorted(column, torch.tensor([start, stop], device=column.device)).tolist()
        return row[first:last], column[first:last], value[first:last]


def inverse(order: Tensor) -> Tensor:
    """The position of each class in an order of them. order: (V,) -> (V,)"""
    position = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    return torch.empty_like(order).scatter_(0, order.long(), position)


def quadratic(gram: Tensor, hidden: Tensor) -> Tensor:
    """`h~' G h~` a row. gram: (D + 1, D + 1), hidden: (n, D) -> (n,)"""
    return ((hidden @ gram[:-1, :-1]).add_(2 * gram[-1, :-1]) * hidden).sum(-1) + gram[-1, -1]


def extended_sum(problem: Problem, row_weight: Tensor) -> Tensor:
    """`sum_i g_i [h_i, 1]`: (D + 1,). row_weight: (N,)"""
    total = torch.zeros(problem.hidden.shape[1] + 1, dtype=row_weight.dtype, device=row_weight.device)
    for start, stop in blocks(problem.rows):
        total[:-1] += row_weight[start:stop] @ problem.hidden[start:stop].to(row_weight.dtype)
    total[-1] = row_weight.sum()
    return total


def weighted_gram(problem: Problem, row_weight: Tensor) -> Tensor:
    """`sum_i g_i [h_i, 1][h_i, 1]'`: (D + 1, D + 1). row_weight: (N,)"""
    size = problem.hidden.shape[1] + 1
    total = torch.zeros(size, size, dtype=row_weight.dtype, device=row_weight.device)
    for start, stop in blocks(problem.rows):
        hidden = problem.hidden[start:stop].to(row_weight.dtype)
        total[:-1, :-1].addmm_((hidden * row_weight[start:stop, None]).T, hidden)
    total[-1] = extended_sum(problem, row_weight)
    total[:, -1] = total[-1]
    return total


def gathered_logits(problem: Problem, row: Tensor, column: Tensor) -> Tensor:
    """`o_ik` at the pairs given. row, column: (E,) -> (E,)"""
    logits = torch.empty(row.shape[0], dtype=problem.accumulate_dtype, device=row.device)
    for start, stop in blocks(row.shape[0]):
        hidden = problem.hidden[row[start:stop]].to(logits.dtype)
        torch.sum(hidden * problem.weight[column[start:stop]].to(logits.dtype), -1, out=logits[start:stop])
    if problem.bias is not None:
        logits += problem.bias[column].to(logits.dtype)
    return cap(logits.mul_(problem.scale), problem.softcap)


def _slope(logits: Tensor, problem: Problem) -> Tensor | float:
    """Derivative of the capped logits for the raw product `h~ . w~`."""
    return problem.scale * cap_slope(logits, problem.softcap)


def _rowwise(hidden: Tensor, function) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    pieces = [function(hidden[start:stop].to(dtype)) for start, stop in blocks(hidden.shape[0])]
    return torch.cat(pieces) if pieces else hidden.new_zeros(0, dtype=dtype)


def _subset_lse(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Row index and logit of each entry of the sets, and the log-sum-exp a row."""
    row, column = _entries_of_sets(problem)
    logits = gathered_logits(problem, row, column)
    largest = logits.new_full((problem.rows,), float("-inf")).scatter_reduce_(0, row, logits, "amax")
    total = torch.zeros_like(largest).index_add_(0, row, (logits - largest[row]).exp_())
    return row, logits, total.log_() + largest


def _entries_of_sets(problem: Problem) -> tuple[Tensor, Tensor]:
    """(row, class) of each entry of the rows' column sets."""
    assert problem.row_offsets is not None and problem.columns is not None
    return column_rows(problem.row_offsets), problem.columns


def _gathered_entries(problem: Problem, grads: Results, order: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    """(row, position of the class, d loss / d (h . w)) of the gathered logits, sorted by position."""
    pieces = []
    if "target" in grads and "target" in problem.closed_names:
        assert problem.target is not None
        row = torch.arange(problem.rows, device=problem.hidden.device)
        logits = gathered_logits(problem, row, problem.target) if problem.softcap is not None else grads["target"]
        pieces.append((row, problem.target, grads["target"] * _slope(logits, problem)))
    if "subset_lse" in grads:
        row, logits, lse = _subset_lse(problem)
        slope = (logits - lse[row]).exp_() * _slope(logits, problem)
        pieces.append((row, problem.columns, grads["subset_lse"][row] * slope))
    if "column_logits" in grads:
        row, column = _entries_of_sets(problem)
        logits = gathered_logits(problem, row, column) if problem.softcap is not None else grads["column_logits"]
        pieces.append((row, column, grads["column_logits"] * _slope(logits, problem)))
    if not pieces:
        return None
    row, column, value = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    position = column
    if order is not None:
        position = inverse(order)[column]
    position, sorting = position.sort()
    return row[sorting], position, value[sorting]
