"""Mappings that change while a codebook is trained: which code each token would be best put into.

No gradient reaches a choice of code, and arXiv 2505.10202 gives no procedure. Two are here, both derived from the loss.
"""

from typing import Any

import torch
from torch import Tensor

_TOKENS_AT_ONCE = 4096
_ROWS_FOR_MASS = 1024


class Context:
    """What the hidden states of the last training forwards say about each token: sums of V x D and K numbers.

    hidden_sum: (V, D), of the hidden states whose label is v. counts: (V,), how many these are.
    mass: (K,), `sum_i exp(hidden_i . codebook[k] - lse_i)`, estimated from the first 1,024 rows of each forward.
    """

    def __init__(self, tokens: int, codebook: Tensor):
        codes, width = codebook.shape
        dtype = torch.promote_types(codebook.dtype, torch.float32)
        self.hidden_sum = torch.zeros(tokens, width, dtype=dtype, device=codebook.device)
        self.counts = torch.zeros(tokens, dtype=dtype, device=codebook.device)
        self.mass = torch.zeros(codes, dtype=dtype, device=codebook.device)

    @torch.no_grad()
    def add(
        self,
        hidden: Tensor,  # (n, D)
        labels: Tensor,  # (n,)
        lse: Tensor,  # (n,)
        codebook: Tensor,  # (K, D)
    ) -> None:
        if not len(labels):
            return
        dtype = self.mass.dtype
        self.hidden_sum.index_add_(0, labels, hidden.to(dtype))
        self.counts.index_add_(0, labels, torch.ones_like(labels, dtype=dtype))
        some = slice(_ROWS_FOR_MASS)
        logits = hidden[some].to(dtype) @ codebook.to(dtype).T
        self.mass += (logits - lse[some, None]).exp().sum(0) * (len(labels) / len(logits))

    def reduce(self) -> None:
        """Sum over the processes of a distributed training, so that all come to the same mapping."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for total in (self.hidden_sum, self.counts, self.mass):
                torch.distributed.all_reduce(total)


@torch.no_grad()
def best_codes(
    context: Context,
    codebook: Tensor,  # (K, D)
    token_bias: Tensor | None,  # (V,)
    token_code: Tensor,  # (V,)
    frequent: int,
) -> Tensor:  # (V,)
    """The code in which each token's own part of the log-likelihood is largest, the other tokens staying as they are.

    In code k, token v adds `hidden_sum[v] . codebook[k] - exp(b_v) mass[k]` to it: what the rows that it labels gain,
    less what it takes from all rows, to first order in its own probability. Tokens that have not been seen stay, as do
    the first `frequent` codes.
    """
    dtype = context.mass.dtype
    candidates = codebook[frequent:].to(dtype)
    mass = context.mass[frequent:]
    result = token_code.clone()
    movable = ((token_code >= frequent) & (context.counts > 0)).nonzero().squeeze(1)
    for tokens in movable.split(_TOKENS_AT_ONCE):
        factor: Any = 1.0 if token_bias is None else token_bias[tokens].to(dtype).exp()[:, None]
        gain = context.hidden_sum[tokens] @ candidates.T - factor * mass
        result[tokens] = gain.argmax(-1) + frequent
    return result


@torch.no_grad()
def nearest_codes(
    rows: Tensor,  # (V, D)
    codebook: Tensor,  # (K, D)
    token_code: Tensor,  # (V,)
    frequent: int,
) -> Tensor:  # (V,)
    """The code nearest to each token's row in the 2-norm; the first `frequent` codes stay as they are."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    candidates = codebook[frequent:].to(dtype)
    half_squares = candidates.square().sum(-1) / 2
    result = token_code.clone()
    for tokens in (token_code >= frequent).nonzero().squeeze(1).split(_TOKENS_AT_ONCE):
        result[tokens] = (rows[tokens].to(dtype) @ candidates.T - half_squares).argmax(-1) + frequent
    return result


def straight_through(
    hidden: Tensor,  # (n, D)
    labels: Tensor,  # (n,)
    token_rows: Tensor,  # (V, D)
    token_code: Tensor,  # (V,)
    within: Tensor | None,  # (V,)
    codes: int,
) -> tuple[Tensor, Tensor]:
    """(K, D) and (n,), zeros whose gradients for `token_rows` are those of rows used in the codes' place.

    With pi_v the share of token v in its code, `within` its logarithm (None: equal shares) and P the probabilities, the
    gradient of the loss for token v's row is `sum_i P_i(v) hidden_i`, less the hidden states that v labels. P_i(v) is
    `P_i(code) pi_v`, so the first part is that of the code's mean row `sum_v pi_v row_v` in the place of its
    codebook row, and no number of row and token is needed.
    """
    if within is None:
        share = (1 / torch.bincount(token_code, minlength=codes).to(hidden.dtype))[token_code]
    else:
        share = within.detach().exp().to(hidden.dtype)
    rows = token_rows.to(hidden.dtype)
    means = rows.new_zeros(codes, rows.shape[1]).index_add(0, token_code, share[:, None] * rows)
    # The loss gives the target's part to the code's mean; it belongs to the target's own row.
    own = (hidden.detach() * (means[token_code[labels]] - rows[labels])).sum(-1)
    return means - means.detach(), own - own.detach()
