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

from xhead_kernels import (
    products,
    residual,
    row_statistics,
    slice_residual,
    slice_statistics,
    sums,
    tile_means,
    tile_record,
)
from xhead_kernels.blocks import Blocks, blocks_of

# Bytes that a block of threads may have; 8.6, 8.9 and 12.x, which get the blocks of 8.0, have the least.
SHARED_LIMIT = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
ARCHITECTURES = tuple(SHARED_LIMIT)
TENSOR_CORE = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


ROWS = {"": {"row_index": None}, ", ignored rows": {}}  # what a list of the rows that count adds to a kernel's name
SINGLE = {"lower": None}  # sums that are float32


def kernels(blocks: Blocks, *, capped: bool) -> dict:
    """Each kernel with its constants, by name."""
    tile = {"BLOCK_N": blocks.rows, "BLOCK_V": blocks.classes, "BLOCK_D": blocks.inner}
    product = tile | {"BLOCK_D": 2 * blocks.inner, "INNER": blocks.inner}
    options = {"HAS_BIAS": True, "HAS_CAP": capped}
    pointers = {"HAS_ARGMAX": False, "RECORD": True, "DESCRIBED": False, "SPECIALISED": False}
    statistics = row_statistics._row_statistics_kernel
    made = {}
    for suffix, rows in ROWS.items():
        made["row_statistics" + suffix] = (statistics, options | pointers | tile | rows)
        made["residual" + suffix] = (residual._residual_kernel, options | {"HAS_TARGET": True} | tile | rows)
        if not capped:
            made["hidden_grad" + suffix] = (products._hidden_grad_kernel, product | rows)
            made["weight_grad" + suffix] = (products._weight_grad_kernel, product | rows)
    if blocks.described:
        described = options | pointers | {"RECORD": False, "DESCRIBED": True, "order": None} | ROWS[""] | tile
        made["row_statistics, described"] = (statistics, described | {"SPECIALISED": blocks.specialised})
        made["row_statistics, described, argmax"] = (statistics, described | {"HAS_ARGMAX": True})
    if not capped:
        made["hidden_grad, float32 sums"] = (products._hidden_grad_kernel, product | ROWS[""] | SINGLE)
        moment = {"WIDTH": blocks.classes, "BLOCK_D": 2 * blocks.inner, "INNER": blocks.inner}
        made["second_moment"] = (tile_means._moment_kernel, moment)
        classes = {"BLOCK_N": blocks.classes, "BLOCK_V": 2 * blocks.inner, "BLOCK_D": blocks.inner}
        made["weight_grad of means"] = (tile_means._class_kernel, classes)
    return {f"{name}, capped" if capped else name: kernel for name, kernel in made.items()}


def small_kernels(blocks: Blocks) -> dict:
    """Those of the filtered backward that multiply no matrices: kernel, constants and warps."""
    group = tile_record._LAUNCH | {"BLOCK_N": blocks.rows}
    found = {
        "block_means": (tile_means._mean_kernel, tile_means._MEAN | {"BLOCK_V": blocks.classes}),
        "hidden_grad of means": (tile_means._hidden_kernel, tile_means._TILT | ROWS[""]),
        "hidden_grad of means, ignored rows": (tile_means._hidden_kernel, tile_means._TILT),
        "read_record": (tile_record._read_kernel, group | {"BLOCK_V": blocks.classes}),
        "skipped_mass": (tile_record._mass_kernel, group),
        "finish": (sums._finish_kernel, sums._LAUNCH),
        "finish, float32 sums": (sums._finish_kernel, sums._LAUNCH | SINGLE),
    }
    return {name: (kernel, constants, constants["num_warps"]) for name, (kernel, constants) in found.items()}


def slice_kernels() -> dict:
    """The kernels on slices, which multiply nothing: as the gradient of cross-entropy needs them, and all of them."""
    plain = {"softcap": None, "bias": None, "values": None, "mean_weight": None, "row_offsets": None, "columns": None}
    plain |= {"POINTWISE": None, "SOFT_TARGET": False}
    full = {"POINTWISE": "asymmetric", "SOFT_TARGET": True}
    found = {}
    for name, module, wanted in (
        ("slice_statistics", slice_statistics, ("shift_out", "total_out")),
        ("slice_residual", slice_residual, ("lse_of", "level_of", "target_of", "out")),
    ):
        kernel, block = getattr(module, f"_{name}_kernel"), {"BLOCK": module.BLOCK}
        unused = {n: None for n in kernel.arg_names if n.endswith(("_out", "_of")) and n not in wanted}
        found[name] = kernel, plain | unused | block, module.WARPS
        found[f"{name}, all"] = kernel, full | block, module.WARPS
    return found


