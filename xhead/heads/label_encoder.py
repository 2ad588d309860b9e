"""Label vectors from texts: the weight of the logits is what an encoder makes of each label.

Source: dual encoders over all labels, DEXML (arXiv 2310.10636); gradient caching, arXiv 2101.06983; classes by the mean
of their examples, arXiv 1703.05175.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xhead.lazy import LazyLogits
from xhead.losses.vectors import unit
from xhead.vocabulary import Vocabulary


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
        vocabulary: processes share the labels; `inputs` and own vectors are those of this process's range alone, which
            may be empty. Hidden states and labels of the loss are those of the whole batch, the same in all processes:
            `vocabulary.gather_rows` makes them of what each has encoded. The gradients of hidden states and own vectors
            are then whole, and those of the encoder's parameters what follows from the own documents and labels: add
            them up over the processes.

    Raises ValueError for inputs without labels or of different lengths, of other labels than the vocabulary's range, a
    chunk below 1, or own vectors without a size.
    """

    def __init__(
        self,
        encoder: nn.Module,
        inputs: Mapping[str, Tensor],
        *,
        chunk: int = 1024,
        normalise: bool = False,
        own_vectors: int | None = None,
        vocabulary: Vocabulary | None = None,
    ):
        super().__init__()
        lengths = {name: tensor.shape[0] for name, tensor in inputs.items()}
        if len(set(lengths.values())) != 1 or (0 in lengths.values() and vocabulary is None):
            raise ValueError(f"inputs must be tensors of one length, a row a label, got {lengths}")
        held = next(iter(lengths.values()))
        if vocabulary is not None and held != vocabulary.stop - vocabulary.start:
            raise ValueError(
                f"inputs must be those of the labels [{vocabulary.start}, {vocabulary.stop}) that this process holds, "
                f"got {held} rows"
            )
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 label, got {chunk}")
        self.encoder, self.chunk, self.normalise = encoder, chunk, normalise
        self.vocabulary, self.held = vocabulary, held
        self.labels = held if vocabulary is None else vocabulary.classes
        self.names = tuple(inputs)
        for name, tensor in inputs.items():
            self.register_buffer(f"label_{name}", tensor, persistent=False)
        self.register_buffer("document_sums", None, persistent=False)
        self.register_buffer("document_counts", None, persistent=False)
        self.own = None if own_vectors is None else nn.Parameter(torch.zeros(held, own_vectors))

    def set_documents(self, sums: Tensor, counts: Tensor) -> None:
        """Let the vectors of a label's documents x count for it, beside its text:

            v_k = (encoder(text of label k) + sum of its x) / (1 + how many) + own vector

        Where vectors are made unit vectors, what the encoder makes of the text is so before the sum too, as x are.
        No gradient goes to them. Where a document is compared with its own label, the label's sum should be without it:
        what a label is found by in training would otherwise be the document itself.

        Args:
            sums: (L, D), zeros where a label has none; of the labels held here.
            counts: (L,)

        Raises ValueError for other numbers of labels.
        """
        if sums.shape[0] != self.held or counts.shape != (self.held,):
            raise ValueError(
                f"sums and counts must have a row for each of the {self.held} labels held here, got "
                f"{tuple(sums.shape)} and {tuple(counts.shape)}"
            )
        self.document_sums, self.document_counts = sums.detach(), counts.detach()

    def vectors(self, index: Tensor | None = None) -> Tensor:
        """The vectors of some of the labels held here, or of all: (B, D), differentiable. index: (B,), of those held

        Raises ValueError for no labels at all, whose vectors have no size.
        """
        if index is None:
            index = torch.arange(self.held, device=getattr(self, f"label_{self.names[0]}").device)
        if not len(index):
            raise ValueError("there are no labels to encode")
        if torch.is_grad_enabled():
            pieces = [checkpoint(self._encode, part, use_reentrant=False) for part in index.split(self.chunk)]
        else:
            pieces = [self._encode(part) for part in index.split(self.chunk)]
        return torch.cat(pieces)

    def _encode(self, index: Tensor) -> Tensor:
        """(b,) -> (b, D)"""
        vectors = self.encoder(**{name: getattr(self, f"label_{name}")[index] for name in self.names})
        if self.document_sums is not None:
            sums, counts = self.document_sums[index], self.document_counts[index, None]
            vectors = unit(vectors).to(vectors.dtype) if self.normalise else vectors
            vectors = (vectors + sums.to(vectors.dtype)) / (1 + counts).to(vectors.dtype)
        if self.own is not None:
            vectors = vectors + self.own[index]
        return unit(vectors).to(vectors.dtype) if self.normalise else vectors

    def forward(self, hidden: Tensor, index: Tensor | None = None) -> LazyLogits:
        """The logits of some labels, or of all, not computed yet: (..., B) or (..., L). hidden: (..., D)

        index: (B,). Where processes share the labels, it is ascending and the same in all of them.
        """
        shared = self.vocabulary
        if shared is not None and index is not None:
            if not (index.diff() > 0).all():
                raise ValueError("an index of labels that processes share must be ascending, each label once")
            chosen = shared.select(index)
            index, shared = index[chosen.own] - shared.start, chosen
        if (self.held if index is None else len(index)) or shared is None:
            vectors = self.vectors(index)
        else:
            # Own vectors stay part of the graph: an optimiser treats a gradient of 0 and none at all differently.
            nothing = hidden.new_zeros(0, hidden.shape[-1])
            vectors = nothing if self.own is None else self.own[:0].to(hidden.dtype)
        return LazyLogits(hidden.to(vectors.dtype), vectors, vocabulary=shared)
