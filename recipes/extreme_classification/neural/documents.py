"""Documents with label sets, and what they add to the vectors of their labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix, csr_matrix
from torch import Tensor

from recipes.extreme_classification.neural.inputs import Inputs
from recipes.extreme_classification.neural.model import ENCODED_AT_ONCE, XmcModel
from xhead.heads import LabelEncoderHead


@dataclass(frozen=True)
class Documents:
    """Some rows of encoder inputs, and of label sets."""

    inputs: Inputs
    labels: csr_matrix  # (all rows, L)
    rows: np.ndarray  # (n,)

    def part(self, index: Tensor) -> Documents:
        """Some of them. index: (b,)"""
        return Documents(self.inputs, self.labels, self.rows[index.numpy()])

    def batch(self) -> dict[str, Tensor]:
        return self.inputs.batch(self.rows)

    def padded_labels(self) -> Tensor:
        """(n, K), -1 for none"""
        labels = self.labels[self.rows]
        counts = np.diff(labels.indptr)
        padded = np.full((len(self), max(int(counts.max(initial=0)), 1)), -1, dtype=np.int64)
        padded[np.arange(padded.shape[1]) < counts[:, None]] = labels.indices
        return torch.from_numpy(padded)

    @property
    def label_count(self) -> int:
        return self.labels.shape[1]  # pyright: ignore

    def __len__(self) -> int:
        return len(self.rows)


@torch.no_grad()
def set_prototypes(model: XmcModel, documents: Documents) -> None:
    """Give each label of a dual encoder the vectors of its documents, as the encoder makes them now."""
    assert isinstance(model.head, LabelEncoderHead)
    first, stop = model.range
    sums = torch.zeros(stop - first, model.encoder.size, device=model.device)
    counts = torch.zeros(stop - first, device=model.device)
    for start in range(0, len(documents), ENCODED_AT_ONCE):
        rows = documents.rows[start : start + ENCODED_AT_ONCE]
        vectors = model.document_vectors(documents.inputs, rows).float()
        pairs = coo_matrix(documents.labels[rows][:, first:stop])
        document, label = (torch.from_numpy(place).long().to(model.device) for place in (pairs.row, pairs.col))
        sums.index_add_(0, label, vectors[document])
        counts.index_add_(0, label, torch.ones_like(label, dtype=counts.dtype))
    model.head.set_documents(sums, counts)
