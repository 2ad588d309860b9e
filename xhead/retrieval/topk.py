"""Exact best classes and ranks of scores `o = hidden @ weight.T`, a block of classes at a time."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xhead.statistics import check_range
from xhead.vocabulary import Vocabulary

SCORES_AT_ONCE = 2**22

Order = Callable[[Tensor], Tensor]  # elementwise: scores are compared by what it makes of them


class TopK(NamedTuple):
    """The best classes of each row, the best first, and their scores: (..., k) both."""

    scores: Tensor
    classes: Tensor


@torch.no_grad()
def topk(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    k: int,
    *,
    bias: Tensor | None = None,  # (V,)
    offset: Tensor | None = None,  # (...)
    order: Order | None = None,
    block: int = 8192,
    vocabulary: Vocabulary | None = None,
) -> TopK:
    """The k classes with the largest `o_k = hidden . w_k + bias_k + offset`, exact, in O(block) memory a row.

    Which of equal scores comes first, or is the last one in, is not specified.

    Args:
        offset: a number a row, added to all its scores.
        order: an elementwise function; classes are compared by `order(o)`, and `o` is returned.
        block: how many classes are scored at a time.
        vocabulary: weight and bias are the rows of this process, all else is the same in all processes, and each of
            them gets the answer: a row's k best of every process's classes, R k numbers, are gathered and merged.

    Raises:
        ValueError: k outside `[1, V]`, or a block below 1.
        RuntimeError: shapes that do not fit together.
    """
    classes = weight.shape[0] if vocabulary is None else vocabulary.classes
    if not 1 <= k <= classes:
        raise ValueError(f"k must be from 1 to the number of classes, {classes}, got {k}")
    if vocabulary is not None:
        return _of_all_processes(hidden, weight, k, bias, offset, order, block, vocabulary)
    found = []
    for _, rows, shift in _row_blocks(hidden, weight, offset, block):
        best_key = best_score = best_class = None
        for start, scores in _scores(rows, shift, weight, bias, block):
            key = scores if order is None else order(scores)
            keys, places = key.topk(min(k, key.shape[1]), dim=1)
            chosen = keys if order is None else scores.gather(1, places)
            indices = places + start
            if best_key is not None and best_score is not None and best_class is not None:
                keys = torch.cat([best_key, keys], 1)
                chosen = torch.cat([best_score, chosen], 1)
                indices = torch.cat([best_class, indices], 1)
                keys, places = keys.topk(min(k, keys.shape[1]), dim=1)
                chosen, indices = chosen.gather(1, places), indices.gather(1, places)
            best_key, best_score, best_class = keys, chosen, indices
        found.append((best_score, best_class))
    shape = (*hidden.shape[:-1], k)
    if not found:
        return TopK(hidden.new_empty(shape), torch.empty(shape, dtype=torch.int64, device=hidden.device))
    scores, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return TopK(scores.reshape(shape), indices.reshape(shape))


def _of_all_processes(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (stop - start, D)
    k: int,
    bias: Tensor | None,  # (stop - start,)
    offset: Tensor | None,  # (...)
    order: Order | None,
    block: int,
    vocabulary: Vocabulary,
) -> TopK:
    vocabulary.exchange(f"the {k} best classes of hidden of {hidden.dtype}", f", hidden {tuple(hidden.shape)}")
    _check(hidden, weight, offset, block)
    flat = hidden.reshape(-1, hidden.shape[-1])
    scores = hidden.new_full((len(flat), k), -torch.inf)
    classes = torch.full(scores.shape, vocabulary.classes, device=hidden.device)
    held = min(k, weight.shape[0])
    if held:
        shift = None if offset is None else offset.reshape(-1)
        own = topk(flat, weight, held, bias=bias, offset=shift, order=order, block=block)
        scores[:, :held], classes[:, :held] = own.scores, own.classes + vocabulary.start
    step = max(1, SCORES_AT_ONCE // (vocabulary.size * k))
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        every = [vocabulary.gather(each[rows].flatten()) for each in (scores, classes)]
        every_score, every_class = (each.view(vocabulary.size, -1, k).transpose(0, 1).flatten(1) for each in every)
        keys = every_score if order is None else order(every_score)
        best = keys.masked_fill(every_class == vocabulary.classes, -torch.inf).topk(k, dim=1).indices
        scores[rows], classes[rows] = every_score.gather(1, best), every_class.gather(1, best)
    shape = (*hidden.shape[:-1], k)
    return TopK(scores.reshape(shape), classes.reshape(shape))


TIES = {"best": 0.0, "mean": 0.5, "worst": 1.0}


@torch.no_grad()
def ranks(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    offset: Tensor | None = None,  # (...)
    order: Order | None = None,
    ties: str = "worst",
    block: int = 8192,
) -> Tensor:
    """The target's place among all classes, 1 the best: `1 + #{k: o_k > o_y} + t #{k != y: o_k = o_y}`, (...).

    Args:
        ties: what equal scores count for: `"best"` t = 0, `"mean"` t = 1/2, `"worst"` t = 1, so that scores which are
            all the same rank the target last. int64, for `"mean"` float32.
        bias, offset, order, block: as in `topk`.

    Raises:
        ValueError: unknown ties, or a block below 1.
        IndexError: a target outside `[0, V)`.
        RuntimeError: shapes that do not fit together.
    """
    check_ranks(hidden, target, weight.shape[0], ties)
    _check(hidden, weight, offset, block)
    own = (hidden * weight[target.long()]).sum(-1)
    own = own if bias is None else own + bias[target.long()]
    own = own if offset is None else own + offset
    own = own if order is None else order(own)
    return place_of(*count_before(hidden, weight, own, target, bias, offset, order, block), ties)


def check_ranks(hidden: Tensor, target: Tensor, classes: int, ties: str) -> None:
    """Raises as `ranks` for ties, and for a target of another shape or out of range."""
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")
    if target.shape != hidden.shape[:-1]:
        raise RuntimeError(f"target must be {tuple(hidden.shape[:-1])}, a class a row, got {tuple(target.shape)}")
    check_range("target", target, classes)


def place_of(above: Tensor, equal: Tensor, ties: str) -> Tensor:
    """The place of a class with so many `above` it and so many others `equal` to it, as `ranks` returns it."""
    share = TIES[ties]
    return 1 + above + (share * equal.float() if ties == "mean" else int(share) * equal)


def count_before(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    own: Tensor,  # (...)
    target: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    offset: Tensor | None = None,  # (...)
    order: Order | None = None,
    block: int = 8192,
) -> tuple[Tensor, Tensor]:
    """`#{k != target: order(o_k) > own}` and `#{k != target: order(o_k) = own}` of each row, (...) int64 both.

    target: the class that does not compete; one outside `[0, V)` is none of these classes.
    """
    above = torch.zeros(hidden.shape[:-1].numel(), dtype=torch.int64, device=hidden.device)
    equal = torch.zeros_like(above)
    own, target = own.reshape(-1, 1), target.reshape(-1).long()
    for rows, some, shift in _row_blocks(hidden, weight, offset, block):
        for start, scores in _scores(some, shift, weight, bias, block):
            key = scores if order is None else order(scores)
            # The target itself is in one of the blocks, maybe rounded otherwise there.
            here = (target[rows] >= start) & (target[rows] < start + key.shape[1])
            place = (target[rows] - start)[here, None]
            key = key.contiguous()
            key[here] = key[here].scatter(1, place, -torch.inf)
            above[rows] += (key > own[rows]).sum(1)
            equal[rows] += (key == own[rows]).sum(1)
    return above.reshape(hidden.shape[:-1]), equal.reshape(hidden.shape[:-1])


def _row_blocks(
    hidden: Tensor, weight: Tensor, offset: Tensor | None, block: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    _check(hidden, weight, offset, block)
    flat = hidden.reshape(-1, hidden.shape[-1])
    step = max(1, SCORES_AT_ONCE // max(1, min(block, weight.shape[0])))
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        yield rows, flat[rows], None if offset is None else offset.reshape(-1)[rows]


def _check(hidden: Tensor, weight: Tensor, offset: Tensor | None, block: int) -> None:
    if block < 1:
        raise ValueError(f"block must be at least 1 class, got {block}")
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"hidden (..., D) and weight (V, D) must share D, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if offset is not None and offset.shape != hidden.shape[:-1]:
        raise RuntimeError(f"offset must be {tuple(hidden.shape[:-1])}, a number a row, got {tuple(offset.shape)}")


def _scores(
    hidden: Tensor, offset: Tensor | None, weight: Tensor, bias: Tensor | None, block: int
) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, weight.shape[0], block):
        part = slice(start, start + block)
        scores = hidden @ weight[part].T
        scores = scores if bias is None else scores.add_(bias[part])
        yield start, scores if offset is None else scores.add_(offset[:, None])
