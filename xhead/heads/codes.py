"""Mappings of a vocabulary to codes: how they are made, mended and judged.

A mapping is a tensor `token_code` (V,) int64 of values in [0, K), every one of which is taken: K codes, none empty.
Where tokens have a second, residual code, what is said of codes in `code_floor` holds for the cells that both make.
"""

import math

import torch
from torch import Tensor

STARTS = ("kmeans", "frequency", "random")


def check_mapping(codes_of: Tensor, tokens: int, codes: int, name: str = "token_code") -> None:
    """Raise TypeError or ValueError where `codes_of` does not give each of the tokens a code in [0, codes)."""
    if not isinstance(codes_of, Tensor) or codes_of.dtype != torch.int64:
        got = codes_of.dtype if isinstance(codes_of, Tensor) else type(codes_of).__name__
        raise TypeError(f"{name} must be a tensor of torch.int64, got {got}")
    if codes_of.shape != (tokens,):
        raise ValueError(f"{name} must have shape ({tokens},), one code a token, got {tuple(codes_of.shape)}")
    low, high = int(codes_of.min()), int(codes_of.max())
    if low < 0 or high >= codes:
        raise ValueError(f"{name} must be in [0, {codes}), the codes there are, got values from {low} to {high}")


def check_none_empty(token_code: Tensor, codes: int) -> None:
    """Raise ValueError where a mapping leaves codes without a token."""
    empty = codes - len(token_code.unique())
    if empty:
        raise ValueError(
            f"{empty} of {codes} codes have no token in token_code; give every code one, or set codebook_size to "
            f"{codes - empty} and renumber"
        )


def check_counts(token_counts: Tensor | None, tokens: int, reason: str) -> Tensor:
    """(V,) float64 counts, each plus one.

    Raises ValueError where they are missing, negative, not finite or of another shape.
    """
    if token_counts is None:
        raise ValueError(f"{reason} needs token_counts=, how often each of the {tokens} tokens occurs in the text")
    if token_counts.shape != (tokens,):
        raise ValueError(
            f"token_counts must have shape ({tokens},), one number a token, got {tuple(token_counts.shape)}"
        )
    if not bool((token_counts.isfinite() & (token_counts >= 0)).all()):
        raise ValueError(
            f"token_counts must be finite and not negative, got values from {token_counts.min().item()} to "
            f"{token_counts.max().item()}"
        )
    return token_counts.double() + 1


def make_mapping(
    start: str,
    codes: int,
    frequent: int,
    rows: Tensor,  # (V, D)
    token_counts: Tensor | None,  # (V,)
) -> Tensor:
    """(V,): a mapping to so many codes, the first `frequent` of which hold one of the most frequent tokens each.

    The other tokens are put into the other codes by mini-batch k-means of their rows (`"kmeans"`), in order of their
    counts, into codes of about the same count (`"frequency"`), or at random, into codes of the same size (`"random"`).
    """
    tokens, device = rows.shape[0], rows.device
    token_code = torch.empty(tokens, dtype=torch.int64, device=device)
    rest = torch.arange(tokens, device=device)
    if frequent:
        counts = check_counts(token_counts, tokens, f"frequent={frequent}").to(device)
        order = counts.argsort(descending=True, stable=True)
        token_code[order[:frequent]] = torch.arange(frequent, device=device)
        rest = order[frequent:].sort().values
    if start == "kmeans":
        found = cluster(rows[rest], codes - frequent)
    elif start == "frequency":
        found = _by_count(check_counts(token_counts, tokens, 'start="frequency"').to(device)[rest], codes - frequent)
    else:
        found = torch.randperm(len(rest), device=device) % (codes - frequent) if len(rest) else rest
    token_code[rest] = found + frequent
    return revive(token_code, token_counts, codes, frequent)[0]


