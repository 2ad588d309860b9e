"""VQ-logits: a vocabulary of V tokens over a codebook of K rows. Source: arXiv 2505.10202; the biases are an addition.

With token v in code M(v):

    logits      o_v = hidden . codebook[M(v)] + b_v
    code bias   B_k = log sum of exp(b_v) over the tokens of code k
    normaliser  lse = log sum_k exp(hidden . codebook[k] + B_k)
    loss        -log p_v = (lse - hidden . codebook[M(v)] - B_M(v)) + (B_M(v) - b_v)

The loss is the cross-entropy of the code plus a number a token: training is cut cross-entropy over K classes, and no
activation has V numbers.
"""

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xhead.heads import register_head
from xhead.heads.base import Head
from xhead.heads.codes import STARTS, check_counts, check_mapping, make_mapping, revive
from xhead.heads.reassignment import Context, best_codes, nearest_codes, straight_through
from xhead.losses.cross_entropy import linear_cross_entropy
from xhead.statistics import check_range

logger = logging.getLogger(__name__)

TOKEN_BIASES = ("none", "frequency", "learned")
MAPPINGS = ("fixed", "reassigned", "learned")


@dataclass(frozen=True)
class VQConfig:
    """Options of the head `"vq"`.

    Args:
        codebook_size: the number of codes K, at most the number of tokens.
        start: how tokens are put into codes: `"kmeans"` (mini-batch k-means of the replaced projection's rows, with
            scikit-learn), `"frequency"` (tokens of like counts together, each code with about the same count) or
            `"random"`. Each row of the codebook starts as the mean of its tokens' rows.
        frequent: so many of the most frequent tokens have a code of their own, for good.
        token_bias: b_v. `"none"` (0: the tokens of a code are equally probable, always), `"frequency"` (the logarithm
            of the token's count plus one) or `"learned"` (V parameters, that start from the counts and from the
            replaced projection's bias, where there are such).
        mapping: `"fixed"`, or every `reassign_every` training forwards anew: `"reassigned"` puts each token where its
            contexts since the last time would have been most probable, `"learned"` next to a row of its own, (V, D)
            parameters that are trained with the gradient of the token's logit (straight-through). Both keep V x D
            numbers while training.
        reassign_every: see `mapping`.
    """

    codebook_size: int
    start: str = "kmeans"
    frequent: int = 0
    token_bias: str = "none"
    mapping: str = "fixed"
    reassign_every: int = 100

    def __post_init__(self) -> None:
        for name, least in (("codebook_size", 1), ("frequent", 0), ("reassign_every", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if self.frequent > self.codebook_size:
            raise ValueError(f"frequent must be at most codebook_size={self.codebook_size}, got {self.frequent}")
        for name, known in (("start", STARTS), ("token_bias", TOKEN_BIASES), ("mapping", MAPPINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


@register_head("vq", VQConfig)
class VQHead(Head):
    """Logits of V tokens from K codes: see the module's formulas.

    Buffers: `token_code` (V,) the code of each token; `code_weight` (K,) and, with `token_bias="frequency"`,
    `token_weight` (V,) the integers whose logarithms are B and b, exact in any dtype of the model.

    Raises ValueError where there are more codes than tokens, or fewer codes than are left beside the frequent tokens.
    """

    def __init__(self, in_features: int, out_features: int, config: VQConfig):
        super().__init__(in_features, out_features)
        codes = config.codebook_size
        if codes > out_features:
            raise ValueError(f"codebook_size must be at most the number of tokens, {out_features}, got {codes}")
        if config.frequent == codes < out_features:
            raise ValueError(
                f"frequent={config.frequent} leaves none of codebook_size={codes} to the other "
                f"{out_features - codes} tokens; it must be smaller"
            )
        self.config = config
        self.codebook = nn.Parameter(torch.empty(codes, in_features).normal_(std=in_features**-0.5))
        token_code = torch.arange(out_features) % codes
        self.register_buffer("token_code", token_code)
        ones = torch.ones(out_features, dtype=torch.int64)
        self.register_buffer("code_weight", ones.new_zeros(codes).index_add(0, token_code, ones))
        if config.token_bias == "frequency":
            self.register_buffer("token_weight", ones)
        if config.token_bias == "learned":
            self.token_bias = nn.Parameter(torch.zeros(out_features))
        if config.mapping == "learned":
            self.token_rows = nn.Parameter(torch.empty(out_features, in_features).normal_(std=in_features**-0.5))
        self._forwards = 0
        self._context: Context | None = None

    token_code: Tensor
    code_weight: Tensor
    token_weight: Tensor

    def start_from(
        self,
        projection: nn.Linear,  # weight (V, D)
        *,
        token_counts: Tensor | None = None,  # (V,)
        token_code: Tensor | None = None,  # (V,) int64
    ) -> None:
        """Make the mapping from the projection's rows and the tokens' counts, and the codebook of the rows' means.

        token_code: a mapping of one's own, in the place of `start` and `frequent`; its first `frequent` codes are those
            that stay as they are.

        Raises ValueError for counts that are missing where they are needed, and for a mapping out of range or with
        empty codes; ImportError where k-means is wanted without scikit-learn.
        """
        config, rows = self.config, projection.weight.detach()
        if token_code is None:
            token_code = make_mapping(config.start, config.codebook_size, config.frequent, rows, token_counts)
        check_mapping(token_code, self.out_features, config.codebook_size)
        token_code = token_code.to(rows.device)
        codes = self.codebook.new_zeros(self.codebook.shape, dtype=torch.float64)
        codes.index_add_(0, token_code, rows.double())
        with torch.no_grad():
            self.codebook.copy_(codes / torch.bincount(token_code)[:, None])
            if config.mapping == "learned":
                self.token_rows.copy_(rows)
            if config.token_bias == "frequency":
                self.token_weight.copy_(check_counts(token_counts, self.out_features, 'token_bias="frequency"'))
            if config.token_bias == "learned":
                self.token_bias.copy_(_first_bias(projection, token_code, token_counts))
        self.remap(token_code)

    @torch.no_grad()
    def remap(self, token_code: Tensor) -> None:  # (V,) int64
        """Put the tokens into these codes. Raises TypeError or ValueError for what is no mapping to all K codes."""
        check_mapping(token_code, self.out_features, self.config.codebook_size)
        self.token_code.copy_(token_code)
        weight = self.token_weight if self.config.token_bias == "frequency" else torch.ones_like(self.token_code)
        self.code_weight.zero_().index_add_(0, self.token_code, weight)

    def _token_bias(self, dtype: torch.dtype, tokens: Tensor | None = None) -> Tensor | None:
        """b of these tokens, or (V,) of all; None where it is 0."""
        if self.config.token_bias == "none":
            return None
        learned = self.config.token_bias == "learned"
        values = self.token_bias if learned else self.token_weight
        chosen = (values if tokens is None else values[tokens]).to(dtype)
        return chosen if learned else chosen.log()

    def _code_bias(self, dtype: torch.dtype) -> Tensor:
        """(K,) B. Its cost has V numbers a call where b is learned, and none otherwise."""
        if self.config.token_bias != "learned":
            return self.code_weight.to(dtype).log()
        token_bias = self.token_bias.to(dtype)
        lowest = token_bias.new_full((self.config.codebook_size,), -torch.inf)
        largest = lowest.scatter_reduce(0, self.token_code, token_bias.detach(), "amax")
        shifted = (token_bias - largest[self.token_code]).exp()
        return torch.zeros_like(lowest).index_add(0, self.token_code, shifted).log() + largest

    def logits(self, hidden: Tensor) -> Tensor:  # (..., D)
        """(..., V): `o_v = hidden . codebook[M(v)] + b_v`. K dot products a row, and one gather."""
        logits = F.linear(hidden, self.codebook.to(hidden.dtype)).index_select(-1, self.token_code)
        token_bias = self._token_bias(torch.promote_types(hidden.dtype, torch.float32))
        return logits if token_bias is None else (logits + token_bias).to(logits.dtype)

    def log_probabilities(self, hidden: Tensor) -> Tensor:  # (..., D)
        """(..., V): `log p_v`, in float32 (float64 for float64 `hidden`). The normaliser is summed over the K codes."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        codes = F.linear(hidden, self.codebook.to(hidden.dtype)).to(dtype)
        codes = codes - (codes + self._code_bias(dtype)).logsumexp(-1, keepdim=True)
        log_p = codes.index_select(-1, self.token_code)
        token_bias = self._token_bias(dtype)
        return log_p if token_bias is None else log_p + token_bias

    def topk(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:  # (..., D)
        """(..., k) log-probabilities and (..., k) tokens, most probable first. Tokens of a tie come in any order."""
        values, tokens = self.log_probabilities(hidden).topk(k, -1)
        return values, tokens

    def loss_rows(self, hidden: Tensor, labels: Tensor) -> Tensor:  # (n, D), (n,) int64
        """(n,): `-log p_y` in nats, from K logits a row that are not built either."""
        check_range("label", labels, self.out_features)
        changing = self.config.mapping != "fixed" and self.training and torch.is_grad_enabled()
        if changing:
            self._count_forward()
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        token_bias, code_bias = self._token_bias(dtype, labels), self._code_bias(dtype)
        # A mapping that changes before this forward's backward must not change what that needs.
        token_code = self.token_code.clone() if changing else self.token_code
        codes = token_code[labels]
        codebook, correction = self.codebook.to(hidden.dtype), None
        if changing and self.config.mapping == "learned":
            of_all = self._token_bias(dtype)
            within = None if of_all is None else of_all - code_bias[token_code]
            size = self.config.codebook_size
            zero, correction = straight_through(hidden, labels, self.token_rows, token_code, within, size)
            codebook = codebook + zero
        rows, lse = linear_cross_entropy(hidden, codebook, codes, bias=code_bias, reduction="none", return_lse=True)
        if changing and self.config.mapping == "reassigned":
            self._context = self._context or Context(self.out_features, self.codebook)
            self._context.add(hidden, labels, lse, codebook)
        rows = rows + (code_bias[codes] if token_bias is None else code_bias[codes] - token_bias)
        return rows if correction is None else rows + correction

    def _count_forward(self) -> None:
        if self._forwards and self._forwards % self.config.reassign_every == 0:
            self.reassign()
        self._forwards += 1

    @torch.no_grad()
    def reassign(self) -> None:
        """Put every token into the code that suits it now, as `config.mapping` says; training does it by itself.

        A code that is left empty is given the most frequent of the tokens that share a code, with the same row of the
        codebook to begin with, and the log says so. Raises RuntimeError for a fixed mapping, and for one that is
        reassigned by contexts where no training forward has been since the last time.
        """
        config, context = self.config, self._context
        if config.mapping == "learned":
            token_code = nearest_codes(self.token_rows, self.codebook, self.token_code, config.frequent)
        elif context is not None:
            context.reduce()
            token_bias = self._token_bias(context.mass.dtype)
            token_code = best_codes(context, self.codebook, token_bias, self.token_code, config.frequent)
        else:
            raise RuntimeError(
                f'mapping="{config.mapping}" has nothing to reassign by; make the head with mapping="reassigned" or '
                '"learned", and train it first'
            )
        weight = self._token_bias(torch.float64) if context is None else context.counts
        token_code, revived = revive(token_code, weight, config.codebook_size, config.frequent)
        for code, token, shared in revived:
            self.codebook[code] = self.token_rows[token] if config.mapping == "learned" else self.codebook[shared]
        if revived:
            logger.warning("%d of %d codes were empty and took a token each", len(revived), config.codebook_size)
        self.remap(token_code)
        self._context = None


def _first_bias(
    projection: nn.Linear,
    token_code: Tensor,  # (V,)
    token_counts: Tensor | None,  # (V,)
) -> Tensor:  # (V,)
    """The projection's own biases, and what a token's log-count is above the mean of its code's.

    The code's mean is left to the codebook: where the projection is trained, its rows hold it already.
    """
    bias = torch.zeros_like(token_code, dtype=torch.float64)
    if token_counts is not None:
        log_counts = check_counts(token_counts, len(token_code), "token_bias").to(token_code.device).log()
        sizes = torch.bincount(token_code)
        means = torch.zeros_like(sizes, dtype=torch.float64).index_add(0, token_code, log_counts) / sizes
        bias = log_counts - means[token_code]
    return bias if projection.bias is None else bias + projection.bias.double()
