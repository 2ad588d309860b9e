"""Forward: log-sum-exp and largest logit of each row, and what each tile holds of a row, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from xhead_kernels.blocks import Blocks, ceil_divide
from xhead_kernels.descriptors import describable, descriptor
from xhead_kernels.tile import described_products, finished, listed, tile_products
from xhead_kernels.tile_record import encoded


@triton.jit
def _row_statistics_kernel(
    hidden,
    weight,
    bias,
    order,  # (V,)
    row_index,  # (N,)
    shift_out,  # (splits, N)
    total_out,  # (splits, N)
    argmax_out,  # (splits, N)
    record_out,  # (tiles, N)
    reference,  # (N,)
    rows,
    classes,
    size,
    hidden_stride,
    weight_stride,
    scale,
    softcap,
    tiles,
    tiles_per_split,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_ARGMAX: tl.constexpr,
    RECORD: tl.constexpr,
    DESCRIBED: tl.constexpr,  # hidden and weight are descriptors
    SPECIALISED: tl.constexpr,  # some warps load while others multiply
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_N)
    row_inside = row < rows
    shift = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_ARGMAX:
        largest = tl.zeros((BLOCK_N,), dtype=tl.int64)
    first = split * tiles_per_split
    if RECORD:
        record_out += first.to(tl.int64) * rows
        row_reference = tl.load(reference + row, mask=row_inside, other=0.0)
    for tile in tl.range(first, tl.minimum(first + tiles_per_split, tiles), warp_specialize=SPECIALISED):
        column = listed(order, tile * BLOCK_V + tl.arange(0, BLOCK_V), classes)
        if DESCRIBED:
            products = described_products(hidden, weight, first_row, tile * BLOCK_V, size, BLOCK_N, BLOCK_V, BLOCK_D)
        else:
            products = tile_products(
                hidden,
                weight,
                listed(row_index, row, rows),
                column,
                row_inside,
                classes,
                size,
                hidden_stride,
                weight_stride,
                BLOCK_N,
                BLOCK_V,
                BLOCK_D,
            )
        logits = finished(products, bias, column, classes, scale, softcap, HAS_BIAS, HAS_CAP)
        logits = tl.where((column < classes)[None, :], logits, float("-inf"))
        peak = tl.max(logits, 1)
        if HAS_ARGMAX:
            largest = tl.where(peak > shift, tl.argmax(logits, 1).to(tl.int64) + tile * BLOCK_V, largest)
        # A tile of -inf only must not become NaN through -inf - (-inf).
        base = tl.where(peak == float("-inf"), 0.0, peak)
        tile_total = tl.sum(tl.exp(logits - base[:, None]), 1)
        if RECORD:
            tl.store(record_out + row, encoded(peak, tile_total, row_reference, row, tile), mask=row_inside)
            record_out += rows
        new_shift = tl.maximum(shift, peak)
        safe = tl.where(new_shift == float("-inf"), 0.0, new_shift)
        total = total * tl.exp(shift - safe) + tile_total * tl.exp(base - safe)
        shift = new_shift
    place = split.to(tl.int64) * rows + row
    tl.store(shift_out + place, shift, mask=row_inside)
    tl.store(total_out + place, total, mask=row_inside)
    if HAS_ARGMAX:
        tl.store(argmax_out + place, largest, mask=row_inside)


def row_statistics(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    order: Tensor | None,  # (V,) int32, the classes as they lie in the tiles
    blocks: Blocks,
    *,
    scale: float,
    softcap: float | None,
    argmax: bool,
    record: Tensor | None = None,  # (tiles, N) int16, written
    reference: Tensor | None = None,  # (N,) float32, what the record is relative to
    row_index: Tensor | None = None,  # (N,) int32, where the rows lie in hidden, which may have others
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`lse` (N,), `max` (N,) in float32 and `argmax` (N,) where asked for."""
    (rows, size), classes = hidden.shape, weight.shape[0]
    rows = rows if row_index is None else row_index.shape[0]
    tiles = ceil_divide(classes, blocks.classes)
    row_blocks = ceil_divide(rows, blocks.rows)
    splits = _splits(row_blocks, tiles, hidden.device)
    float_options = {"dtype": torch.float32, "device": hidden.device}
    shift, total = torch.empty(splits, rows, **float_options), torch.empty(splits, rows, **float_options)
    largest = torch.empty(splits, rows, dtype=torch.int64, device=hidden.device) if argmax else None
    described = order is None and row_index is None and blocks.described
    described = described and describable(hidden) and describable(weight)
    _row_statistics_kernel[(row_blocks, splits)](
        descriptor(hidden, blocks.rows, blocks.inner) if described else hidden,
        descriptor(weight, blocks.classes, blocks.inner) if described else weight,
        weight if bias is None else bias,
        order,
        row_index,
        shift,
        total,
        shift if largest is None else largest,
        shift if record is None else record,
        shift if reference is None else reference,
        rows,
        classes,
        size,
        hidden.stride(0),
        weight.stride(0),
        scale,
        1.0 if softcap is None else softcap,
        tiles,
        ceil_divide(tiles, splits),
        **blocks.launch(
            HAS_BIAS=bias is not None,
            HAS_CAP=softcap is not None,
            HAS_ARGMAX=argmax,
            RECORD=record is not None,
            DESCRIBED=described,
            # The compiler cannot give warps their parts where a reduction has two results.
            SPECIALISED=described and blocks.specialised and not argmax,
        ),
    )
    highest, place = shift.max(0)
    base = highest.masked_fill(highest == float("-inf"), 0.0)
    lse = (total * (shift - base).exp()).sum(0).log() + base
    if largest is None:
        return lse, highest, None
    found = largest.gather(0, place[None]).squeeze(0)
    return lse, highest, found if order is None else order[found].long()


def _splits(row_blocks: int, tiles: int, device: torch.device) -> int:
    """How many programs share the classes of a block of rows: enough for two on each multiprocessor."""
    if device.type != "cuda":
        return min(2, tiles)
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(tiles, ceil_divide(wanted, row_blocks)))
