"""What skipped tiles hold, in closed form: blocks of classes instead of single entries.

Let b be a block of |b| classes that lie in a tile together, m_ib the mass of row i in it where its tile is skipped, 0
elsewhere, and wbar_b the mean row of the weight in it. To first order inside a block, with obar_ib the mean logit,

    p_ik ~ m_ib / |b| (1 + tilt_i (o_ik - obar_ib))

    d hidden_i += g_i (sum_b m_ib wbar_b + tilt_i m_i G h_i)
    d w_k      += sum_i g_i m_ib / |b| h_i + c_b / |b| C (w_k - wbar_b)

where m_i = sum_b m_ib, c_b is block b's share of all that is skipped, G = sum_b c_b / |b| sum_k (w_k - wbar_b)(...)'
and C = sum_i g_i m_i h_i h_i'. For hidden states, tilt_i gives the row the first moment that it would have if its
logits were normal inside a block: then log(m_ib / |b|) + lse_i = obar_ib + s^2 / 2, with s^2 the variance, and the mean
of the logit under p lies s^2 above obar_ib. So the forward need not record a moment. For the weight it is 1.

G and C are (D, D), in half precision like the matrices that they are multiplied with: a correction needs no more
digits. They, and the masses, are held one after the other and for some rows or blocks at a time.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from xhead.engines.gram import blocks
from xhead.engines.matmul import multiply, multiply_add
from xhead.engines.operands import Operands, kernels
from xhead.engines.problem import Problem
from xhead.engines.row_sums import RowSums
from xhead.engines.triton_memory import MASS_ROWS, MASS_TILES

_TILT_LIMIT = 2.0
_TINY = torch.finfo(torch.float32).tiny


class Record(NamedTuple):
    """What the forward left of each row and tile, and the classes as they lie in the tiles."""

    codes: Tensor  # (class blocks, n) int16
    reference: Tensor  # (n,)
    order: Tensor  # (V,) int32


class SkippedTiles:
    """The closed form of the tiles that are not active."""

    def __init__(
        self,
        problem: Problem,
        operands: Operands,
        record: Record,
        lse: Tensor,  # (n,)
        level: Tensor,  # (n,) upstream gradient
        active: Tensor,  # (row blocks, class blocks) bool
        block_mass: Tensor,  # (class blocks,), what they hold where they are skipped
        row_mass: Tensor,  # (n,)
        row_moment: Tensor,  # (n,), `sum_b m_ib (log(m_ib / |b|) + lse_i)`
    ):
        self.problem, self.operands, self.record, self.active = problem, operands, record, active
        self.lse, self.level, self.row_mass, self.row_moment = lse, level, row_mass, row_moment
        width, count = operands.blocks.classes, block_mass.shape[0]
        self.mean = kernels("tile_means").block_means(operands.weight, record.order, operands.blocks)
        self.sizes = torch.full_like(block_mass, width)
        self.sizes[-1] = problem.vocabulary - width * (count - 1)
        self.share = block_mass / block_mass.sum().clamp(min=_TINY) / self.sizes
        # With a cap, logits are not linear in the hidden state, and have no tilt of this form.
        self.tilted = problem.softcap is None
        # Masses are small numbers, and those of float16 end at 2^-24.
        self.unit = 4096.0 if operands.source.dtype == torch.float16 else 1.0

    def _mass(self, out: Tensor, rows: tuple[int, int], tiles: tuple[int, int], level: Tensor | None = None) -> Tensor:
        """Masses in the unit, times the level, in the dtype of out: (rows, tiles), in the memory of out."""
        shape = rows[1] - rows[0], tiles[1] - tiles[0]
        out = out.view(-1)[: shape[0] * shape[1]].view(shape)
        kernels("tile_record").skipped_mass(
            out, self.record.codes, self.record.reference, self.lse, self.active, level, self.operands.blocks,
            rows=rows, tiles=tiles, unit=self.unit,
        )  # fmt: skip
        return out

    def write_hidden(self, sums: RowSums, factor: Tensor) -> None:
        """Begin the hidden states' gradient. factor: (1,)"""
        hidden, count, size = self.operands.source, *self.mean.shape
        total, some = self.lse.shape[0], min(MASS_ROWS, self.lse.shape[0])
        gram = with_bias = mean_bias = None
        if self.tilted:
            gram, with_bias, mean_bias = self._gram()
        mass = hidden.new_empty(some, count)
        of_means = torch.empty(some, size, dtype=torch.float32, device=hidden.device)
        product = None if gram is None else torch.empty_like(of_means)
        for first, last in blocks(total, size=some):
            part, centre_bias = self._mass(mass, (first, last), (0, count)), None
            multiply(part, self.mean, of_means[: last - first])
            if self.unit != 1.0:
                of_means /= self.unit
            if gram is not None and product is not None:
                multiply(self.operands.hidden_of(slice(first, last)), gram, product[: last - first])
            if mean_bias is not None:
                centre_bias = (part.float() @ mean_bias).div_(self.unit)
            kernels("tile_means").write_hidden_grad(
                sums.result, sums.half, of_means, product, hidden, self.operands.row_index, with_bias, centre_bias,
                self.row_mass, self.row_moment, self.level, factor, (first, last), scale=self.problem.scale,
                limit=_TILT_LIMIT,
            )  # fmt: skip

    def _gram(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """G (D, D), `sum_b c_b / |b| sum_k (bias_k - mean bias_b)(w_k - wbar_b)` (D,), mean bias (class blocks,)."""
        weight, order, width = self.operands.weight, self.record.order, self.operands.blocks.classes
        largest = self.share.max().clamp(min=_TINY).reshape(1)
        deviation = mean_bias = None
        if self.operands.bias is not None:
            deviation, mean_bias = self._bias(self.operands.bias)
        gram = weight.new_empty(weight.shape[1], weight.shape[1])
        share = (self.share / largest).repeat_interleave(width)[: order.shape[0]]
        with_bias = kernels("tile_means").second_moment(
            gram, weight, share, largest, self.operands.blocks, order=order, mean=self.mean, width=width,
            deviation=deviation,
        )  # fmt: skip
        return gram, with_bias, mean_bias

    def _bias(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Distance from the block's mean (V,), as the classes lie, and that mean (class blocks,). bias: (V,)"""
        bias = bias[self.record.order].float()
        # A class that is ruled out has no part in the mean.
        counts = bias.isfinite()
        short = self.mean.shape[0] * self.operands.blocks.classes - bias.shape[0]
        of_blocks = torch.nn.functional.pad(torch.where(counts, bias, 0.0), (0, short)).view(self.mean.shape[0], -1)
        number = torch.nn.functional.pad(counts.float(), (0, short)).view_as(of_blocks).sum(1).clamp_(min=1.0)
        mean = of_blocks.sum(1) / number
        return torch.where(counts, (of_blocks - mean[:, None]).flatten()[: bias.shape[0]], 0.0), mean

    def write_weight(self, weight_grad: Tensor | None, bias_grad: Tensor | None, factor: Tensor) -> None:
        """Begin the gradients of the classes. weight_grad: (V, D), bias_grad: (V,) float32, 0"""
        hidden, width, count = self.operands.source, self.operands.blocks.classes, self.mean.shape[0]
        total = self.lse.shape[0]
        direction = self._direction() if self.tilted and weight_grad is not None else None
        coefficient = self.share * factor * self.problem.scale
        rest_bias = torch.empty_like(self.share)
        mass = hidden.new_empty(total, min(MASS_TILES, count))
        for first, last in blocks(count, size=MASS_TILES):
            part = self._mass(mass, (0, total), (first, last), self.level)
            each = factor / (self.sizes[first:last] * self.unit)
            torch.mul(part.sum(0, dtype=torch.float32), each, out=rest_bias[first:last])
            if weight_grad is None:
                continue
            rest = torch.empty(last - first, hidden.shape[1], dtype=torch.float32, device=hidden.device)
            self._multiply_out(part, rest)
            rest *= each[:, None]
            if direction is not None:
                turned = torch.empty_like(rest)
                multiply(self.mean[first:last].to(direction.dtype), direction, turned)
                rest.addcmul_(turned, coefficient[first:last, None], value=-1)
            kernels("tile_means").write_weight_grad(
                weight_grad, self.operands.weight, self.record.order, direction, coefficient, rest, first,
                self.operands.blocks,
            )  # fmt: skip
        if bias_grad is not None:
            bias_grad.index_add_(0, self.record.order, rest_bias.repeat_interleave(width)[: bias_grad.shape[0]])

    def _multiply_out(self, mass: Tensor, out: Tensor) -> None:
        """`sum_i mass_i h_i`. mass: (n, tiles), out: (tiles, D) float32, written"""
        if self.operands.row_index is None:
            multiply(mass.T, self.operands.source, out)
            return
        out.zero_()
        for first, last in blocks(mass.shape[0], size=MASS_ROWS):
            multiply_add(mass[first:last].T, self.operands.hidden_of(slice(first, last)), out)

    def _direction(self) -> Tensor:
        """C (D, D), as bfloat16 in half precision: sums of squares leave float16's range."""
        hidden = self.operands.source
        level = self.level * self.row_mass
        largest = level.abs().max().clamp(min=_TINY).reshape(1)
        dtype = torch.float32 if hidden.dtype == torch.float32 else torch.bfloat16
        out = torch.empty(hidden.shape[1], hidden.shape[1], dtype=dtype, device=hidden.device)
        kernels("tile_means").second_moment(
            out, hidden, level / largest, largest, self.operands.blocks, order=self.operands.row_index
        )
        return out
