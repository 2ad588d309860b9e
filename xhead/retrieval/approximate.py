"""Approximate best classes through a faiss index, with its recall against the exact ones. faiss is optional."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xhead.retrieval.topk import TopK, topk


class MaximumInnerProduct:
    """An index over the rows of a weight for the classes of the largest `hidden . w_k + bias_k`.

    Args:
        weight: (V, D), copied into the index. bias: (V,), held as one feature more.
        description: what `faiss.index_factory` makes; `"Flat"` is exact, `"HNSW32"` and `"IVF1024,Flat"` are fast.
        options: attributes set on the index, such as `nprobe=16` of IVF.

    Raises:
        ImportError: faiss is not installed.
        AttributeError: an option that the index does not have.
    """

    def __init__(
        self,
        weight: Tensor,  # (V, D)
        bias: Tensor | None = None,  # (V,)
        *,
        description: str = "HNSW32",
        **options: Any,
    ) -> None:
        faiss = _faiss()
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        rows = self.weight if self.bias is None else torch.cat([self.weight, self.bias[:, None]], 1)
        vectors = rows.float().cpu().contiguous().numpy()
        self.index = faiss.index_factory(vectors.shape[1], description, faiss.METRIC_INNER_PRODUCT)
        self.index.train(vectors)
        self.index.add(vectors)
        self._set(options)

    def save(self, path: Path) -> None:
        """Write the index; the weight is not in it."""
        _faiss().write_index(self.index, str(path))

    @classmethod
    def load(
        cls,
        path: Path,
        weight: Tensor,  # (V, D)
        bias: Tensor | None = None,  # (V,)
        **options: Any,
    ) -> "MaximumInnerProduct":
        """An index that `save` wrote, of this weight and bias.

        Raises ValueError where it is one of other sizes, and what the constructor raises.
        """
        found = object.__new__(cls)
        found.weight, found.bias = weight.detach(), None if bias is None else bias.detach()
        found.index = _faiss().read_index(str(path))
        sizes = weight.shape[0], weight.shape[1] + (bias is not None)
        if (found.index.ntotal, found.index.d) != sizes:
            raise ValueError(
                f"{path} is an index of {found.index.ntotal} vectors of {found.index.d} numbers; this weight and bias "
                f"have {sizes[0]} of {sizes[1]}"
            )
        found._set(options)
        return found

    def _set(self, options: dict[str, Any]) -> None:
        for name, value in options.items():
            if not hasattr(self.index, name):
                raise AttributeError(f"the index {type(self.index).__name__} has no attribute {name!r}, for {value!r}")
            setattr(self.index, name, value)

    @torch.no_grad()
    def topk(self, hidden: Tensor, k: int) -> TopK:
        """The k classes found and their scores, the best first; class -1 where fewer were found. hidden: (..., D)"""
        flat = hidden.reshape(-1, hidden.shape[-1]).float().cpu()
        queries = flat if self.bias is None else torch.nn.functional.pad(flat, (0, 1), value=1.0)
        scores, classes = self.index.search(queries.contiguous().numpy(), k)
        shape = (*hidden.shape[:-1], k)
        return TopK(
            torch.from_numpy(scores).to(hidden.device, hidden.dtype).reshape(shape),
            torch.from_numpy(classes).to(hidden.device).reshape(shape),
        )

    def recall(self, hidden: Tensor, k: int) -> float:
        """The share of the exact k best classes that the index finds, over all rows. hidden: (..., D)"""
        found = self.topk(hidden, k).classes
        exact = topk(hidden, self.weight, k, bias=self.bias).classes
        return float((found[..., :, None] == exact[..., None, :]).any(-1).double().mean())


def _faiss() -> Any:
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise ImportError("an approximate index needs faiss: pip install faiss-cpu, or use topk") from error
