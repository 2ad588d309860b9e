"""Statistics by Triton kernels: one pass forward that also leaves what each tile holds, and a backward over few tiles.

The forward writes, for each row and tile of classes, the log-sum-exp of the tile and its largest logit. Once the final
log-sum-exp is known, that tells which tiles (a block of rows by a block of classes) hold an entry of at least the
threshold: these are active. The backward forms only active tiles again, some columns of them at a time, and
multiplies them out with a kernel for each gradient. What the others hold is added in closed form: `tile_means`.

A tile's target counts as active where the tile is; a target in a skipped tile is added as a single entry.
"""

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from xhead.engines import gram
from xhead.engines.problem import Problem, Results, cap_slope
from xhead.engines.tile_means import SkippedTiles
from xhead.engines.tiles import Rows

_RESIDUAL_BYTES = 1 << 25  # residual tiles held at a time
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_STREAMED = {"lse", "max", "argmax", "target"}


def eligible(problem: Problem) -> bool:
    """On NVIDIA's or AMD's GPUs where triton is installed; anywhere in triton's interpreter."""
    return (
        _available(problem.hidden.device)
        and problem.hidden.dtype in _DTYPES
        and problem.transform is None
        and not problem.soft_target
        and _STREAMED.issuperset(problem.streamed_names)
    )


