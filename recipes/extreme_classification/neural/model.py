"""The two models: documents through an encoder, and labels that have trained vectors or are encoded as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recipes.extreme_classification.neural.encoders import Encoder
from recipes.extreme_classification.neural.inputs import Inputs
from recipes.extreme_classification.neural.options import NeuralOptions
from xhead.heads import InPlaceClassifier, LabelEncoderHead
from xhead.losses.vectors import unit

CLASSIFIER, DUAL_ENCODER = "classifier", "dual_encoder"
ENCODED_AT_ONCE = 1024


def normalises(kind: str, options: NeuralOptions) -> bool:
    """Whether documents and labels become unit vectors."""
    return kind == DUAL_ENCODER and options.normalise


class XmcModel(nn.Module):
    """Scores `o_k = x . v_k / temperature` of documents x and labels k.

    A classifier's v_k are trained inside the backward (`InPlaceClassifier`); a dual encoder's come from the label's
    text through the encoder of the documents (`LabelEncoderHead`), and all vectors are unit vectors if `normalise`.

    Args:
        kind: `classifier` or `dual_encoder`.
        encoder: of documents, and of a dual encoder's labels.
        options: what the command line says.
        labels: how many there are.
        label_inputs: a dual encoder's label texts.
        reduce: sums a gradient over processes, in place.
    """

    def __init__(
        self,
        kind: str,
        encoder: Encoder,
        options: NeuralOptions,
        labels: int,
        label_inputs: Inputs | None = None,
        reduce: Callable[[Tensor], None] | None = None,
    ):
        super().__init__()
        self.kind, self.encoder = kind, encoder
        self.normalise = normalises(kind, options)
        self.temperature = options.temperature or (0.05 if self.normalise else 1.0)
        self.head: LabelEncoderHead | InPlaceClassifier
        if kind == CLASSIFIER:
            self.head = InPlaceClassifier(
                labels,
                encoder.size,
                lr=options.classifier_learning_rate,
                dtype=getattr(torch, options.classifier_dtype),
                adaptive=options.classifier_adaptive,
                reduce=reduce,
            )
        else:
            assert label_inputs is not None
            self.head = LabelEncoderHead(
                encoder,
                label_inputs.batch(np.arange(labels)),
                chunk=options.label_chunk,
                normalise=self.normalise,
                own_vectors=encoder.size if options.own_vectors else None,
            )

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """The encoder's arguments, each (n, T) -> (n, D)"""
        vectors = self.encoder(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        return unit(vectors) if self.normalise else vectors

    def logits(self, inputs: dict[str, Tensor], index: Tensor | None = None) -> Any:
        """Of the labels in `index` (B,), or of all: (n, B) or (n, L), not computed yet."""
        hidden = self.encode(inputs)
        if isinstance(self.head, LabelEncoderHead):
            return self.head(hidden, None if index is None else index.to(self.device)) / self.temperature
        return self.head(hidden) / self.temperature

    @torch.no_grad()
    def label_vectors(self) -> Tensor:
        """(L, D) float32, in evaluation mode."""
        head, training = self.head, self.training
        self.eval()
        vectors = head.vectors() if isinstance(head, LabelEncoderHead) else head.weight
        self.train(training)
        return vectors.float()

    @torch.no_grad()
    def document_vectors(self, inputs: Inputs, rows: np.ndarray | None = None) -> Tensor:
        """Of some documents, or of all: (n, D), in evaluation mode. rows: (n,)"""
        rows = np.arange(len(inputs)) if rows is None else rows
        training = self.training
        self.eval()
        starts = range(0, len(rows), ENCODED_AT_ONCE)
        pieces = [self.encode(inputs.batch(rows[start : start + ENCODED_AT_ONCE])) for start in starts]
        self.train(training)
        return torch.cat(pieces) if pieces else torch.zeros(0, self.encoder.size, device=self.device)
