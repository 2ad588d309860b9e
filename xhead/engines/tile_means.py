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
"""

import torch
from torch import Tensor

from xhead.engines.gram import blocks
from xhead.engines.operands import Operands
from xhead.engines.problem import Problem

_ROWS, _CLASSES = 1024, 4096  # met at a time
_TILT_LIMIT = 2.0


class SkippedTiles:
    """The closed form of the tiles that are not active."""

    def __init__(
        self,
        problem: Problem,
        operands: Operands,
        lse: Tensor,  # (n,)
        level: Tensor,  # (n,) upstream gradient
        tile_lse: Tensor,  # (class blocks, n)
        active: Tensor,  # (row blocks, class blocks) bool
        order: Tensor,  # (V,) int32, the classes as they lie in the tiles
    ):
        self.problem, self.operands, self.lse, self.level = problem, operands, lse, level
        self.tile_lse, self.active, self.order = tile_lse, active, order.long()
        self.height, self.width = operands.blocks.rows, operands.blocks.classes
        self.mean = self._block_means(operands.weight)
        bias = operands.bias
        self.mean_bias = None if bias is None else self._block_means(bias[:, None])[:, 0]
        self.sizes = torch.full_like(self.mean[:, 0], self.width)
        self.sizes[-1] = problem.vocabulary - self.width * (self.mean.shape[0] - 1)
        # With a cap, logits are not linear in the hidden state, and have no tilt of this form.
        self.tilted = problem.softcap is None

    def _block_means(self, rows: Tensor) -> Tensor:
        """Mean of each block of rows in float32. rows: (V, D) -> (class blocks, D)"""
        means = []
        for start, stop in blocks(rows.shape[0], size=max(_CLASSES // self.width, 1) * self.width):
            part = rows[self.order[start:stop]]
            full = part.shape[0] // self.width * self.width
            means.append(part[:full].view(-1, self.width, part.shape[1]).mean(1, dtype=torch.float32))
            if full < part.shape[0]:
                means.append(part[full:].mean(0, keepdim=True, dtype=torch.float32))
        return torch.cat(means)

    def _mass(self, first: int, last: int) -> Tensor:
        """m_ib of rows first to last: (last - first, class blocks)."""
        row = torch.arange(first, last, device=self.lse.device)
        mass = (self.tile_lse[:, first:last].T - self.lse[first:last, None]).exp_()
        return mass.masked_fill_(self.active[row // self.height], 0.0)

    def add(
        self,
        hidden_grad: Tensor | None,  # (n, D) float32, added to
        weight_grad: Tensor | None,  # (V, D), written
        bias_grad: Tensor | None,  # (V,)
        rest: Tensor,  # (class blocks, D) float32, written: what every class of a block gets
        rest_bias: Tensor,  # (class blocks,)
        factor: Tensor,  # (1,)
    ) -> bool:
        """Add the closed form; whether `weight_grad` was written."""
        scale, size = self.problem.scale, self.mean.shape[1]
        total_mass = torch.zeros_like(self.lse)
        block_mass = torch.zeros_like(self.sizes)
        moment = torch.zeros_like(self.lse)
        covariance = rest.new_zeros(size, size) if self.tilted else None
        for first, last in blocks(self.lse.shape[0], size=_ROWS):
            rows, hidden = slice(first, last), self.operands.hidden[first:last].float()
            mass = self._mass(first, last)
            of_means = mass @ self.mean
            total_mass[rows] = mass.sum(1)
            block_mass += mass.sum(0)
            if self.tilted:
                moment[rows] = self._moment(mass, of_means, hidden, first, last)
            if hidden_grad is not None:
                hidden_grad[rows].addcmul_(of_means, (self.level[rows] * factor)[:, None])
            graded = mass.mul_(self.level[rows, None])
            rest.addmm_(graded.T, hidden)
            rest_bias += graded.sum(0)
            if covariance is not None and weight_grad is not None:
                covariance.addmm_((hidden * (total_mass[rows] * self.level[rows])[:, None]).T, hidden)
        rest.mul_((factor / self.sizes)[:, None])
        rest_bias.mul_(factor / self.sizes)
        if covariance is None:
            return False
        share = block_mass / block_mass.sum().clamp(min=torch.finfo(torch.float32).tiny) / self.sizes
        if hidden_grad is not None:
            self._tilt_hidden(hidden_grad, share, total_mass, moment, factor)
        if weight_grad is None:
            return False
        coefficient = share * factor * scale
        rest.addmm_(self.mean * coefficient[:, None], covariance, alpha=-1)
        self._tilt_weight(weight_grad, covariance, coefficient)
        return True

    def _moment(self, mass: Tensor, of_means: Tensor, hidden: Tensor, first: int, last: int) -> Tensor:
        """`sum_b m_ib (E[o] - obar_ib)` a row, as if a block's logits were normal. mass: (n, class blocks)"""
        centre = torch.linalg.vecdot(of_means, hidden)
        if self.mean_bias is not None:
            centre += mass @ self.mean_bias
        # 0 * inf where a block is ruled out altogether.
        log_mean = (self.tile_lse[:, first:last].T - self.sizes.log()).masked_fill(mass == 0, 0.0)
        return 2 * (torch.linalg.vecdot(mass, log_mean) - centre * self.problem.scale).clamp_(min=0.0)

    def _tilt_hidden(self, hidden_grad: Tensor, share: Tensor, mass: Tensor, moment: Tensor, factor: Tensor) -> None:
        gram, with_bias = self._gram(share)
        scale = self.problem.scale
        for first, last in blocks(self.lse.shape[0], size=_ROWS):
            rows, hidden = slice(first, last), self.operands.hidden[first:last].float()
            product = (hidden @ gram).add_(with_bias)
            spread = torch.linalg.vecdot(product, hidden).mul_(scale**2).mul_(mass[rows])
            # Where the skipped logits hardly vary there is no tilt to speak of, and the quotient is noise.
            tilt = (moment[rows] / spread).nan_to_num_(0.0).clamp_(0.0, _TILT_LIMIT)
            hidden_grad[rows].addcmul_(product, (tilt * mass[rows] * self.level[rows] * factor * scale)[:, None])

    def _gram(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """G (D, D), and `sum_b c_b / |b| sum_k (bias_k - mean bias_b)(w_k - wbar_b)` (D,). share: c_b / |b|"""
        weight, size = self.operands.weight, self.mean.shape[1]
        gram, with_bias = self.mean.new_zeros(size, size), self.mean.new_zeros(size)
        for start, stop in blocks(weight.shape[0], size=_CLASSES):
            block = torch.arange(start, stop, device=weight.device) // self.width
            classes, root = self.order[start:stop], share[block].sqrt()
            centred = (weight[classes].float() - self.mean[block]).mul_(root[:, None])
            if self.operands.bias is not None and self.mean_bias is not None:
                with_bias += ((self.operands.bias[classes].float() - self.mean_bias[block]) * root) @ centred
            # At the speed of the weight's dtype: a correction needs no more digits.
            centred = centred.to(weight.dtype)
            gram += (centred.T @ centred).float()
        return gram, with_bias

    def _tilt_weight(self, weight_grad: Tensor, covariance: Tensor, coefficient: Tensor) -> None:
        """weight_grad: (V, D), covariance: (D, D), coefficient: (class blocks,)"""
        weight = self.operands.weight
        largest = covariance.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        direction = (covariance / largest).to(weight.dtype)
        for start, stop in blocks(weight.shape[0], size=_CLASSES):
            block = torch.arange(start, stop, device=weight.device) // self.width
            classes = self.order[start:stop]
            product = (weight[classes] @ direction) * (coefficient * largest)[block][:, None]
            weight_grad[classes] = product.to(weight_grad.dtype)
