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
from xhead.vocabulary import Vocabulary, even_shards

CLASSIFIER, DUAL_ENCODER = "classifier", "dual_encoder"
ENCODED_AT_ONCE = 1024


def normalises(kind: str, options: NeuralOptions) -> bool:
    """Whether documents and labels become unit vectors."""
    return kind == DUAL_ENCODER and bool(options.normalise)


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
        reduce: sums a gradient over processes, in place, where each of them holds all labels.
        vocabulary: processes share the labels, and this one holds its range of them alone.
    """

    def __init__(
        self,
        kind: str,
        encoder: Encoder,
        options: NeuralOptions,
        labels: int,
        label_inputs: Inputs | None = None,
        reduce: Callable[[Tensor], None] | None = None,
        vocabulary: Vocabulary | None = None,
    ):
        super().__init__()
        self.kind, self.encoder, self.vocabulary = kind, encoder, vocabulary
        self.labels = labels
        self.range = (0, labels) if vocabulary is None else (vocabulary.start, vocabulary.stop)
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
                reduce=reduce if vocabulary is None else None,
                vocabulary=vocabulary,
            )
        else:
            assert label_inputs is not None
            self.head = LabelEncoderHead(
                encoder,
                label_inputs.batch(np.arange(*self.range)),
                chunk=options.label_chunk,
                normalise=self.normalise,
                own_vectors=encoder.size if options.own_vectors else None,
                vocabulary=vocabulary,
            )

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """The encoder's arguments, each (n, T) -> (n, D)"""
        vectors = self.encoder(**{name: tensor.to(self.device) for name, tensor in inputs.items()})
        return unit(vectors) if self.normalise else vectors

    def encode_rows(self, inputs: Inputs, rows: np.ndarray) -> Tensor:
        """The vectors of some documents; processes that share the labels encode a part each. rows: (n,) -> (n, D)"""
        if self.vocabulary is None:
            return self.encode(inputs.batch(rows))
        counts = even_shards(len(rows), self.vocabulary.size)
        first = sum(counts[: self.vocabulary.rank])
        own = rows[first : first + counts[self.vocabulary.rank]]
        # An encoder wants at least one text, and a process without a graph would leave the others waiting.
        vectors = self.encode(inputs.batch(own if len(own) else rows[:1]))[: len(own)]
        return self.vocabulary.gather_rows(vectors, counts)

    def logits(self, inputs: Inputs, rows: np.ndarray, index: Tensor | None = None) -> Any:
        """Of the labels in `index` (B,), or of all: (n, B) or (n, L), not computed yet. rows: (n,)"""
        hidden = self.encode_rows(inputs, rows)
        if isinstance(self.head, LabelEncoderHead):
            return self.head(hidden, None if index is None else index.to(self.device)) / self.temperature
        return self.head(hidden) / self.temperature

    def shared_parameters(self) -> list[nn.Parameter]:
        """Those that all processes hold."""
        own = self.head.own if isinstance(self.head, LabelEncoderHead) and self.vocabulary is not None else None
        return [parameter for parameter in self.parameters() if parameter is not own]

    @property
    def label_tensors(self) -> list[str]:
        """The names, in the state dict, of the tensors with a row a label held here."""
        names = ("own",) if isinstance(self.head, LabelEncoderHead) else ("weight", "squares")
        return [f"head.{name}" for name in names if getattr(self.head, name) is not None]

    @torch.no_grad()
    def label_vectors(self) -> Tensor:
        """Of the labels held here: (L, D) float32, in evaluation mode."""
        head, training = self.head, self.training
        if self.range[0] == self.range[1]:
            return torch.zeros(0, self.encoder.size, device=self.device)
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
        pieces = [self.encode_rows(inputs, rows[start : start + ENCODED_AT_ONCE]) for start in starts]
        self.train(training)
        return torch.cat(pieces) if pieces else torch.zeros(0, self.encoder.size, device=self.device)
