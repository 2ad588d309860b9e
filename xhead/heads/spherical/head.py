"""`SphericalHead`: an output layer that trains at a cost without the number of classes in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from xhead.exchange import Exchange
from xhead.heads.spherical.attachment import Attachment
from xhead.heads.spherical.conditioning import apply_step
from xhead.heads.spherical.factored import FactoredWeight
from xhead.heads.spherical.gradient import Gradient
from xhead.heads.spherical.prediction import Prediction
from xhead.heads.spherical.rows import SphericalRows
from xhead.heads.spherical.sharded import ShardedWeight
from xhead.heads.spherical.targets import parse_targets
from xhead.losses.spherical_family import SphericalLoss, spherical_loss
from xhead.vocabulary import even_shards

REDUCTIONS = ("mean", "sum", "none")


class SphericalHead(Prediction):
    """Scores `o = W h` over V classes with a loss of the spherical family, in O(n D^2) a step for n rows.

    The step is that of `torch.optim.SGD` without momentum on a dense W, exactly: W is kept as `F U + 1 omega'`, and
    neither scores nor gradient are built. `loss = head(hidden, labels)` has a backward as any loss; the head's own
    update is made by `optimizer.step()` after `head.attach(optimizer)`, or by `head.step(learning_rate)`.

    Args:
        in_features, out_features: D and V, with V at least D.
        loss: `"mse"`, `"zloss"`, `"log_taylor"`, `"log_spherical"`, or a `SphericalLoss`.
        bias: a constant feature appended to the hidden states, for which W has a column: True is 1; the size of the
            constant scales that column's learning rate by its square. 0 or False: none.
        weight: (V, D), or (V, D + 1) with the bias' column, to start from, or this process's rows of it; by default
            uniform in +-1/sqrt(D).
        stabilise_every: after at most how many steps the singular values of U are looked at, and U^-1 computed anew.
        refresh_every: after how many steps mean and covariance of the rows are computed from W again, O(V D^2).
        fold: a step whose factor `I - 2 lr H' diag(alpha) H` is nearly singular is made all the same, exactly, at
            O(V D). False: it raises RuntimeError.
        ignore_index: the label of what is no target. Rows without any target are left out.
        process_group: processes that share the head, each with its own rows of a batch and its own classes of W; see
            docs/spherical_factored.md. `torch.distributed.group.WORLD` is all. Each call is then made by all of them.
        shards: how many classes each process has, in their order; by default as equal as can be. 0 is allowed.
        dtype: float32 or float64; the state must stay in it, whatever the model around it is cast to.
        options: the loss's: `sharpness`, `margin`, `eps`.

    Raises:
        ValueError: V below D, unknown losses or options, intervals below 1; arguments that differ between processes.
        TypeError: another dtype.

    Source: arXiv 1412.7091, arXiv 1606.08061; the Z-loss is arXiv 1604.08859. The losses' formulas are in
    `xhead.losses.spherical_family`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        loss: str | SphericalLoss = "zloss",
        *,
        bias: bool | float = False,
        weight: Tensor | None = None,
        stabilise_every: int = 100,
        refresh_every: int = 10_000,
        fold: bool = True,
        ignore_index: int = -100,
        process_group: torch.distributed.ProcessGroup | None = None,
        shards: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = in_features, out_features, float(bias)
        self.stabilise_every, self.refresh_every = stabilise_every, refresh_every
        self.fold, self.ignore_index = fold, ignore_index
        self.exchange = None if process_group is None else Exchange(process_group)
        with nullcontext() if self.exchange is None else self.exchange.together():
            self.loss = _loss_of(loss, options)
            self._check_options(weight, shards)
        self.weight = self._first_weight(weight, shards, {"device": device, "dtype": dtype})
        self.proxy = nn.Parameter(torch.zeros(1, dtype=self.weight.core.dtype, device=self.weight.core.device))
        self.register_buffer("inverse_temperature", torch.tensor(math.nan, dtype=torch.float64))
        self._start()

    def _check_options(self, weight: Tensor | None, shards: Sequence[int] | None) -> None:
        for name in ("stabilise_every", "refresh_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not math.isfinite(self.bias):
            raise ValueError(f"bias must be True, False or the finite size of the constant feature, got {self.bias}")
        processes = 1 if self.exchange is None else self.exchange.size
        if shards is not None and (len(shards) != processes or min(shards) < 0 or sum(shards) != self.out_features):
            raise ValueError(
                f"shards must be {processes} numbers of classes, one a process, that add up to {self.out_features}, "
                f"got {list(shards)}"
            )
        here = (shards or even_shards(self.out_features, processes))[self.exchange.rank if self.exchange else 0]
        shapes = [(classes, self.in_features + bool(self.bias)) for classes in dict.fromkeys((self.out_features, here))]
        if weight is not None and weight.shape not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"weight must be {wanted} (classes, features), got {tuple(weight.shape)}")

    def _first_weight(
        self, weight: Tensor | None, shards: Sequence[int] | None, like: dict[str, Any]
    ) -> FactoredWeight:
        """The weight to start from; where processes share the head, the classes of this one."""
        exchange = self.exchange
        if exchange is None:
            return FactoredWeight(self._first_rows(slice(0, self.out_features), weight, None, like))
        shards = even_shards(self.out_features, exchange.size) if shards is None else shards
        first = sum(shards[: exchange.rank])
        # Processes that were seeded alike must not give their rows the same numbers.
        seed = exchange.share(int(torch.randint(2**62, ())))[0] + exchange.rank
        with exchange.together():
            rows = self._first_rows(slice(first, first + shards[exchange.rank]), weight, seed, like)
        names = ("in_features", "out_features", "bias", "stabilise_every", "refresh_every", "fold", "ignore_index")
        own = {name: getattr(self, name) for name in names}
        exchange.agree(**own, loss=repr(self.loss), shards=list(shards), dtype=rows.dtype)
        return ShardedWeight(rows, exchange, shards)

    def _first_rows(self, classes: slice, weight: Tensor | None, seed: int | None, like: dict[str, Any]) -> Tensor:
        """Rows of W to start from, without a seed drawn by torch's own generator."""
        if weight is not None:
            rows = weight[classes] if len(weight) == self.out_features else weight
            return rows.detach().clone(memory_format=torch.contiguous_format).to(**like)
        rows = torch.empty(classes.stop - classes.start, self.in_features + bool(self.bias), **like)
        generator = None if seed is None else torch.Generator(rows.device).manual_seed(seed)
        nn.init.uniform_(rows, -(self.in_features**-0.5), self.in_features**-0.5, generator=generator)
        rows[:, self.in_features :] = 0.0
        return rows

    def _start(self) -> None:
        self.gradient = Gradient()
        self._attachment: Attachment | None = None
        self._watched: tuple[nn.Parameter, ...] = ()  # a bare one would count as a parameter of its own

    def _watch(self) -> None:
        # Loading with assign=True puts another parameter in the place of the one watched.
        if not any(each is self.proxy for each in self._watched):
            self._watched = (self.proxy,)
            self.proxy.register_post_accumulate_grad_hook(lambda proxy: self.gradient.settle(self.weight, proxy))

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have neither a gradient nor an optimiser."""
        own = ("gradient", "_attachment", "_watched")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._start()

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        if not self.weight.misfits(state_dict, prefix + "weight."):
            self.gradient.forget()
            super()._load_from_state_dict(state_dict, prefix, *arguments)

    @classmethod
    def from_linear(cls, linear: nn.Linear, loss: str | SphericalLoss = "zloss", **options: Any) -> SphericalHead:
        """A head that starts from a linear layer's weight and bias; options as those of the class.

        `bias=` is the size of the constant feature, 1 by default where the layer has a bias.
        """
        weight = linear.weight.detach()
        size = float(options.pop("bias", linear.bias is not None))
        if (linear.bias is not None) != bool(size):
            raise ValueError(f"bias={size} does not go with a linear layer {'with' if not size else 'without'} a bias")
        if linear.bias is not None:
            weight = torch.cat([weight, linear.bias.detach()[:, None] / size], 1)
        return cls(linear.in_features, linear.out_features, loss, bias=size, weight=weight, **options)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain linear layer with the same scores, whole in every process."""
        weight = self.weight.dense()
        linear = nn.Linear(self.in_features, self.out_features, bool(self.bias), weight.device, weight.dtype)
        linear.weight.copy_(weight[:, : self.in_features])
        if self.bias:
            linear.bias.copy_(weight[:, -1] * self.bias)
        return linear

    def dense(self) -> Tensor:
        """W, (V, D), or (V, D + 1) with the bias' column; whole in every process."""
        return self.weight.dense()

    def extra_repr(self) -> str:
        here = "" if self.exchange is None else f", here {self.weight.place}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}{here}"
        return f"{sizes}, bias={self.bias}, loss={self.loss}"

    def forward(
        self,
        hidden: Tensor,  # (..., D)
        labels: Tensor | None = None,  # (...), (..., K), or sparse CSR (N, V)
        *,
        values: Tensor | None = None,  # as labels
        reduction: str = "mean",
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        """The loss; without labels the scores (..., V), as a linear layer, differentiable by `hidden` alone.

        Args:
            labels: classes, up to K a row; or a sparse CSR matrix of target values. `ignore_index` is no target.
            values: floating values of the targets, 1 by default: y of the squared error, factors of the terms of the
                others. Those of a class that a row names twice are added up.
            reduction: `"mean"` over the rows that have targets (0 where there is none), `"sum"` or `"none"` (...).
            num_items_in_batch: what the sum is divided by in place of the number of rows, as in transformers' losses.

        Raises:
            ValueError: an unknown reduction.
            RuntimeError: shapes or dtypes that do not fit; a head cast to half precision.
            IndexError: a label out of range.
        """
        if labels is None:
            return self._all_scores(hidden)
        with self.weight.together():
            features = self._features(hidden)
            if reduction not in REDUCTIONS:
                raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
            lead = hidden.shape[:-1]
            targets = parse_targets(labels, values, lead, self.out_features, self.ignore_index, features.dtype)
        if targets.kept is not None:
            features = features[targets.kept]
        self._watch()
        with torch.autocast(features.device.type, enabled=False):
            rows = SphericalRows.apply(features, self.proxy, self, targets)
        assert rows is not None
        if reduction == "none":
            if targets.kept is not None:
                rows = rows.new_zeros(targets.kept.shape).masked_scatter(targets.kept, rows)
            return rows.reshape(hidden.shape[:-1])
        total = rows.sum()
        if num_items_in_batch is not None:
            return total / num_items_in_batch
        return total if reduction == "sum" else total / max(1, rows.numel())

    def _features(self, hidden: Tensor) -> Tensor:
        """Hidden states as rows (n, D) in the head's dtype, with the bias' constant."""
        core = self.weight.core
        if core.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(f"the head's state must stay float32 or float64, got {core.dtype}: call head.float()")
        if hidden.ndim < 1 or hidden.shape[-1] != self.in_features or not hidden.is_floating_point():
            raise RuntimeError(
                f"hidden must be floating and (..., {self.in_features}), got {hidden.dtype} of shape "
                f"{tuple(hidden.shape)}"
            )
        flat = hidden.reshape(-1, self.in_features).to(core.dtype)
        return nn.functional.pad(flat, (0, 1), value=self.bias) if self.bias else flat

    def _all_scores(self, hidden: Tensor) -> Tensor:
        if self.exchange is not None:
            raise RuntimeError(
                "a head over several processes gives no scores of all classes: use topk(hidden, k), "
                "ranks(hidden, labels) or scores(hidden, classes), or gather it with to_linear()"
            )
        features = self._features(hidden)
        with torch.autocast(features.device.type, enabled=False):
            scores = (features @ self.weight.mixing.T) @ self.weight.factor.T + (features @ self.weight.offset)[:, None]
        return scores.reshape(*hidden.shape[:-1], self.out_features)

    def attach(self, optimizer: Optimizer, *, rate_factor: float | None = None) -> None:
        """From now on, each `optimizer.step()` updates the head too, by plain SGD.

        The group that holds `head.proxy` (of `head.parameters()`) gives the learning rate, times `rate_factor`, and
        the weight decay, as they are at that step. Steps that the optimiser does not make, under gradient accumulation
        or with a gradient scaler, the head does not make either. accelerate's wrapper is looked through. A head that
        was attached before is detached first.

        Args:
            rate_factor: the head's learning rate over the group's; 1 for plain SGD. For any other optimiser, whose
                learning rate is not meant for SGD, it has to be given.

        Raises ValueError: an optimiser that does not hold `proxy`, or does hold one of the factors; one that is no
        plain SGD, without a `rate_factor`; one that maximises.
        """
        attachment = Attachment(self, optimizer, rate_factor)
        self.detach()
        self._attachment = attachment

    def detach(self) -> None:
        """Undo `attach`; nothing happens where there was none."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    @torch.no_grad()
    def step(self, learning_rate: float, weight_decay: float = 0.0) -> None:
        """One step of plain SGD with the gradient gathered since the last one, which is then used up.

        Raises ValueError for rates out of range, or that differ between processes, and RuntimeError for a gradient that
        is not finite, a nearly singular step without `fold`, or several processes without a `process_group`; the head
        is as it was.
        """
        if self.exchange is None:
            _check_alone()
        with self.weight.together():
            step, scale = self.gradient.take(self.weight, self.proxy)
        if self.exchange is not None:
            rates = {"learning_rate": learning_rate, "weight_decay": weight_decay, "the gradient's scale": scale}
            learning_rate, weight_decay, scale = self.exchange.agree(1e-4, **rates).values()
        if step is not None:
            with torch.autocast(self.proxy.device.type, enabled=False):
                apply_step(
                    self.weight,
                    step,
                    learning_rate,
                    weight_decay,
                    scale,
                    stabilise_every=self.stabilise_every,
                    refresh_every=self.refresh_every,
                    fold=self.fold,
                )
        self.gradient.forget()

    def grad_norm(self) -> Tensor:
        """The Frobenius norm of the gradient of W, (); 0 where there is none."""
        return self.proxy.new_zeros(()) if self.proxy.grad is None else self.proxy.grad.abs().sum()

    def scale_gradient(self, factor: float) -> None:
        """Multiply the gradient of W."""
        if self.proxy.grad is not None:
            self.proxy.grad.mul_(factor)


def _check_alone() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        processes = torch.distributed.get_world_size()
        if processes > 1:
            raise RuntimeError(
                f"this head was made for one process, got {processes}: make it with "
                "process_group=torch.distributed.group.WORLD, so that they exchange what a step needs"
            )


def _loss_of(loss: str | SphericalLoss, options: dict[str, Any]) -> SphericalLoss:
    if isinstance(loss, str):
        return spherical_loss(loss, **options)
    if not isinstance(loss, SphericalLoss):
        raise TypeError(f"loss must be a name or a SphericalLoss, got {loss!r}")
    if options:
        raise ValueError(f"options {', '.join(options)} go with a loss named by a string; {loss!r} has its own")
    return loss
