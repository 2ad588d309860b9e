"""Descriptors of matrices, by which a GPU's copy engine (TMA) loads whole blocks: compute capability 9.0 and later."""

from typing import Any

from torch import Tensor

_ALIGNMENT = 16  # bytes, of a matrix's start and of its rows'


def describable(matrix: Tensor) -> bool:
    """Whether the copy engine can load blocks of it."""
    aligned = matrix.data_ptr() % _ALIGNMENT == 0 and matrix.stride(0) * matrix.element_size() % _ALIGNMENT == 0
    return aligned and matrix.numel() > 0


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """Of blocks of so many rows and columns. matrix: (n, m), each row in one piece"""
    # Older releases of triton have kernels, but no descriptors.
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