def _available(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return device.type == "cuda" or (device.type == "cpu" and knobs.runtime.interpret)


def _kernels() -> Any:
    import xhead_kernels.blocks
    import xhead_kernels.products
    import xhead_kernels.residual
    import xhead_kernels.row_statistics

    return xhead_kernels


def _recorded(problem: Problem, save: bool) -> bool:
    return save and problem.filter.threshold > 0.0 and "lse" in problem.streamed_names


def empty_state(problem: Problem, save: bool) -> list[Tensor]:
    """The row's log-sum-exp and target, the closed forms' moments, and the record of the tiles."""
    device, rows = problem.hidden.device, problem.rows
    across = -(-problem.vocabulary // _kernels().blocks.blocks_for(problem.hidden.dtype, device).classes)
    record = (across, rows) if _recorded(problem, save) else (0, 0)
    return [
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.float32, device=device),
        *gram.empty_state(problem.having(problem.other_names), save),
        torch.empty(record, dtype=torch.float32, device=device),
        torch.empty(record, dtype=torch.float16, device=device),
    ]


class _Operands:
    """The rows that count and the classifier, as the kernels take them."""

    def __init__(self, problem: Problem):
        self.rows = Rows(problem)
        hidden = self.rows.take(problem.hidden)
        self.hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
        self.weight = problem.weight if problem.weight.stride(-1) == 1 else problem.weight.contiguous()
        self.bias = None if problem.bias is None else problem.bias.contiguous()
        self.target = None if problem.target is None else self.rows.take(problem.target).contiguous()
        self.blocks = _kernels().blocks.blocks_for(hidden.dtype, hidden.device)
        self.options = {"scale": problem.scale, "softcap": problem.softcap}


def forward(problem: Problem, save: bool) -> tuple[Results, list[Tensor]]:
    results, moments = gram.forward(problem.having(problem.other_names), save)
    operands = _Operands(problem)
    count = operands.rows.count
    state = empty_state(problem, save)
    tile_lse, tile_peak = state[-2:]
    recorded = _recorded(problem, save)
    found: dict[str, Tensor | None] = dict.fromkeys(("lse", "max", "argmax"))
    if count:
        values = _kernels().row_statistics.row_statistics(
            operands.hidden,
            operands.weight,
            operands.bias,
            operands.blocks,
            argmax="argmax" in problem.names,
            tile_lse=tile_lse if recorded else None,
            tile_peak=tile_peak if recorded else None,
            **operands.options,
        )
        found = dict(zip(found, values, strict=True))
    zeros = torch.zeros(count, dtype=torch.float32, device=problem.hidden.device)
    if "target" in problem.streamed_names and operands.target is not None:
        row = torch.arange(problem.rows, device=zeros.device)
        found["target"] = gram.gathered_logits(problem, operands.rows.take(row), operands.target)
    whole = {"target": torch.zeros_like(state[1])}
    for name, value in found.items():
        default = zeros.long() if name == "argmax" else zeros
        whole[name] = operands.rows.spread(default if value is None else value)
    results.update({name: whole[name] for name in problem.streamed_names})
    state[0].copy_(whole["lse"])
    state[1].copy_(whole["target"])
    return results, [*state[:2], *moments, tile_lse, tile_peak]


def backward(
    problem: Problem, results: Results, state: list[Tensor], grads: Results, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    lse, target_logit, *moments, tile_lse, tile_peak = state
    closed_grads = {name: grad for name, grad in grads.items() if name in problem.other_names}
    streamed = {name: grad for name, grad in grads.items() if name in problem.streamed_names}
    closed_form = gram.ClosedFormGradient(problem.having(problem.other_names), moments, closed_grads)
    operands = _Operands(problem)
    count, device = operands.rows.count, problem.hidden.device
    hidden_grad = torch.zeros(count, problem.hidden.shape[1], dtype=torch.float32, device=device) if needs[0] else None
    weight_grad = torch.zeros_like(problem.weight, memory_format=torch.contiguous_format) if needs[1] else None
    bias_grad = torch.zeros(problem.vocabulary, dtype=torch.float32, device=device) if needs[2] else None
    if streamed and count:
        upstream = {name: operands.rows.take(grad) for name, grad in streamed.items()}
        options = problem.filter
        filtered = tile_lse.numel() > 0 and "lse" in upstream
        filtered = filtered and (options.hidden_grad or not needs[0]) and (options.weight_grad or not needs[1])
        record = (tile_lse[:, :count], tile_peak[:, :count]) if filtered else None
        pass_over = _Backward(problem, operands, operands.rows.take(lse), upstream, record)
        pass_over.run(hidden_grad, weight_grad, bias_grad, operands.rows.take(target_logit))
    _add_closed_form(problem, closed_form, weight_grad, bias_grad)
    if hidden_grad is not None:
        hidden_grad = operands.rows.spread(hidden_grad)
        closed_form.add_hidden_grad(hidden_grad)
        hidden_grad = hidden_grad.to(problem.hidden.dtype)
    if bias_grad is not None and problem.bias is not None:
        bias_grad = bias_grad.to(problem.bias.dtype)
    return hidden_grad, weight_grad, bias_grad


def _add_closed_form(
    problem: Problem, closed_form: gram.ClosedFormGradient, weight_grad: Tensor | None, bias_grad: Tensor | None
) -> None:
    if not closed_form.any():
        return
    for start, stop in gram.blocks(problem.vocabulary):
        if weight_grad is not None:
            tile = weight_grad[start:stop].float()
            closed_form.add_weight_grad(tile, start, stop)
            weight_grad[start:stop] = tile
        if bias_grad is not None:
            closed_form.add_bias_grad(bias_grad[start:stop], start, stop)


class _Backward:
    """One backward over the active tiles."""

    def __init__(
        self,
        problem: Problem,
        operands: _Operands,
        lse: Tensor,  # (n,)
        upstream: Results,  # of lse and target, each (n,)
        record: tuple[Tensor, Tensor] | None,  # the tiles' log-sum-exp and peak, (tiles, n) each; None for all active
    ):
        self.problem, self.operands, self.lse, self.record = problem, operands, lse, record
        zeros = torch.zeros_like(lse)
        level, target_level = upstream.get("lse", zeros), upstream.get("target")
        largest = torch.maximum(level.abs().max(), zeros[0] if target_level is None else target_level.abs().max())
        # Upstream gradients of a mean are tiny: of size 1, their products are safe in half precision.
        self.unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        self.level = level / self.unit
        self.target_level = None if target_level is None else target_level / self.unit
        self.factor = (self.unit * problem.scale).reshape(1)
        self.row_blocks = -(-operands.rows.count // operands.blocks.rows)
        self.class_blocks = -(-problem.vocabulary // operands.blocks.classes)
        self.active = self._active()

    def _active(self) -> Tensor:
        """Which tiles hold an entry of at least the threshold: (row blocks, class blocks)."""
        height = self.operands.blocks.rows
        active = torch.ones(self.row_blocks, self.class_blocks, dtype=torch.bool, device=self.lse.device)
        if self.record is not None:
            tile_lse, tile_peak = self.record
            bound = math.log(self.problem.filter.threshold)
            for block, (first, last) in enumerate(gram.blocks(self.lse.shape[0], size=height)):
                largest = tile_lse[:, first:last] + tile_peak[:, first:last] - self.lse[first:last]
                # Written so that NaN counts as active, and comes out.
                active[block] = ~(largest < bound).all(1)
        return active

    def run(
        self, hidden_grad: Tensor | None, weight_grad: Tensor | None, bias_grad: Tensor | None, target_logit: Tensor
    ) -> None:
        operands, blocks = self.operands, self.operands.blocks
        device = self.lse.device
        rest = torch.zeros(self.class_blocks, self.problem.weight.shape[1], device=device)
        rest_bias = torch.zeros(self.class_blocks, device=device)
        tilted = False
        if self.record is not None and self.problem.filter.compensate:
            skipped = SkippedTiles(self.problem, operands, self.lse, self.level, self.record[0], self.active)
            tilted = skipped.add(hidden_grad, weight_grad, bias_grad, rest, rest_bias, self.factor)
        products = _kernels().products
        for first, last in self._chunks():
            part = self.active[:, first:last]
            class_block, row_block = part.T.nonzero().int().unbind(1)
            residual = _kernels().residual.residual_tiles(
                operands.hidden, operands.weight, operands.bias, operands.target, self.lse, self.level,
                self.target_level, row_block, class_block + first, blocks, **operands.options,
            )  # fmt: skip
            if hidden_grad is not None:
                tile = row_block.sort(stable=True).indices.int()
                products.add_hidden_grad(
                    hidden_grad, residual, operands.weight, _offsets(part.sum(1)), tile, class_block + first,
                    self.factor, blocks,
                )  # fmt: skip
            if weight_grad is not None:
                products.write_weight_grad(
                    weight_grad, bias_grad, residual, operands.hidden, _offsets(part.sum(0)), row_block, rest,
                    rest_bias, self.factor, first, blocks, add=tilted,
                )  # fmt: skip
            elif bias_grad is not None:
                self._write_bias_grad(bias_grad, residual, class_block + first)
        if self.record is not None and self.target_level is not None:
            self._add_lone_targets(hidden_grad, weight_grad, bias_grad, target_logit)

    def _chunks(self) -> list[tuple[int, int]]:
        """Class blocks whose active tiles are held together. Reads the counts from the device, once."""
        blocks, item = self.operands.blocks, self.operands.hidden.element_size()
        most = max(_RESIDUAL_BYTES // (blocks.rows * blocks.classes * item), self.row_blocks)
        chunks, first, held = [], 0, 0
        for block, count in enumerate(self.active.sum(0).tolist()):
            if held + count > most:
                chunks.append((first, block))
                first, held = block, 0
            held += count
        return [*chunks, (first, self.class_blocks)]

    def _write_bias_grad(self, bias_grad: Tensor, residual: Tensor, class_block: Tensor) -> None:
        """The bias trains and the weight does not: the residual's columns are summed without a product."""
        width = self.operands.blocks.classes
        column = (class_block.long()[:, None] * width + torch.arange(width, device=self.lse.device)).flatten()
        total = residual.sum(1, dtype=torch.float32).flatten() * self.factor
        inside = column < bias_grad.shape[0]
        bias_grad.index_put_((column[inside],), total[inside], accumulate=True)

    def _add_lone_targets(
        self, hidden_grad: Tensor | None, weight_grad: Tensor | None, bias_grad: Tensor | None, logit: Tensor
    ) -> None:
        """The target's own gradient where its tile was skipped. logit: (n,)"""
        operands = self.operands
        assert operands.target is not None and self.target_level is not None
        rows = torch.arange(self.lse.shape[0], device=self.lse.device)
        active = self.active[rows // operands.blocks.rows, operands.target // operands.blocks.classes]
        for row in rows[~active].split(_TARGET_ROWS):
            target = operands.target[row]
            value = self.target_level[row] * self.factor * cap_slope(logit[row], self.problem.softcap)
            if hidden_grad is not None:
                hidden_grad[row] += operands.weight[target].float().mul_(value[:, None])
            if weight_grad is not None:
                product = operands.hidden[row].float().mul_(value[:, None]).to(weight_grad.dtype)
                # Sums repeats in a fixed order, which index_add_ does not on a GPU.
                weight_grad.index_put_((target,), product, accumulate=True)
            if bias_grad is not None:
                bias_grad.index_put_((target,), value, accumulate=True)


def _offsets(counts: Tensor) -> Tensor:
    """Where each group starts, and the end. counts: (groups,) -> (groups + 1,)"""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


_TARGET_ROWS = 512
