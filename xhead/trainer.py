"""Trainers that bring a loss of their own, made to train with the model's again.

`transformers.Trainer` needs nothing from here: a patched model trains in it as it is.
"""

import inspect
from typing import Any

from transformers import Trainer, TrainerCallback

from xhead.heads import SphericalHead
from xhead.projection import owner_and_head


def own_loss(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of `trainer_class` whose loss is the model's own, as in `transformers.Trainer`: the patched one.

    For trainers that differ from `Trainer` in how they prepare data and not in what they minimise, such as TRL's
    `SFTTrainer`: it computes cross-entropy in an output head of its own, which would leave a patched projection out.
    The metrics that this head reports beside the loss (entropy, token accuracy) are not logged.

        from xhead.trainer import own_loss
        trainer = own_loss(SFTTrainer)(model=xhead.patch(model), ...)

    Raises TypeError for what is no subclass of `transformers.Trainer`.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(f"trainer_class must be a subclass of transformers.Trainer, got {trainer_class!r}")

    class OwnLoss(trainer_class):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            _remove_fused_head(owner_and_head(self.model)[0])  # type: ignore[arg-type]

        compute_loss = Trainer.compute_loss

    OwnLoss.__name__ = OwnLoss.__qualname__ = trainer_class.__name__
    return OwnLoss


def _remove_fused_head(owner: Any) -> None:
    """Put the forward back that a fused output head was wrapped around."""
    function = getattr(owner.__dict__.get("forward"), "__func__", None)
    if function is None or "fused_lm_head" not in (function.__kwdefaults__ or ()):
        return
    original = inspect.getclosurevars(function).nonlocals.get("original_forward")
    del owner.__dict__["forward"]
    if original is not None and getattr(original, "__func__", None) is not type(owner).forward:
        owner.__dict__["forward"] = original


class AttachHead(TrainerCallback):
    """Has the Trainer's optimiser update a `SphericalHead`: `trainer.add_callback(AttachHead(model.head))`.

    rate_factor: as in `SphericalHead.attach`, which raises as there when training begins; the Trainer's default
    optimiser, AdamW, needs one.
    """

    def __init__(self, head: SphericalHead, *, rate_factor: float | None = None):
        self.head, self.rate_factor = head, rate_factor

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.head.attach(given["optimizer"], rate_factor=self.rate_factor)