def cluster(rows: Tensor, codes: int) -> Tensor:  # (R, D) -> (R,)
    """The code of each row by mini-batch k-means. Raises ImportError without scikit-learn."""
    if not codes:
        return rows.new_empty(0, dtype=torch.int64)
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise ImportError(
            'start="kmeans" needs scikit-learn: pip install scikit-learn, or start from "frequency" or "random"'
        ) from error
    if codes == len(rows):
        return torch.arange(codes, device=rows.device)
    seed = int(torch.randint(2**31 - 1, ()))
    kmeans = MiniBatchKMeans(codes, random_state=seed, batch_size=max(1024, 2 * codes))
    labels = kmeans.fit_predict(rows.detach().float().cpu().numpy())
    return torch.from_numpy(labels).long().to(rows.device)


def _by_count(counts: Tensor, codes: int) -> Tensor:  # (R,) -> (R,)
    """Runs of tokens in order of their counts, closed when they hold their share of what is left."""
    order = counts.argsort(descending=True, stable=True)
    found, code, held = [], 0, 0.0
    left = float(counts.sum())
    for position, count in enumerate(counts[order].tolist()):
        found.append(code)
        held += count
        tokens_left, codes_left = len(counts) - position - 1, codes - code - 1
        if codes_left and (tokens_left <= codes_left or held >= left / (codes_left + 1)):
            code, left, held = code + 1, left - held, 0.0
    result = torch.empty_like(order)
    result[order] = torch.tensor(found, dtype=torch.int64, device=counts.device)
    return result


def group_means(rows: Tensor, code: Tensor, codes: int) -> Tensor:  # (R, D), (R,)
    """(codes, D): the mean of the rows of each code; zeros for a code that has none."""
    sums = rows.new_zeros(codes, rows.shape[1]).index_add(0, code, rows)
    return sums / torch.bincount(code, minlength=codes).clamp(min=1)[:, None]


def revive(
    token_code: Tensor,  # (V,)
    weight: Tensor | None,  # (V,)
    codes: int,
    frequent: int = 0,
) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """The mapping with its empty codes filled, and (code, token, the code that it had) for each of these.

    An empty code takes the token of the largest weight (None: the first token) among those that share a code. The first
    `frequent` codes are neither filled nor taken from.
    """
    sizes = torch.bincount(token_code, minlength=codes).tolist()
    empty = [code for code in range(frequent, codes) if not sizes[code]]
    moved: list[tuple[int, int, int]] = []
    if not empty:
        return token_code, moved
    token_code = token_code.clone()
    weight = torch.zeros(len(token_code)) if weight is None else weight
    for token in weight.argsort(descending=True, stable=True).tolist():
        old = int(token_code[token])
        if old < frequent or sizes[old] < 2:
            continue
        moved.append((empty[len(moved)], token, old))
        sizes[old] -= 1
        token_code[token] = moved[-1][0]
        if len(moved) == len(empty):
            break
    return token_code, moved


def code_floor(
    token_code: Tensor,  # (V,)
    token_counts: Tensor,  # (V,)
    token_bias: bool = True,
) -> float:
    """The least mean loss, in nats a token, that any head with this mapping can have on text of these counts.

    With a bias a token it is `H(token | code) = -sum_v p_v log(p_v / p_code)`, p being the counts' shares: the code may
    be known for certain from the context, the token in it has its share of the counts. Without, the tokens of a code
    are equally probable, and it is `sum_v p_v log n_code`, n the number of tokens in v's code. Both in float64.

    Raises ValueError for counts that are negative, of another shape, or all zero.
    """
    check_counts(token_counts, token_code.shape[0], "the floor")
    counts = token_counts.double()
    total = float(counts.sum())
    if not total:
        raise ValueError("token_counts are all zero: there is no text to have a loss on")
    seen = counts if token_bias else torch.ones_like(counts)
    of_code = counts.new_zeros(int(token_code.max()) + 1).index_add(0, token_code, seen)
    nats = torch.where(counts > 0, counts * (of_code[token_code] / seen).log(), 0.0).sum()
    floor = float(nats) / total
    return floor if math.isfinite(floor) and floor > 0 else 0.0
