"""Heads: what stands between the hidden states and the classes.

`"linear"` is the projection that a model comes with. `LabelEncoderHead` and `InPlaceClassifier` are for extreme
classification: the classes' vectors come from an encoder, or are trained inside the backward.
"""

from xhead.heads.in_place import InPlaceClassifier
from xhead.heads.label_encoder import LabelEncoderHead

__all__ = ["InPlaceClassifier", "LabelEncoderHead", "list_heads"]

_HEADS = ("linear",)


def list_heads() -> list[str]:
    """The names that `xhead.patch(model, head=...)` knows, sorted."""
    return sorted(_HEADS)
