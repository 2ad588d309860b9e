"""The dense path of the Triton engine: a slice of the classes at a time, three GEMMs of torch and a kernel a slice.

The products of a slice are float32 and so are the statistics: p = exp(o - lse) then has the digits that it needs
where p of the target is nearly 1. With all rows in one block, each row of the weight's gradient is written once, by one
GEMM that sums over all rows in float32; the gradient of hidden is added up over the slices, in float32 too.

    forward     products = hidden @ weight[slice]'      one GEMM, 2 N V D operations, and 8 bytes an entry moved
    backward    products again, residual @ weight[slice], residual' @ hidden: three GEMMs, and 14 bytes an entry
"""

import torch
from torch import Tensor

from xhead.engines import triton_memory
from xhead.engines.gram import blocks
from xhead.engines.matmul import multiply, multiply_add
from xhead.engines.operands import Operands, kernels
from xhead.engines.problem import Problem, Results


class Slices:
    """Statistics and gradients of a problem whose closed forms are left to others."""

    def __init__(self, problem: Problem, operands: Operands):
        self.problem, self.operands = problem, operands
        copied = 0 if operands.row_index is None else operands.hidden.nbytes
        self.rows, self.width = triton_memory.slice_shape(operands.rows.count, problem.vocabulary, copied)
        self.products = torch.empty(self.rows, self.width, dtype=torch.float32, device=problem.hidden.device)
        self.values = None if problem.values is None else problem.values.float().T.contiguous()
        self.mean_weight = None if problem.mean_weight is None else problem.mean_weight.float().contiguous()
        self.row_offsets = self.columns = None
        sets = operands.rows.columns()
        if sets is not None:
            count = torch.bincount(sets[0], minlength=operands.rows.count)
            self.row_offsets, self.columns = torch.nn.functional.pad(count.cumsum(0), (1, 0)), sets[1].contiguous()

    def _part(self, first: int, last: int, start: int, stop: int):
        """Rows first to last and classes start to stop, with their products, valid until the next call."""
        problem, operands = self.problem, self.operands
        products = self.products[: last - first, : stop - start]
        multiply(operands.hidden[first:last], operands.weight[start:stop].T, products)
        target = operands.target
        if problem.soft_target:
            assert problem.target is not None
            target = operands.rows.take(problem.target[:, start:stop])
            target = target if target.stride(-1) == 1 else target.contiguous()
        return kernels("slices").Slice(
            products=products,
            first_class=start,
            bias=operands.bias,
            **operands.options,
            target=None if target is None else target[first:last],
            values=self.values,
            mean_weight=self.mean_weight,
            row_offsets=None if self.row_offsets is None else self.row_offsets[first : last + 1],
            columns=self.columns,
            pointwise=problem.pointwise,
            pointwise_parameters=problem.pointwise_parameters,
        )

    def statistics(self) -> Results:
        """The problem's statistics but for a target that is one class a row, and `lse`, `max`, `uniform_mean`."""
        names = tuple(n for n in self.problem.names if n != "target" or self.problem.soft_target)
        if self.problem.softcap is not None and {"mean", "variance"}.intersection(names):
            names = (*names, "variance")
        pieces: list[Results] = []
        for first, last in blocks(self.operands.rows.count, size=self.rows):
            partial: dict[str, list[Tensor]] = {}
            for start, stop in blocks(self.problem.vocabulary, size=self.width):
                part = self._part(first, last, start, stop)
                for key, value in kernels("slice_statistics").slice_statistics(part, names).items():
                    partial.setdefault(key, []).append(value)
            whole = {key: torch.cat(values) for key, values in partial.items()}
            pieces.append(self._merged(whole, names))
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}

    def _merged(self, partial: dict[str, Tensor], names: tuple[str, ...]) -> Results:
        """partial: key -> (blocks, n)"""
        shift, total = partial["shift"], partial["total"]
        largest, factor, lse = _log_sum(shift, total)
        found = {"max": largest, "lse": lse}
        if "argmax" in names:
            found["argmax"] = partial["argmax"].gather(0, shift.argmax(0, keepdim=True)).squeeze(0)
        whole = (total * factor).sum(0)
        if "entropy" in names:
            # Relative to the largest logit, so that the entropy does not come out as a difference of large ones.
            moved = torch.where(total > 0, shift - largest, 0.0)
            found["entropy"] = whole.log() - ((partial["entropy"] + moved * total) * factor).sum(0) / whole
        if "expectation" in names:
            found["expectation"] = (partial["expectation"] * factor[:, :, None]).sum(0) / whole[:, None]
        if "complement_lse" in names:
            found["complement_lse"] = _log_sum(partial["complement_shift"], partial["complement_total"])[2]
        for name in ("pointwise_sum", "target"):
            if name in names:
                found[name] = partial[name].sum(0)
        if "variance" in names:
            found |= self._moments(partial)
        if "mean" in names:
            share = self.problem.vocabulary if self.mean_weight is None else self.mean_weight.sum()
            found["mean"] = partial["mean"].sum(0) / share
        return found

    def _moments(self, partial: dict[str, Tensor]) -> Results:
        """Mean and variance over all classes, from those of the blocks."""
        size, classes = kernels("slice_statistics").BLOCK, self.problem.vocabulary
        counts = [
            min(size, stop - place)
            for start, stop in blocks(classes, size=self.width)
            for place in range(start, stop, size)
        ]
        centre = partial["centre"]
        count = torch.tensor(counts, dtype=torch.float32, device=centre.device)[:, None]
        mean = (centre * count).sum(0) / classes
        deviation = partial["variance"] + (centre - mean).square() * count
        return {"uniform_mean": mean, "variance": deviation.sum(0) / classes}

    def factors(self, found: Results, grads: Results):
        """What the residual's entries are made of, a row. found, grads: (n,) or (n, M) each"""
        classes = self.problem.vocabulary
        level, slope, direction = grads.get("lse"), None, None
        if "entropy" in grads:
            slope = -grads["entropy"]
            level = (0.0 if level is None else level) + grads["entropy"] * (found["lse"] - found["entropy"])
        if "expectation" in grads:
            direction = grads["expectation"]
            level = (0.0 if level is None else level) - (direction * found["expectation"]).sum(1)
        complement_lse = None
        if "complement_lse" in grads:
            complement_lse = found["complement_lse"]
            complement_lse = complement_lse.masked_fill(complement_lse == float("-inf"), float("inf"))
        share = classes if self.mean_weight is None else self.mean_weight.sum()
        factors = kernels("slice_residual").RowFactors(
            lse=None if level is None else found["lse"],
            level=level,
            slope=slope,
            direction=direction,
            complement_lse=complement_lse,
            complement=grads.get("complement_lse"),
            pointwise=grads.get("pointwise_sum"),
            target=grads.get("target"),
            mean=grads["mean"] / share if "mean" in grads else None,
            centre=found["uniform_mean"] if "variance" in grads else None,
            variance=grads["variance"] * (2 / classes) if "variance" in grads else None,
        )
        # The gradient of a sum is one number, expanded.
        return factors._make(None if factor is None else factor.contiguous() for factor in factors)

    def add_gradients(
        self,
        found: Results,
        grads: Results,
        hidden_grad: Tensor | None,  # (n, D) float32, added to
        weight_grad: Tensor | None,  # (V, D), written
        bias_grad: Tensor | None,  # (V,) float32, added to
    ) -> None:
        """The exact gradients. found, grads: statistic -> (n,) or (n, M)"""
        operands, dtype = self.operands, self.operands.hidden.dtype
        unit = _unit(grads) if dtype == torch.float16 else None
        if unit is not None:
            grads = {name: grad / unit for name, grad in grads.items()}
        factors = self.factors(found, grads)
        out = self.products if dtype == torch.float32 else torch.empty_like(self.products, dtype=dtype)
        row_blocks = list(blocks(operands.rows.count, size=self.rows))
        at_once = len(row_blocks) == 1 and unit is None
        hidden_total = hidden_grad if unit is None or hidden_grad is None else torch.zeros_like(hidden_grad)
        for start, stop in blocks(self.problem.vocabulary, size=self.width):
            weight = operands.weight[start:stop]
            total = None
            if weight_grad is not None:
                total = weight_grad[start:stop] if at_once else torch.zeros_like(weight, dtype=torch.float32)
            for first, last in row_blocks:
                residual, rows = out[: last - first, : stop - start], slice(first, last)
                part = self._part(first, last, start, stop)
                sliced = factors._make(None if factor is None else factor[rows] for factor in factors)
                kernels("slice_residual").slice_residual(part, sliced, residual)
                if hidden_total is not None:
                    multiply_add(residual, weight, hidden_total[rows])
                if total is not None:
                    (multiply if at_once else multiply_add)(residual.T, operands.hidden[rows], total)
                if bias_grad is not None:
                    column_sum = residual.sum(0, dtype=torch.float32)
                    bias_grad[start:stop] += column_sum if unit is None else column_sum * unit
            if weight_grad is not None and total is not None and not at_once:
                weight_grad[start:stop] = total if unit is None else total.mul_(unit)
        if unit is not None and hidden_grad is not None and hidden_total is not None:
            hidden_grad.addcmul_(hidden_total, unit)


def _log_sum(shift: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest shift, the blocks' factors to it, and `log sum exp`. shift, total: (blocks, n)"""
    largest = shift.amax(0)
    base = largest.masked_fill(largest == float("-inf"), 0.0)
    factor = (shift - base).exp()
    return largest, factor, (total * factor).sum(0).log() + base


def _unit(grads: Results) -> Tensor:
    """The largest upstream gradient: those of a mean are tiny, and of size 1 their products fit in float16."""
    largest = torch.stack([grad.abs().max() for grad in grads.values()]).max()
    return torch.where(largest > 0, largest, torch.ones_like(largest))
