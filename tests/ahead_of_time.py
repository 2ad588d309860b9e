"""`python -m tests.ahead_of_time`: compile the Triton kernels without a GPU, and say what the compiler made of them.

Prints one JSON object a line: kernel, architecture, tensor-core instructions, spilled bytes, shared memory. It runs in
a process of its own, since triton's interpreter, which the other tests use, is switched on once a process.
"""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xhead_kernels import products, residual, row_statistics
from xhead_kernels.blocks import Blocks, blocks_of

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block of threads may have
TENSOR_CORE = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


def kernels(blocks: Blocks) -> dict:
    """Each kernel with its constants, by name."""
    tile = {"BLOCK_N": blocks.rows, "BLOCK_V": blocks.classes, "BLOCK_D": blocks.inner}
    product = tile | {"BLOCK_D": 2 * blocks.inner, "INNER": blocks.inner}
    options = {"HAS_BIAS": True, "HAS_CAP": False}
    return {
        "row_statistics": (
            row_statistics._row_statistics_kernel,
            options | {"HAS_ARGMAX": False, "RECORD": True} | tile,
        ),
        "residual": (residual._residual_kernel, options | {"HAS_TARGET": True} | tile),
        "hidden_grad": (products._hidden_grad_kernel, product),
        "weight_grad": (products._weight_grad_kernel, {"HAS_BIAS": False, "ADD": True} | product),
    }


TYPES = {
    "target": "*i64", "argmax_out": "*i64", "row_start": "*i64", "class_start": "*i64", "row_block_of": "*i32",
    "class_block_of": "*i32", "row_tile": "*i32", "hidden": "*bf16", "weight": "*bf16", "bias": "*bf16",
    "residual": "*bf16", "out": "*bf16", "weight_grad": "*bf16", "tile_peak_out": "*fp16", "scale": "fp32",
    "softcap": "fp32",
}  # fmt: skip
NUMBERS = {
    "rows", "classes", "size", "hidden_stride", "weight_stride", "grad_stride", "tiles", "tiles_per_split",
    "first_block",
}  # fmt: skip
ALIGNED = {"size", "hidden_stride", "weight_stride", "grad_stride"}  # multiples of 16 in any model worth the speed


def compiled(kernel, constants: dict, blocks: Blocks, architecture: int):
    """The kernel for an architecture, from types alone."""
    signature, attributes, values = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[position,] = "constexpr", constants[name]
            continue
        signature[name] = "i32" if name in NUMBERS else TYPES.get(name, "*fp32")
        if name in ALIGNED or signature[name].startswith("*"):
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def spilled(cubin: bytes) -> int:
    """Bytes of local memory a thread, which is where registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(cubin)
    usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    os.unlink(file.name)
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", usage.stdout)
    assert found, usage.stdout
    return int(found[1]) + int(found[2])


def main() -> None:
    for architecture in ARCHITECTURES:
        blocks = blocks_of(torch.bfloat16, architecture // 10)
        for name, (kernel, constants) in kernels(blocks).items():
            made = compiled(kernel, constants, blocks, architecture)
            record = {
                "kernel": name,
                "architecture": architecture,
                "tensor_core": TENSOR_CORE[architecture] in made.asm["ptx"],
                "asynchronous_copies": made.asm["ptx"].count("cp.async"),
                "spilled": spilled(made.asm["cubin"]),
                "shared": made.metadata.shared,
                "fits": made.metadata.shared <= SHARED_LIMIT[architecture],
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
