"""The two models: documents through an encoder, and labels that have trained vectors or are encoded as well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from recipes.extreme_classification.neural.encoders import BagEncoder, TextEncoder
from recipes.extreme_classification.neural.options import NeuralOptions
from xhead.heads import InPlaceClassifier, LabelEncoderHead
from xhead.losses.vectors import unit

CLASSIFIER, DUAL_ENCODER = "classifier", "dual_encoder"


class XmcModel(nn.Module):
    """Scores `o_k = x . v_k / temperature` of documents x and labels k.

    A classifier's v_k are trained inside the backward (`InPlaceClassifier`); a dual encoder's come from the label's
    text through the encoder of the documents (`LabelEncoderHead`), and all vectors are unit vectors if `normalise`.
    """

    def __init__(
        self,
        kind: str,
        encoder: TextEncoder | BagEncoder,
        options: NeuralOptions,
        labels: int,
        label_inputs: dict[str, Tensor] | None,
    ):
        super().__init__()
        self.kind, self.encoder = kind, encoder
        self.normalise = kind == DUAL_ENCODER and options.normalise
        self.temperature = options.temperature or (0.05 if self.normalise else 1.0)
        self.head: LabelEncoderHead | InPlaceClassifier
        if kind == CLASSIFIER:
            self.head = InPlaceClassifier(
                labels,
                encoder.size,
                lr=options.classifier_learning_rate,
                dtype=getattr(torch, options.classifier_dtype),
            )
        else:
            assert label_inputs is not None
            self.head = LabelEncoderHead(
                encoder,
                label_inputs,
                chunk=options.label_chunk,
                normalise=self.normalise,
                own_vectors=encoder.size if options.own_vectors else None,
            )

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Token ids and mask, each (n, T) -> (n, D)"""
        vectors = self.encoder(**inputs)
        return unit(vectors) if self.normalise else vectors

    def logits(self, inputs: dict[str, Tensor], index: Tensor | None = None) -> Any:
        """Of the labels in `index` (B,), or of all: (n, B) or (n, L), not computed yet."""
        hidden = self.encode(inputs)
        if isinstance(self.head, LabelEncoderHead):
            return self.head(hidden, index) / self.temperature
        return self.head(hidden) / self.temperature

    @torch.no_grad()
    def label_vectors(self) -> Tensor:
        """(L, D) float32"""
        head = self.head
        return (head.vectors() if isinstance(head, LabelEncoderHead) else head.weight).float()

    @torch.no_grad()
    def document_vectors(self, inputs: dict[str, Tensor], batch: int = 1024) -> Tensor:
        """(n, D), in evaluation mode."""
        training = self.training
        self.eval()
        pieces = [self.encode(part) for part in batches_of(inputs, batch)]
        self.train(training)
        return torch.cat(pieces) if pieces else torch.zeros(0, self.encoder.size)


def batches_of(inputs: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """The inputs, some rows at a time."""
    for start in range(0, next(iter(inputs.values())).shape[0], size):
        yield {name: tensor[start : start + size] for name, tensor in inputs.items()}
