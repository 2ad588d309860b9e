"""The backward side of the compensated filter: kept entries, and the closed form of the others, see `skipping`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from xhead.engines.gradients import Gradients, add_weighted_rows
from xhead.engines.gram import ClosedFormGradient, blocks, inverse
from xhead.engines.residual import Residual
from xhead.engines.skipping import DENSE, FOUND_AGAIN, SAVED, SkippingState, split
from xhead.engines.tiles import Tiles


class Replayer:
    """Backward side: the few tiles that need their logits first, then the closed form of all others at once."""

    def __init__(self, tiles: Tiles, residual: Residual, state: SkippingState, gradients: Gradients):
        self.tiles, self.residual, self.state, self.gradients = tiles, residual, state, gradients
        self.problem, self.rows = tiles.problem, tiles.rows
        self.lse, self.level = residual.found["lse"], residual.level * tiles.problem.scale
        options = tiles.problem.filter
        self.compensate, self.sides = options.compensate, {"hidden": options.hidden_grad, "weight": options.weight_grad}
        self.others = {name: not filtered for name, filtered in self.sides.items()}
        # With a cap, logits are not linear in the hidden state, and have no tilt of this form.
        self.tilted = options.compensate and tiles.problem.softcap is None
        self.kind = state.kind.tolist()
        # Of each row, over what is skipped: its mass, and the sum of p (o - mean of o over the tile).
        self.mass = torch.zeros_like(self.lse)
        self.moment = state.first_moment[: self.rows.count].clone()
        # Of each tile, over what is skipped: the sum of upstream gradient times p, and that times the hidden state.
        self.bias_sums = torch.zeros_like(state.mean_bias)
        self.weight_sums = torch.zeros_like(state.mean_weight)

    def run(self, closed_form: ClosedFormGradient) -> None:
        """Fill the gradients, with what the closed forms have for weight and bias."""
        visited = self._visit()
        self.tiles.release()
        filtered = self.gradients.side(**self.sides)
        if self.compensate:
            self._add_means(filtered)
        if self.tilted and filtered.hidden is not None:
            self._tilt_hidden(filtered.hidden)
        self._fill_classes(visited, closed_form)
        tables = (self.problem.weight, self.problem.hidden)
        for row, position, value in self._saved_entries():
            classes, original = self.state.order[position], row if self.rows.index is None else self.rows.index[row]
            self._add_entries(filtered, (row, classes), (original, classes), value, tables)

    # Tiles whose logits are needed.

    def _visit(self) -> Tensor:
        """Form the tiles that were not saved, or all where a side is not filtered; returns their classes' mask (V,)."""
        tiles, gradients = self.tiles, self.gradients
        visited = torch.zeros(self.problem.vocabulary, dtype=torch.bool, device=self.lse.device)
        all_wanted = gradients.side(**self.others).any()
        for across, (start, stop) in enumerate(tiles.class_blocks()):
            row_blocks = [
                (self.kind[down][across], first, last)
                for down, (first, last) in enumerate(tiles.row_blocks())
                if all_wanted or self.kind[down][across] != SAVED
            ]
            if not row_blocks:
                continue
            weight, classes = tiles.weight(start, stop), tiles.classes(start, stop)
            part = gradients.zeros_of_classes(weight)
            pieces = [(kind, *piece) for kind, *rows in row_blocks for piece in blocks(rows[1], rows[0], _VISITED_ROWS)]
            for kind, first, last in pieces:
                hidden = tiles.rows.hidden(first, last)
                logits = tiles.logits(hidden, weight, start)
                here = part.of_rows(first, last)
                exact = here if kind == DENSE else here.side(**self.others)
                if exact.any():
                    exact.add(self.residual.tile(logits, first, last, start), hidden, weight, self.problem.scale)
                if kind == FOUND_AGAIN:
                    self._find_again(here.side(**self.sides), logits, hidden, weight, first, last, start)
            gradients.put_classes(part, classes)
            visited[classes] = True
            del weight, part  # before the next are made
        return visited

    def _find_again(
        self, gradients: Gradients, logits: Tensor, hidden: Tensor, weight: Tensor, first: int, last: int, start: int
    ) -> None:
        """Split a tile that was not saved. logits: (n, c), used up; hidden: (n, D); weight: (c, D)"""
        share, rows, width = self.tiles.scratch(logits), slice(first, last), logits.shape[1]
        torch.sub(logits, self.lse[rows, None], out=share).exp_()
        # The forward kept no more than the limit, and its threshold was lower.
        kept = split(self.tiles, logits, share, self.problem.filter.threshold, first, last, start, all_may_be_kept=True)
        assert kept is not None
        row, column = kept.index // width, kept.index % width
        value = self._values(row + first, kept.logit)
        if self.problem.target is not None:
            target_row, target_column = self.tiles.targets_in(first, last, start)
            target_value = self._target_values(target_row + first)
            row, column = torch.cat([row, target_row.int()]), torch.cat([column, target_column.int()])
            value = torch.cat([value, target_value])
        self._add_entries(gradients, (row, column), (row, column), value, (weight, hidden))
        if not self.compensate:
            return
        across, mass = start // self.tiles.shape[1], kept.row_mass
        mean, mean_bias = self.state.mean_weight[across], self.state.mean_bias[across]
        graded = mass * self.level[rows]
        self.weight_sums[across] += graded @ hidden
        self.bias_sums[across] += graded.sum()
        if gradients.hidden is not None:
            gradients.hidden.addr_(graded, mean)
        if self.tilted:
            self.mass[rows] += mass
            self.moment[rows] += logits.mul_(share).sum(1) - mass * (hidden @ mean + mean_bias) * self.problem.scale

    # Entries that are multiplied out.

    def _values(self, row: Tensor, logit: Tensor) -> Tensor:
        """d loss / d (h~ . w~) of entries that are not a row's target. row, logit: (E,)"""
        return self._capped((logit - self.lse[row]).exp_().mul_(self.level[row]), logit)

    def _target_values(self, row: Tensor) -> Tensor:
        """The same of the rows' targets. row: (E,)"""
        logit = self.residual.found["target"][row]
        value = (logit - self.lse[row]).exp_().mul_(self.level[row])
        if "target" in self.residual.grads:
            value += self.residual.grads["target"][row] * self.problem.scale
        return self._capped(value, logit)

    def _capped(self, value: Tensor, logit: Tensor) -> Tensor:
        softcap = self.problem.softcap
        return value if softcap is None else value.mul_(1 - (logit / softcap).square_())

    def _saved_entries(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(row, class position, value) of the entries of saved tiles, a few at a time, and of the targets in them."""
        height, width = self.tiles.shape
        across = self.state.kind.shape[1]
        counts = self.state.count.flatten().tolist()
        first = begin = end = 0
        for tile, count in enumerate([*counts, _ENTRIES]):
            if end > begin and end + count > begin + _ENTRIES:
                tiles = torch.arange(first, tile, device=self.lse.device)
                tiles = torch.repeat_interleave(tiles, self.state.count.flatten()[first:tile])
                index, start = self.state.index[begin:end], tiles % across * width
                tile_width = (self.problem.vocabulary - start).clamp_(max=width)
                row = tiles.div_(across, rounding_mode="floor").mul_(height).add_(index // tile_width)
                yield row, start.add_(index % tile_width), self._values(row, self.state.logit[begin:end])
            if end + count > begin + _ENTRIES or end == begin:
                first, begin = tile, end
            end += count
        if self.tiles.target is not None:
            for begin, end in blocks(self.rows.count, size=_ENTRIES):
                row, position = torch.arange(begin, end, device=self.lse.device), self.tiles.target[begin:end]
                saved = self.state.kind[row // height, position // width] == SAVED
                yield row[saved], position[saved], self._target_values(row[saved])

    def _add_entries(
        self,
        gradients: Gradients,
        to: tuple[Tensor, Tensor],
        of: tuple[Tensor, Tensor],
        value: Tensor,
        tables: tuple[Tensor, Tensor],
    ) -> None:
        """Add a sparse residual: at `to` (row, class) of the gradients, with the hidden state and weight at `of`.

        tables: weight (c, D) and hidden (n, D); the others (E,)
        """
        (row, column), (hidden_row, weight_row), (weight, hidden) = to, of, tables
        if gradients.hidden is not None:
            add_weighted_rows(gradients.hidden, row, weight_row, value, weight)
        if gradients.weight is not None:
            add_weighted_rows(gradients.weight, column, hidden_row, value, hidden)
        if gradients.bias is not None:
            gradients.bias.index_add_(0, column, value)

    # What is skipped.

    def _add_means(self, gradients: Gradients) -> None:
        """The rank-one part of the saved tiles: all tiles at once, a block of rows at a time."""
        mean, mean_bias = self.state.mean_weight, self.state.mean_bias
        count = min(self.rows.count, self.state.row_mass.shape[0])
        for first, last in blocks(count, size=_ROWS):
            rows, hidden = slice(first, last), self.rows.hidden(first, last)
            mass = (self.state.row_mass[rows] - self.lse[rows, None]).exp_()
            of_means = mass @ mean
            if self.tilted:
                centre = torch.linalg.vecdot(of_means, hidden) + mass @ mean_bias
                self.moment[rows] -= centre * self.problem.scale
                self.mass[rows] += mass.sum(1)
            if gradients.hidden is not None:
                gradients.hidden[rows].addcmul_(of_means, self.level[rows, None])
            if gradients.weight is not None or gradients.bias is not None:
                mass.mul_(self.level[rows, None])
                self.weight_sums.addmm_(mass.T, hidden)
                self.bias_sums += mass.sum(0)

    def _mean_hidden(self) -> Tensor:
        """hbar: (D,)"""
        mass, total = self.state.total_mass[: self.rows.count], self.lse.new_zeros(self.problem.hidden.shape[1])
        for first, last in blocks(self.rows.count):
            total += mass[first:last] @ self.rows.hidden(first, last)
        return total / mass.sum().clamp(min=torch.finfo(total.dtype).tiny)

    def _tilt_hidden(self, hidden_grad: Tensor) -> None:
        """hidden_grad: (n, D)"""
        gram, with_bias = self._gram()
        mean_hidden, scale = self._mean_hidden(), self.problem.scale
        for first, last in blocks(self.rows.count, size=_ROWS):
            hidden, mass = self.rows.hidden(first, last), self.mass[first:last]
            centred = hidden - mean_hidden
            product = centred @ gram
            spread = (torch.linalg.vecdot(product, hidden) + centred @ with_bias).mul_(scale**2).mul_(mass)
            # Where the skipped logits hardly vary there is no tilt to speak of, and the quotient is noise.
            tilt = (self.moment[first:last] / spread).nan_to_num_(0.0).clamp_(0.0, _TILT_LIMIT)
            hidden_grad[first:last].addcmul_(product, (tilt * mass * self.level[first:last] * scale)[:, None])

    def _gram(self) -> tuple[Tensor, Tensor]:
        """G (D, D), and `sum_k c_k (bias_k - mean bias_b)(w_k - wbar_b)` (D,), up to a factor common to both.

        Half of the skipped mass lies in a few classes, which all count; of the many others every fourth stands for
        four.
        """
        size = self.problem.hidden.shape[1]
        gram, with_bias = self.lse.new_zeros(size, size), self.lse.new_zeros(size)
        mass_seen, all_mass = 0.0, max(float(self.state.column_mass.sum()), torch.finfo(gram.dtype).tiny)
        for across, (start, stop) in enumerate(self.tiles.class_blocks()):
            column_mass = self.state.column_mass[start:stop]
            step = 1 if mass_seen < _WHOLE_SHARE * all_mass else _SAMPLED
            mass_seen += float(column_mass.sum())
            for positions in torch.arange(start + start // self.tiles.shape[1] % step, stop, step).split(_ROWS):
                classes = self.state.order[positions]
                root = (self.state.column_mass[positions] * (step / all_mass)).sqrt_()
                centred = self.problem.weight[classes].to(gram.dtype).sub_(self.state.mean_weight[across])
                centred.mul_(root[:, None])
                gram.addmm_(centred.T, centred)
                if self.problem.bias is not None:
                    bias = self.problem.bias[classes].to(gram.dtype) - self.state.mean_bias[across]
                    with_bias += bias.mul_(root) @ centred
        return gram, with_bias

    def covariance(self) -> tuple[Tensor, Tensor]:
        """`sum_i g_i m_i (h_i - hbar) h_i'` (D, D), and the same without the second factor (D,)."""
        size = self.problem.hidden.shape[1]
        covariance, total, mean_hidden = self.lse.new_zeros(size, size), self.lse.new_zeros(size), self._mean_hidden()
        for first, last in blocks(self.rows.count, size=_ROWS):
            hidden = self.rows.hidden(first, last)
            mass = self.state.total_mass[first:last] * self.level[first:last]
            centred = (hidden - mean_hidden).mul_(mass[:, None])
            covariance.addmm_(centred.T, hidden)
            total += centred.sum(0)
        return covariance, total

    def _fill_classes(self, visited: Tensor, closed_form: ClosedFormGradient) -> None:
        """Weight and bias gradients of all classes, but for the saved entries; visited: (V,) those that hold a part."""
        gradients, dtype = self.gradients, self.lse.dtype
        if gradients.weight is None and gradients.bias is None:
            return
        columns = _Columns(self) if self.compensate and self.sides["weight"] else None
        for start, stop in _pieces(visited):
            held = visited[start:stop].nonzero().squeeze(1)
            part = gradients.of_classes(start, stop, dtype)
            before = gradients.rows_of_classes(held + start)
            if columns is None:
                part.clear_classes()
            else:
                columns.fill(part, start, stop)
            part.add_rows(held, before)
            if part.weight is not None:
                closed_form.add_weight_grad(part.weight, start, stop)
            if part.bias is not None:
                closed_form.add_bias_grad(part.bias, start, stop)
            gradients.put_classes(part, slice(start, stop))


def _pieces(visited: Tensor) -> Iterator[tuple[int, int]]:
    """The classes in blocks, smaller ones where many hold a part of the gradient that has to be set aside."""
    for start, stop in blocks(visited.shape[0], size=_CLASSES):
        many = int(visited[start:stop].sum()) > _HELD_CLASSES
        yield from blocks(stop, start, _HELD_CLASSES if many else _CLASSES)


class _Columns:
    """The skipped part of the classes' gradients: `column mass_k (U_b + C w_k)`, U_b a row a tile, C the tilt's."""

    def __init__(self, replayer: Replayer):
        state, self.problem, self.width = replayer.state, replayer.problem, replayer.tiles.shape[1]
        self.column_mass, self.tilt = state.column_mass, None
        if replayer.tilted:
            self.tilt = replayer.covariance()
        self.position = inverse(state.order)
        padded = torch.nn.functional.pad(state.column_mass, (0, -state.column_mass.shape[0] % self.width))
        tile_mass = padded.view(-1, self.width).sum(1)
        share = tile_mass.reciprocal().masked_fill_(tile_mass == 0, 0.0)
        self.weight_rows, self.bias_rows = replayer.weight_sums.mul_(share[:, None]), replayer.bias_sums.mul_(share)
        if self.tilt is not None:
            factor = self.problem.scale / tile_mass.sum().clamp(min=torch.finfo(tile_mass.dtype).tiny)
            for moment in self.tilt:
                moment.mul_(factor)
            self.weight_rows.addmm_(state.mean_weight, self.tilt[0], alpha=-1)
            self.bias_rows.addmv_(state.mean_weight, self.tilt[1], alpha=-1)

    def fill(self, part: Gradients, start: int, stop: int) -> None:
        """part: the accumulators of classes start to stop"""
        position = self.position[start:stop]
        tile, mass = position // self.width, self.column_mass[position]
        weight = self.problem.weight[start:stop].to(mass.dtype)
        if part.weight is not None:
            torch.index_select(self.weight_rows, 0, tile, out=part.weight)
            if self.tilt is not None:
                part.weight.addmm_(weight, self.tilt[0])
            part.weight.mul_(mass[:, None])
        if part.bias is not None:
            torch.index_select(self.bias_rows, 0, tile, out=part.bias)
            if self.tilt is not None:
                part.bias.addmv_(weight, self.tilt[1])
            part.bias.mul_(mass)


_WHOLE_SHARE, _SAMPLED = 0.5, 4
_TILT_LIMIT = 2.0  # exp has slope 1 where it is not cut off by the threshold, and less where it is
_ROWS, _VISITED_ROWS, _CLASSES, _HELD_CLASSES, _ENTRIES = 128, 512, 512, 128, 1 << 14  # met at a time
