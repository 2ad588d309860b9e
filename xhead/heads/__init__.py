"""Heads: what stands between the hidden states and the classes.

`"linear"` is the projection that a model comes with.
"""

from xhead.heads.fourier import FourierHead
from xhead.heads.fourier_density import FourierDensity

__all__ = ["FourierDensity", "FourierHead", "list_heads"]

_HEADS = ("linear",)


def list_heads() -> list[str]:
    """The names that `xhead.patch(model, head=...)` knows, sorted."""
    return sorted(_HEADS)
