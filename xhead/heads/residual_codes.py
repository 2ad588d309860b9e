"""Two codes a token: a second codebook whose rows are added to those of the first.

With token v in code M(v) of K and in residual code R(v) of S:

    logits      o_v = hidden . codebook[M(v)] + hidden . residual_codebook[R(v)] + b_v
    cells       W_ks = sum of exp(b_v) over the tokens of code k and residual code s, 0 where there are none
    normaliser  sum_v exp(o_v) = sum_ks e_k W_ks f_s,    e = exp(codebook hidden), f = exp(residual_codebook hidden)

The sum over the tokens is a bilinear form in K and S numbers: exact, K x S multiplications a row where a projection has
V x D, and no row has V numbers.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from xhead.heads.codes import check_counts, cluster, group_means

_FITTING_ROUNDS = 10
_ROWS_AT_ONCE = 16


def pair_lse(
    first: Tensor,  # (n, K)
    second: Tensor,  # (n, S)
    token_code: Tensor,  # (V,)
    residual_code: Tensor,  # (V,)
    token_bias: Tensor | None,  # (V,)
) -> Tensor:  # (n,)
    """`log sum_v exp(first[M(v)] + second[R(v)] + b_v)` of each row, with n x (K + S) numbers and K x S cells.

    e and f are taken relative to their largest entry. Where those two meet in no cell, and what does meet is smaller by
    more than the dtype holds (57 nats in float32, 637 in float64), the row is summed token by token instead, a few rows
    at a time. A compiled graph cannot set rows apart: it sums in float64, and what this does not hold either is NaN.
    """
    codes, residual_codes = first.shape[-1], second.shape[-1]
    bias = first.new_zeros(len(token_code)) if token_bias is None else token_bias
    largest_bias = bias.detach().amax()
    weight = first.new_zeros(codes * residual_codes)
    weight = weight.index_add(0, token_code * residual_codes + residual_code, (bias - largest_bias).exp())
    compiling = torch.compiler.is_compiling()
    dtype = torch.float64 if compiling else first.dtype
    top, residual_top = (each.detach().amax(-1, keepdim=True) for each in (first, second))
    sums = (first - top).to(dtype).exp() @ weight.view(codes, residual_codes).to(dtype)
    total = (sums * (second - residual_top).to(dtype).exp()).sum(-1)
    limits = torch.finfo(dtype)
    lost = total < limits.tiny / limits.eps**2
    logs = total.masked_fill(lost, torch.nan if compiling else 1.0).log().to(first.dtype)
    lse = logs + (top + residual_top).squeeze(-1) + largest_bias
    if compiling or not lost.any():
        return lse
    rows = lost.nonzero().squeeze(1)
    exact = [
        checkpoint(_lse_of_tokens, first[some], second[some], token_code, residual_code, bias, use_reentrant=False)
        for some in rows.split(_ROWS_AT_ONCE)
    ]
    return lse.index_put((rows,), torch.cat(exact))  # type: ignore[arg-type]


def _lse_of_tokens(
    first: Tensor,  # (n, K)
    second: Tensor,  # (n, S)
    token_code: Tensor,  # (V,)
    residual_code: Tensor,  # (V,)
    bias: Tensor,  # (V,)
) -> Tensor:  # (n,)
    return (first[:, token_code] + second[:, residual_code] + bias).logsumexp(-1)


def make_residual_mapping(
    start: str,
    token_code: Tensor,  # (V,)
    residual_codes: int,
    rows: Tensor,  # (V, D)
    token_counts: Tensor | None,  # (V,)
) -> Tensor:  # (V,)
    """A second code for each token, such that tokens of one code differ in it as long as there are codes left.

    Within a code the tokens choose in turn, the most frequent first (without counts: by id), among the residual codes
    that the fewest have chosen: the nearest to the token's row less its code's mean, where `start` is `"kmeans"` and
    the residual codes are the means that this finds among all tokens; otherwise any, at random.

    Raises ImportError where k-means is wanted without scikit-learn.
    """
    tokens = len(token_code)
    order = torch.arange(tokens, device=token_code.device)
    if token_counts is not None:
        counts = check_counts(token_counts, tokens, "residual_size").to(token_code.device)
        order = counts.argsort(descending=True, stable=True)
    sizes = torch.bincount(token_code)
    residuals = rows.double() - group_means(rows.double(), token_code, len(sizes))[token_code]
    centres = None
    if start == "kmeans":
        several = residuals[sizes[token_code] > 1]
        found = cluster(several, min(residual_codes, len(several)))
        centres = group_means(several, found, residual_codes)
    members = order[token_code[order].argsort(stable=True)].split(sizes.tolist())
    result = torch.empty_like(token_code)
    for some in members:
        shape = (len(some), residual_codes)
        distances = torch.rand(shape) if centres is None else torch.cdist(residuals[some], centres).cpu()
        result[some] = torch.from_numpy(_choose_in_turn(distances.numpy())).to(result.device)
    return result


def _choose_in_turn(distances: np.ndarray) -> np.ndarray:  # (n, S) -> (n,)
    """Each row in turn takes the nearest of the columns that the fewest rows have taken."""
    taken = np.zeros(distances.shape[1])
    chosen = np.empty(len(distances), np.int64)
    for row, distance in enumerate(distances):
        chosen[row] = np.where(taken == taken.min(), distance, np.inf).argmin()
        taken[chosen[row]] += 1
    return chosen


def fit_codebooks(
    rows: Tensor,  # (V, D)
    token_code: Tensor,  # (V,)
    residual_code: Tensor,  # (V,)
    codes: int,
    residual_codes: int,
) -> tuple[Tensor, Tensor]:
    """(K, D) and (S, D) float64 codebooks whose sums are near the rows: least squares, by turns, from the codes' means.

    A residual code without tokens gets a row of zeros.
    """
    rows = rows.double()
    residual_codebook = rows.new_zeros(residual_codes, rows.shape[1])
    for _ in range(_FITTING_ROUNDS):
        codebook = group_means(rows - residual_codebook[residual_code], token_code, codes)
        residual_codebook = group_means(rows - codebook[token_code], residual_code, residual_codes)
    return group_means(rows - residual_codebook[residual_code], token_code, codes), residual_codebook
