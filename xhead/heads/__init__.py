"""Heads: what stands between the hidden states and the classes.

`"linear"` is the projection that a model comes with. `SphericalHead` is a module of its own, with its own update.
"""

from xhead.heads.spherical.head import SphericalHead

__all__ = ["SphericalHead", "list_heads"]

_HEADS = ("linear",)


def list_heads() -> list[str]:
    """The names that `xhead.patch(model, head=...)` knows, sorted."""
    return sorted(_HEADS)