TYPES = {
    "target": "*i64", "argmax_out": "*i64", "row_start": "*i64", "class_start": "*i64", "row_block_of": "*i32",
    "class_block_of": "*i32", "row_tile": "*i32", "hidden": "*bf16", "weight": "*bf16", "bias": "*bf16",
    "residual": "*bf16", "out": "*bf16", "weight_grad": "*bf16", "record_out": "*i16", "scale": "fp32",
    "record": "*i16", "upper": "*i16", "lower": "*u8", "active": "*i8", "active_out": "*i8", "mean": "*bf16",
    "matrix": "*bf16", "direction": "*bf16", "bound": "fp32", "limit": "fp32",
    "mass_unit": "fp32",
    "order": "*i32", "softcap": "fp32", "first": "fp32", "second": "fp32", "third": "fp32",
    "row_offsets": "*i64", "columns": "*i64", "row_index": "*i32",
}  # fmt: skip
NUMBERS = {
    "rows", "classes", "size", "hidden_stride", "weight_stride", "grad_stride", "tiles", "tiles_per_split",
    "first_block", "first_class", "products_stride", "target_stride", "out_stride", "first_tile", "last_tile",
    "first_row", "last_row", "first_group", "count", "stride", "values_count", "values_stride",
}  # fmt: skip
# Multiples of 16 in any model worth the speed.
ALIGNED = {
    "size", "hidden_stride", "weight_stride", "grad_stride", "first_class", "products_stride", "out_stride", "stride",
}  # fmt: skip


def compiled(kernel, constants: dict, architecture: int, **options: int):
    """The kernel for an architecture, from types alone."""
    signature, attributes, values = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[position,] = "constexpr", constants[name]
            continue
        signature[name] = "i32" if name in NUMBERS else TYPES.get(name, "*fp32")
        if constants.get("DESCRIBED") and name in ("hidden", "weight"):
            rows = constants["BLOCK_N" if name == "hidden" else "BLOCK_V"]
            signature[name] = f"tensordesc<bf16[{rows},{constants['BLOCK_D']}]>"
        if name == "upper" and "lower" in constants:
            signature[name] = "*fp32"
        if name == "target" and constants.get("SOFT_TARGET"):
            signature[name] = "*bf16"
        if name in ALIGNED or signature[name].startswith("*"):
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
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


def narrow_strides(code: str) -> list[str]:
    """Strides that something is done with before they are 64 bits wide, by the first form that the compiler makes.

    There, each use is a line of its own: `%a = arith.extsi %weight_stride : i32 to i64`.
    """
    strides = set(re.findall(r"%(\w*stride): i32", code))
    used = re.findall(r"^ +%\S+ = ([\w.]+) .*%(\w*stride)\b", code, re.MULTILINE)
    return sorted({name for operation, name in used if name in strides and operation != "arith.extsi"})


def records(architecture: int):
    """What the compiler made of each kernel, for the blocks that the architecture gets."""
    work = {}
    for capped in (False, True):
        blocks = blocks_of(torch.bfloat16, architecture // 10, capped=capped)
        work |= {name: (*each, blocks.warps, True) for name, each in kernels(blocks, capped=capped).items()}
    work |= {name: (*each, False) for name, each in (small_kernels(blocks) | slice_kernels()).items()}
    for name, (kernel, constants, warps, multiplies) in work.items():
        made = compiled(kernel, constants, architecture, num_warps=warps, num_stages=blocks.stages)
        yield {
            "kernel": name,
            "architecture": architecture,
            "tensor_core": TENSOR_CORE[architecture] in made.asm["ptx"] or not multiplies,
            "asynchronous_copies": made.asm["ptx"].count("cp.async"),
            "described_copies": made.asm["ptx"].count("cp.async.bulk.tensor"),
            "narrow_strides": narrow_strides(made.asm["ttir"]),
            "specialised": bool(constants.get("SPECIALISED")),
            "specialised_warps": "ttg.warp_specialize" in made.asm["ttgir"],
            "spilled": spilled(made.asm["cubin"]),
            "shared": made.metadata.shared,
            "fits": made.metadata.shared <= SHARED_LIMIT[architecture],
        }


def main() -> None:
    for architecture in ARCHITECTURES:
        for record in records(architecture):
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
