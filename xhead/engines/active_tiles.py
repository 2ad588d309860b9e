"""The filtered backward of the Triton engine: tiles of the logits that hold an entry of at least the threshold.

Those are formed again, some columns of them at a time, and multiplied out with a kernel for each gradient. What the
others hold is added in closed form (`tile_means`), or dropped. A tile's target counts as active where the tile is; a
target in a skipped tile is added as a single entry.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xhead.engines.gram import ClosedFormGradient
from xhead.engines.operands import Operands, kernels
from xhead.engines.problem import Problem, Results, cap_slope
from xhead.engines.row_sums import RowSums
from xhead.engines.tile_means import Record, SkippedTiles
from xhead.engines.triton_memory import residual_bytes

_TARGET_ROWS = 256  # met at a time


class _Tiles(NamedTuple):
    """The active tiles in a list, by class block and row block, in groups that are held together."""

    row_block: Tensor  # (tiles,) int32
    class_block: Tensor  # (tiles,) int32
    class_start: Tensor  # (class blocks + 1,) where a class block's tiles start
    row_tile: Tensor  # (tiles,) int32, the list's places sorted by group and row block
    row_start: Tensor  # (groups * row blocks + 1,) where those of a group and row block start
    groups: list[tuple[int, int]]  # class blocks of each group
    starts: list[int]  # (groups + 1,) where a group's tiles start


class ActiveTiles:
    """Which tiles are active, and the gradient of `lse` and of a target that is one class a row over them."""

    def __init__(self, problem: Problem, operands: Operands, record: Record, lse: Tensor):
        """lse: (n,)"""
        self.problem, self.operands, self.record, self.lse = problem, operands, record, lse
        self.active, *self.skipped = kernels("tile_record").read_record(
            record.codes, record.reference, lse, math.log(problem.filter.threshold), problem.vocabulary, operands.blocks
        )
        self.counts: list[int] = self.active.sum(0).tolist()  # read from the device: they decide the path

    @property
    def share(self) -> float:
        """The share of the tiles that are active."""
        return sum(self.counts) / max(self.active.numel(), 1)

    def add_gradients(
        self,
        upstream: Results,  # of lse and target, each (n,)
        target_logit: Tensor | None,  # (n,)
        sums: RowSums | None,  # of the hidden states' gradient, 0; finished here, with the closed forms'
        closed_form: ClosedFormGradient,
        weight_grad: Tensor | None,  # (V, D), written
        bias_grad: Tensor | None,  # (V,) float32, 0
    ) -> None:
        zeros = torch.zeros_like(self.lse)
        level, target_level = upstream.get("lse", zeros), upstream.get("target")
        largest = torch.stack([grad.abs().max() for grad in upstream.values()]).max()
        # Upstream gradients of a mean are tiny: of size 1, their products are safe in half precision.
        unit = torch.where(largest > 0, largest, torch.ones_like(largest))
        level, target_level = level / unit, None if target_level is None else target_level / unit
        factor = (unit * self.problem.scale).reshape(1)
        self._add_skipped(level, sums, weight_grad, bias_grad, factor)
        if sums is not None:
            sums.widen()
        self._add_active(level, target_level, sums, weight_grad, bias_grad, factor)
        lone = None
        if target_level is not None and target_logit is not None:
            lone = target_level * factor * cap_slope(target_logit, self.problem.softcap)
            lone = lone.masked_fill_(self._target_active(), 0.0)
            self._add_lone_targets(weight_grad, bias_grad, lone)
        if sums is not None:
            lone = None if lone is None else self.operands.rows.spread(lone)
            sums.finish(self.operands.weight, self.problem.target, lone, closed_form)

    def _add_skipped(
        self, level: Tensor, sums: RowSums | None, weight_grad: Tensor | None, bias_grad: Tensor | None, factor: Tensor
    ) -> None:
        if self.problem.filter.compensate:
            skipped = SkippedTiles(
                self.problem, self.operands, self.record, self.lse, level, self.active, *self.skipped
            )
            if sums is not None:
                skipped.write_hidden(sums, factor)
            if weight_grad is not None or bias_grad is not None:
                skipped.write_weight(weight_grad, bias_grad, factor)
        elif weight_grad is not None:
            weight_grad.zero_()

    def _add_active(
        self,
        level: Tensor,
        target_level: Tensor | None,
        sums: RowSums | None,
        weight_grad: Tensor | None,
        bias_grad: Tensor | None,
        factor: Tensor,
    ) -> None:
        operands, order, shape = self.operands, self.record.order, self.operands.blocks
        tiles, products = self._tiles(), kernels("products")
        most = max((last - first for first, last in zip(tiles.starts, tiles.starts[1:], strict=False)), default=0)
        held = operands.source.new_empty(most, shape.rows, shape.classes)
        for group, class_blocks in enumerate(tiles.groups):
            first, last = tiles.starts[group : group + 2]
            residual = held[: last - first]
            kernels("residual").write_residual_tiles(
                residual, operands.source, operands.weight, operands.bias, order, operands.row_index, operands.target,
                self.lse, level, target_level, tiles.row_block, tiles.class_block, first, shape, **operands.options,
            )  # fmt: skip
            if sums is not None:
                products.add_hidden_grad(
                    sums.result, sums.lower, residual, operands.weight, order, operands.row_index, tiles.row_start,
                    tiles.row_tile, tiles.class_block, factor, group, first, shape,
                )  # fmt: skip
            if weight_grad is not None:
                products.add_weight_grad(
                    weight_grad, residual, operands.source, order, operands.row_index, tiles.class_start,
                    tiles.row_block, factor, first, class_blocks, shape,
                )  # fmt: skip
            if bias_grad is not None:
                self._add_bias_grad(bias_grad, residual, tiles.class_block[first:last], factor)

    def _tiles(self) -> _Tiles:
        row_blocks = self.active.shape[0]
        groups = self._groups()
        class_start = torch.nn.functional.pad(self.active.sum(0).cumsum(0), (1, 0))
        class_block, row_block = self.active.T.nonzero().T.int().contiguous()
        group_of = [group for group, (first, last) in enumerate(groups) for _ in range(first, last)]
        of_class = torch.tensor(group_of, dtype=torch.int32, device=self.lse.device)
        key = of_class[class_block] * row_blocks + row_block
        row_tile = key.sort(stable=True).indices.int()
        row_start = torch.nn.functional.pad(key.bincount(minlength=len(groups) * row_blocks).cumsum(0), (1, 0))
        starts = [sum(self.counts[:first]) for first, _ in groups] + [sum(self.counts)]
        return _Tiles(row_block, class_block, class_start, row_tile, row_start, groups, starts)

    def _groups(self) -> list[tuple[int, int]]:
        """Class blocks whose active tiles are held together."""
        tile_blocks, hidden = self.operands.blocks, self.operands.source
        row_blocks, class_blocks = self.active.shape
        size = tile_blocks.rows * tile_blocks.classes * hidden.element_size()
        bytes_held = residual_bytes(
            hidden.shape[0], self.problem.vocabulary, hidden.shape[1], tile_blocks, hidden.dtype
        )
        most = max(bytes_held // size, row_blocks)
        groups, first, held = [], 0, 0
        for block, count in enumerate(self.counts):
            if held + count > most:
                groups.append((first, block))
                first, held = block, 0
            held += count
        return [*groups, (first, class_blocks)]

    def _add_bias_grad(self, bias_grad: Tensor, residual: Tensor, class_block: Tensor, factor: Tensor) -> None:
        width = self.operands.blocks.classes
        place = (class_block.long()[:, None] * width + torch.arange(width, device=self.lse.device)).flatten()
        total = residual.sum(1, dtype=torch.float32).flatten() * factor
        inside = place < bias_grad.shape[0]
        bias_grad.index_put_((self.record.order[place[inside]].long(),), total[inside], accumulate=True)

    def _target_active(self) -> Tensor:
        """Whether the tile of a row's target is active, (n,)."""
        order, target = self.record.order, self.operands.target
        assert target is not None
        place = torch.empty_like(order)
        place[order] = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
        row = torch.arange(target.shape[0], device=order.device)
        return self.active[row // self.operands.blocks.rows, place[target] // self.operands.blocks.classes]

    def _add_lone_targets(self, weight_grad: Tensor | None, bias_grad: Tensor | None, lone: Tensor) -> None:
        """The targets' own gradients where their tiles were skipped. lone: (n,), 0 where they were not"""
        operands = self.operands
        assert operands.target is not None
        for row in lone.nonzero().squeeze(1).split(_TARGET_ROWS):
            target, value = operands.target[row], lone[row]
            if weight_grad is not None:
                product = operands.hidden_of(row).float().mul_(value[:, None]).to(weight_grad.dtype)
                # Sums repeats in a fixed order, which index_add_ does not on a GPU.
                weight_grad.index_put_((target,), product, accumulate=True)
            if bias_grad is not None:
                bias_grad.index_put_((target,), value, accumulate=True)
