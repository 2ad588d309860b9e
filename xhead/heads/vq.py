"""VQ-logits: a vocabulary of V tokens over a codebook of K rows. Source: arXiv 2505.10202; the biases are an addition.

With token v in code M(v):

    logits      o_v = hidden . codebook[M(v)] + b_v
    code bias   B_k = log sum of exp(b_v) over the tokens of code k
    normaliser  lse = log sum_k exp(hidden . codebook[k] + B_k)
    loss        -log p_v = (lse - hidden . codebook[M(v)] - B_M(v)) + (B_M(v) - b_v)

The loss is the cross-entropy of the code plus a number a token: training is cut cross-entropy over K classes, and no
activation has V numbers. With a second code a token, see `xhead.heads.residual_codes`.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xhead.heads import register_head
from xhead.heads.base import Head
from xhead.heads.codes import check_counts, check_mapping, check_none_empty, group_means, make_mapping, revive
from xhead.heads.reassignment import Context, best_codes, nearest_codes, straight_through
from xhead.heads.residual_codes import fit_codebooks, make_residual_mapping, pair_lse
from xhead.heads.vq_config import VQConfig
from xhead.losses.cross_entropy import linear_cross_entropy
from xhead.statistics import check_range

logger = logging.getLogger(__name__)


@register_head("vq", VQConfig)
class VQHead(Head):
    """Logits of V tokens from K codes: see the module's formulas.

    Buffers: `token_code` (V,) the code of each token; `code_weight` (K,) and, with `token_bias="frequency"`,
    `token_weight` (V,) the integers whose logarithms are B and b, exact in any dtype of the model; with
    `residual_size`, `residual_code` (V,), beside the parameter `residual_codebook`.

    Rows of `hidden` that are not finite give NaN.

    Raises ValueError where there are more codes than tokens, or fewer codes than are left beside the frequent tokens.
    """

    def __init__(self, in_features: int, out_features: int, config: VQConfig):
        super().__init__(in_features, out_features)
        codes = config.codebook_size
        if codes > out_features:
            raise ValueError(f"codebook_size must be at most the number of tokens, {out_features}, got {codes}")
        if config.residual_size > out_features:
            raise ValueError(
                f"residual_size must be at most the number of tokens, {out_features}, got {config.residual_size}"
            )
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
        if config.residual_size:
            drawn = torch.empty(config.residual_size, in_features).normal_(std=in_features**-0.5)
            self.residual_codebook = nn.Parameter(drawn)
            self.register_buffer("residual_code", torch.arange(out_features) // codes % config.residual_size)
        self._forwards = 0
        self._context: Context | None = None

    token_code: Tensor
    code_weight: Tensor
    token_weight: Tensor
    residual_code: Tensor

    @property
    def cells(self) -> Tensor:
        """(V,): tokens of one number share all their codes. With one code a token, this is it."""
        size = self.config.residual_size
        return self.token_code * size + self.residual_code if size else self.token_code

    def start_from(
        self,
        projection: nn.Linear,  # weight (V, D)
        *,
        token_counts: Tensor | None = None,  # (V,)
        token_code: Tensor | None = None,  # (V,) int64
        residual_code: Tensor | None = None,  # (V,) int64
    ) -> None:
        """Make the mapping from the projection's rows and the tokens' counts, and the codebook of the rows' means.

        Two codebooks are fitted such that their sums are near the rows, in least squares.

        token_code, residual_code: mappings of one's own, in the place of `start` and `frequent`; the first `frequent`
            codes are those that stay as they are.

        Raises ValueError for a projection that is not finite, for counts that are missing where they are needed, and
        for a mapping out of range or with empty codes; ImportError where k-means is wanted without scikit-learn.
        """
        config, rows = self.config, projection.weight.detach()
        if not bool(rows.isfinite().all()):
            raise ValueError(
                f"the projection has {int((~rows.isfinite()).sum())} weights that are not finite, and no codebook can "
                "be made of its rows; mend or initialise the model first"
            )
        size, residual_size = config.codebook_size, config.residual_size
        if token_code is None:
            token_code = make_mapping(config.start, size, config.frequent, rows, token_counts)
        if residual_code is None and residual_size:
            check_mapping(token_code, self.out_features, size)
            residual_code = make_residual_mapping(
                config.start, token_code.to(rows.device), residual_size, rows, token_counts
            )
        self.remap(token_code, residual_code)
        with torch.no_grad():
            if residual_size:
                found = fit_codebooks(rows, self.token_code, self.residual_code, size, residual_size)
                self.codebook.copy_(found[0])
                self.residual_codebook.copy_(found[1])
            else:
                self.codebook.copy_(group_means(rows.double(), self.token_code, size))
            if config.mapping == "learned":
                self.token_rows.copy_(rows)
            if config.token_bias == "frequency":
                self.token_weight.copy_(check_counts(token_counts, self.out_features, 'token_bias="frequency"'))
            if config.token_bias == "learned":
                self.token_bias.copy_(_first_bias(projection, self.cells, token_counts))
        self._weigh_codes()

    @torch.no_grad()
    def remap(
        self,
        token_code: Tensor,  # (V,) int64
        residual_code: Tensor | None = None,  # (V,) int64
    ) -> None:
        """Put the tokens into these codes; residual codes that are not given stay.

        Raises TypeError or ValueError for what is no mapping to all K codes, or to residual codes that there are.
        """
        check_mapping(token_code, self.out_features, self.config.codebook_size)
        check_none_empty(token_code, self.config.codebook_size)
        if residual_code is not None:
            if not self.config.residual_size:
                raise ValueError("residual_code needs a head with residual_size, which is 0 here")
            check_mapping(residual_code, self.out_features, self.config.residual_size, "residual_code")
            self.residual_code.copy_(residual_code)
        self.token_code.copy_(token_code)
        self._weigh_codes()

    def _weigh_codes(self) -> None:
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
        """(..., V): the logits o_v. K dot products a row and a gather; with two codes, also S and another gather."""
        logits = F.linear(hidden, self.codebook.to(hidden.dtype)).index_select(-1, self.token_code)
        if self.config.residual_size:
            residual = F.linear(hidden, self.residual_codebook.to(hidden.dtype))
            logits = logits + residual.index_select(-1, self.residual_code)
        token_bias = self._token_bias(torch.promote_types(hidden.dtype, torch.float32))
        return logits if token_bias is None else (logits + token_bias).to(logits.dtype)

    def log_probabilities(self, hidden: Tensor) -> Tensor:  # (..., D)
        """(..., V): `log p_v`, in float32 (float64 for float64 `hidden`). With one code a token, K are normalised."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        if self.config.residual_size:
            return self.logits(hidden.to(dtype)).log_softmax(-1)
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
        """(n,): `-log p_y` in nats, from K logits a row that are not built either; with two codes, from K + S."""
        check_range("label", labels, self.out_features)
        if self.config.residual_size:
            return self._pair_loss_rows(hidden, labels)
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

    def _pair_loss_rows(self, hidden: Tensor, labels: Tensor) -> Tensor:  # (n, D), (n,) int64
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wide = hidden.to(dtype)
        first, second = F.linear(wide, self.codebook.to(dtype)), F.linear(wide, self.residual_codebook.to(dtype))
        lse = pair_lse(first, second, self.token_code, self.residual_code, self._token_bias(dtype))
        target = first.gather(-1, self.token_code[labels, None]) + second.gather(-1, self.residual_code[labels, None])
        token_bias = self._token_bias(dtype, labels)
        rows = lse - target.squeeze(-1)
        return rows if token_bias is None else rows - token_bias

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
    cells: Tensor,  # (V,)
    token_counts: Tensor | None,  # (V,)
) -> Tensor:  # (V,)
    """The projection's own biases, and what a token's log-count is above the mean of its cell's.

    The cell's mean is left to the codebook: where the projection is trained, its rows hold it already.
    """
    bias = torch.zeros_like(cells, dtype=torch.float64)
    if token_counts is not None:
        log_counts = check_counts(token_counts, len(cells), "token_bias").to(cells.device).log()
        bias = log_counts - group_means(log_counts[:, None], cells, int(cells.max()) + 1)[cells, 0]
    return bias if projection.bias is None else bias + projection.bias.double()
