"""Sizes of the tiles, and how many warps and pipeline stages work on one."""

from typing import Any, NamedTuple

import torch


class Blocks(NamedTuple):
    """A tile of logits is `rows` x `classes`, formed and multiplied out `inner` at a time."""

    rows: int = 128
    classes: int = 256
    inner: int = 64
    warps: int = 8
    stages: int = 3

    def launch(self, **options: Any) -> dict[str, Any]:
        """Keyword arguments of a kernel's launch: these sizes, and the options of the call, which come first."""
        return {
            "BLOCK_N": self.rows,
            "BLOCK_V": self.classes,
            "BLOCK_D": self.inner,
            "num_warps": self.warps,
            "num_stages": self.stages,
            **options,
        }


def ceil_divide(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def blocks_for(dtype: torch.dtype, device: torch.device) -> Blocks:
    """Tensor cores take half precision; float32 is multiplied out in full, on smaller tiles."""
    if device.type == "cuda" and torch.version.hip is not None:
        return Blocks(64, 64, 32, stages=2) if dtype == torch.float32 else Blocks(128, 128, 32, stages=2)
    if device.type == "cuda":
        return blocks_of(dtype, torch.cuda.get_device_capability(device)[0])
    return blocks_of(dtype, _NEWEST)


def blocks_of(dtype: torch.dtype, major: int) -> Blocks:
    """The blocks for a compute capability: the largest of which no kernel spills registers."""
    if dtype == torch.float32:
        return Blocks(64, 128, 32, warps=8, stages=2)
    if major == 9:
        return Blocks()
    # Where shared memory is small, as it is on cards with displays, a step of the product is too.
    return Blocks(128, 128, 64 if major in (10, 11) else 32, stages=4)


_NEWEST = 10  # stands in where there is no GPU
