"""The filtered backward of the Triton engine: tiles of the logits that hold an entry of at least the threshold.

Those are formed again, some columns of them at a time, and multiplied out with a kernel for each gradient. What the
others hold is added in closed form (`tile_means`), or dropped. A tile's target counts as active where the tile is; a
target in a skipped tile is added as a single entry.
"""

import math

import torch
from torch import Tensor

from xhead.engines.gram import blocks
from xhead.engines.operands import Operands, kernels
from xhead.engines.problem import Problem, Results, cap_slope
from xhead.engines.tile_means import SkippedTiles

_RESIDUAL_BYTES = 1 << 27  # residual tiles held at a time: enough for several of them on each multiprocessor
_TILE_COLUMNS = 256  # of the record, compared at a time
_TARGET_ROWS = 512


class ActiveTiles:
    """Which tiles are active, and the gradient of `lse` and of a target that is one class a row over them."""

    def __init__(
        self,
        problem: Problem,
        operands: Operands,
        lse: Tensor,  # (n,)
        tile_lse: Tensor,  # (tiles, n)
        tile_peak: Tensor,  # (tiles, n), the tile's largest logit less its log-sum-exp
        order: Tensor,  # (V,) int32, the classes as they lie in the tiles
    ):
        self.problem, self.operands, self.lse, self.tile_lse, self.order = problem, operands, lse, tile_lse, order
        self.active = self._active(tile_peak)
        self.counts: list[int] = self.active.sum(0).tolist()  # read from the device: they decide the path

    @property
    def share(self) -> float:
        """The share of the tiles that are active."""
        return sum(self.counts) / max(self.active.numel(), 1)

    def _active(self, tile_peak: Tensor) -> Tensor:
        """(row blocks, class blocks) bool"""
        rows, height = self.lse.shape[0], self.operands.blocks.rows
        row_blocks = -(-rows // height)
        bound = math.log(self.problem.filter.threshold)
        found = []
        for start, stop in blocks(tile_peak.shape[0], size=_TILE_COLUMNS):
            largest = self.tile_lse[start:stop] + tile_peak[start:stop] - self.lse
            # Written so that NaN counts as active, and comes out.
            kept = torch.nn.functional.pad(~(largest < bound), (0, row_blocks * height - rows))
            found.append(kept.view(-1, row_blocks, height).any(2))
        return torch.cat(found).T.contiguous()

    def add_gradients(
        self,
        upstream: Results,  # of lse and target, each (n,)
        target_logit: Tensor | None,  # (n,)
        hidden_grad: Tensor | None,  # (n, D) float32, added to
        weight_grad: Tensor | None,  # (V, D), written
        bias_grad: Tensor | None,  # (V,) float32, 0
    ) -> None:
        operands, tile_blocks, device = self.operands, self.operands.blocks, self.lse.device
        zeros = torch.zeros_like(self.lse)
        level, target_level = upstream.get("lse", zeros), upstream.get("target")
        largest = torch.stack([grad.abs().max() for grad in upstream.values()]).max()
        # Upstream gradients of a mean are tiny: of size 1, their products are safe in half precision.
        unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        level, target_level = level / unit, None if target_level is None else target_level / unit
        factor = (unit * self.problem.scale).reshape(1)
        rest = torch.zeros(self.active.shape[1], self.problem.weight.shape[1], device=device)
        rest_bias = torch.zeros(self.active.shape[1], device=device)
        tilted = False
        if self.problem.filter.compensate:
            skipped = SkippedTiles(self.problem, operands, self.lse, level, self.tile_lse, self.active, self.order)
            tilted = skipped.add(hidden_grad, weight_grad, bias_grad, rest, rest_bias, factor)
        if weight_grad is None and bias_grad is not None:
            bias_grad[self.order.long()] += rest_bias.repeat_interleave(tile_blocks.classes)[: bias_grad.shape[0]]
        products = kernels("products")
        for first, last in self._chunks():
            part = self.active[:, first:last]
            class_block, row_block = part.T.nonzero().int().unbind(1)
            residual = kernels("residual").residual_tiles(
                operands.hidden, operands.weight, operands.bias, self.order, operands.target, self.lse, level,
                target_level, row_block, class_block + first, tile_blocks, **operands.options,
            )  # fmt: skip
            if hidden_grad is not None:
                tile = row_block.sort(stable=True).indices.int()
                products.add_hidden_grad(
                    hidden_grad, residual, operands.weight, self.order, _offsets(part.sum(1)), tile,
                    class_block + first, factor, tile_blocks,
                )  # fmt: skip
            if weight_grad is not None:
                products.write_weight_grad(
                    weight_grad, bias_grad, residual, operands.hidden, self.order, _offsets(part.sum(0)), row_block,
                    rest, rest_bias, factor, first, tile_blocks, add=tilted,
                )  # fmt: skip
            elif bias_grad is not None:
                self._write_bias_grad(bias_grad, residual, class_block + first, factor)
        if target_level is not None and target_logit is not None:
            self._add_lone_targets(hidden_grad, weight_grad, bias_grad, target_logit, target_level * factor)

    def _chunks(self) -> list[tuple[int, int]]:
        """Class blocks whose active tiles are held together."""
        tile_blocks, item = self.operands.blocks, self.operands.hidden.element_size()
        row_blocks, class_blocks = self.active.shape
        most = max(_RESIDUAL_BYTES // (tile_blocks.rows * tile_blocks.classes * item), row_blocks)
        chunks, first, held = [], 0, 0
        for block, count in enumerate(self.counts):
            if held + count > most:
                chunks.append((first, block))
                first, held = block, 0
            held += count
        return [*chunks, (first, class_blocks)]

    def _write_bias_grad(self, bias_grad: Tensor, residual: Tensor, class_block: Tensor, factor: Tensor) -> None:
        """The bias trains and the weight does not: the residual's columns are summed without a product."""
        width = self.operands.blocks.classes
        place = (class_block.long()[:, None] * width + torch.arange(width, device=self.lse.device)).flatten()
        total = residual.sum(1, dtype=torch.float32).flatten() * factor
        inside = place < bias_grad.shape[0]
        bias_grad.index_put_((self.order[place[inside]].long(),), total[inside], accumulate=True)

    def _add_lone_targets(
        self,
        hidden_grad: Tensor | None,
        weight_grad: Tensor | None,
        bias_grad: Tensor | None,
        logit: Tensor,  # (n,)
        level: Tensor,  # (n,)
    ) -> None:
        """The target's own gradient where its tile was skipped."""
        operands = self.operands
        assert operands.target is not None
        rows = torch.arange(self.lse.shape[0], device=self.lse.device)
        place = torch.empty(self.order.shape[0], dtype=torch.int64, device=rows.device)
        place[self.order.long()] = torch.arange(self.order.shape[0], device=rows.device)
        active = self.active[rows // operands.blocks.rows, place[operands.target] // operands.blocks.classes]
        for row in rows[~active].split(_TARGET_ROWS):
            target = operands.target[row]
            value = level[row] * cap_slope(logit[row], self.problem.softcap)
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
