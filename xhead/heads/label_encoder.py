"""Label vectors from texts: the weight of the logits is what an encoder makes of each label.

Source: dual encoders over all labels, DEXML (arXiv 2310.10636); gradient caching, arXiv 2101.06983.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xhead.lazy import LazyLogits
from xhead.losses.vectors import unit


class LabelEncoderHead(nn.Module):
    """Logits `o_k = h . v_k` with `v_k = encoder(text of label k)`, plus a vector of its own where `own_vectors`.

    All labels can be encoded in a training step: a chunk at a time without a graph, and once more, a chunk at a time,
    when the gradient of its vectors is there. Activations are those of one chunk however many labels there are; what
    grows with them is the vectors and their gradient. Random numbers (dropout) are replayed, so that the gradients are
    those of encoding everything at once.

    Args:
        encoder: `encoder(**inputs) -> (b, D)`. The queries' encoder may be the same module.
        inputs: what the encoder takes for all labels, each tensor (L, ...): token ids and mask, for instance.
        chunk: labels encoded at a time.
        normalise: the vectors are made unit vectors.
        own_vectors: add a trained vector (L, D) to what the encoder makes, 0 at the start; their size D is needed then.

    Raises ValueError for inputs without labels or of different lengths, a chunk below 1, or own vectors without a size.
    """

    def __init__(
        self,
        encoder: nn.Module,
        inputs: Mapping[str, Tensor],
        *,
        chunk: int = 1024,
        normalise: bool = False,
        own_vectors: int | None = None,
    ):
        super().__init__()
        lengths = {name: tensor.shape[0] for name, tensor in inputs.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ValueError(f"inputs must be tensors of one length, a row a label, got {lengths}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 label, got {chunk}")
        self.encoder, self.chunk, self.normalise = encoder, chunk, normalise
        self.labels = next(iter(lengths.values()))
        self.names = tuple(inputs)
        for name, tensor in inputs.items():
            self.register_buffer(f"label_{name}", tensor, persistent=False)
        self.own = None if own_vectors is None else nn.Parameter(torch.zeros(self.labels, own_vectors))

    def vectors(self, index: Tensor | None = None) -> Tensor:
        """The vectors of some labels, or of all: (B, D) or (L, D), differentiable. index: (B,)"""
        if index is None:
            index = torch.arange(self.labels, device=getattr(self, f"label_{self.names[0]}").device)
        if torch.is_grad_enabled():
            pieces = [checkpoint(self._encode, part, use_reentrant=False) for part in index.split(self.chunk)]
        else:
            pieces = [self._encode(part) for part in index.split(self.chunk)]
        return torch.cat(pieces)

    def _encode(self, index: Tensor) -> Tensor:
        """(b,) -> (b, D)"""
        vectors = self.encoder(**{name: getattr(self, f"label_{name}")[index] for name in self.names})
        if self.own is not None:
            vectors = vectors + self.own[index]
        return unit(vectors).to(vectors.dtype) if self.normalise else vectors

    def forward(self, hidden: Tensor, index: Tensor | None = None) -> LazyLogits:
        """The logits of some labels, or of all, not computed yet: (..., B) or (..., L). hidden: (..., D)"""
        vectors = self.vectors(index)
        return LazyLogits(hidden.to(vectors.dtype), vectors)
