"""Sizes of the tiles, and how many warps and pipeline stages work on one."""

from typing import Any, NamedTuple

import torch
import triton


class Blocks(NamedTuple):
    """A tile of logits is `rows` x `classes`, formed and multiplied out `inner` at a time."""

    rows: int = 128
    classes: int = 256
    inner: int = 64
    warps: int = 8
    stages: int = 3
    described: bool = False  # load blocks by descriptors, where the matrices allow it
    specialised: bool = False  # and have some warps do nothing else

    def launch(self, **options: Any) -> dict[str, Any]:
        """Keyword arguments of a kernel's launch: these sizes, and the options of the call, which come first."""
        sizes = {"BLOCK_N": self.rows, "BLOCK_V": self.classes, "BLOCK_D": self.inner}
        return self.launch_of(**sizes | options)

    def launch_of(self, **options: Any) -> dict[str, Any]:
        """The same of a kernel whose sizes are given."""
        return {"num_warps": self.warps, "num_stages": self.stages, **options}


def ceil_divide(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return -(-count // size)


def blocks_for(dtype: torch.dtype, device: torch.device, *, capped: bool) -> Blocks:
    """Tensor cores take half precision; float32 is multiplied out in full, on smaller tiles. capped: with a softcap."""
    if device.type == "cuda" and torch.version.hip is not None:
        return Blocks(64, 64, 32, stages=2) if dtype == torch.float32 else Blocks(128, 128, 32, stages=2)
    if device.type == "cuda":
        return blocks_of(dtype, torch.cuda.get_device_capability(device)[0], capped=capped)
    return blocks_of(dtype, _NEWEST, capped=capped)


def blocks_of(dtype: torch.dtype, major: int, *, capped: bool) -> Blocks:
    """The blocks for a compute capability: the largest of which no kernel spills registers."""
    if dtype == torch.float32:
        return Blocks(64, 128, 16, warps=8, stages=2)
    if major == 9:
        # tanh and its slope need registers beside those of the logits.
        return Blocks(classes=128 if capped else 256, described=True)
    # Where shared memory is small, as it is on cards with displays, a step of the product is too.
    large = major in (10, 11)
    return Blocks(128, 128, 64 if large else 32, stages=4, described=large, specialised=large and _SPECIALISES)


_NEWEST = 10  # stands in where there is no GPU
_SPECIALISES = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7)  # 3.6 cannot compile it
