"""Log-probabilities and entropies of tokens, and the preference and policy losses that are made of them.

The losses are plain functions of log-probabilities in nats and return one number a pair or sequence, so that `.mean()`
of them is the published loss. Nothing is shifted here: pair `logits[:, :-1]` with `labels[:, 1:]`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xhead.lazy import LazyLogits
from xhead.losses.config import check_lazy


def token_logprobs(
    logits: LazyLogits,  # (..., V)
    labels: Tensor,  # (...)
    *,
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """`log softmax(logits)[label]`, differentiable: (...), float32 (float64 for float64), 0 where ignored.

    Args:
        options: of `LazyLogits.statistics`, such as `filter_eps`, `engine`.

    Raises ValueError for labels of another shape than the rows, IndexError for one out of range.
    """
    check_lazy(logits)
    counted = labels != ignore_index
    found: Any = logits.statistics("lse", "target", target=labels, row_mask=counted, **options)
    return torch.where(counted, found.target - found.lse, 0.0)


def token_entropy(
    logits: LazyLogits,  # (..., V)
    mask: Tensor | None = None,  # (...) bool
    **options: Any,
) -> Tensor:
    """`-sum_k p_k log p_k` with `p = softmax(logits)`, in nats, differentiable: (...), 0 where the mask is False.

    Args:
        options: of `LazyLogits.statistics`, such as `engine`.
    """
    check_lazy(logits)
    found: Any = logits.statistics("entropy", **({} if mask is None else {"row_mask": mask}), **options)
    return found.entropy


def sequence_logprobs(
    logprobs: Tensor,  # (..., T)
    mask: Tensor,  # (..., T) bool
    *,
    average: bool = False,
) -> Tensor:
    """Sum of a sequence's token log-probabilities where the mask is True, or their average (0 of none): (...).

    The mask of labels is `labels != ignore_index`. `dpo`, `ipo` and `kto` want sums, `orpo` and `simpo` averages.
    """
    _check_mask(mask, logprobs)
    total = torch.where(mask, logprobs, 0.0).sum(-1)
    return total / mask.sum(-1).clamp(min=1) if average else total


def dpo(
    chosen: Tensor,  # (n,)
    rejected: Tensor,  # (n,)
    reference_chosen: Tensor,  # (n,)
    reference_rejected: Tensor,  # (n,)
    *,
    beta: float = 0.1,
) -> Tensor:
    """Direct preference optimisation: `-log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected)))`: (n,).

    Arguments are summed log-probabilities of the answers, under the policy and under the reference.

    Source: arXiv 2305.18290.
    """
    return -F.logsigmoid(beta * _margin(chosen, rejected, reference_chosen, reference_rejected))


def ipo(
    chosen: Tensor,  # (n,)
    rejected: Tensor,  # (n,)
    reference_chosen: Tensor,  # (n,)
    reference_rejected: Tensor,  # (n,)
    *,
    beta: float = 0.1,
) -> Tensor:
    """Identity preference optimisation: `((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 beta))^2`: (n,).

    Arguments are summed log-probabilities of the answers, under the policy and under the reference.

    Source: arXiv 2310.12036, where beta is called tau.
    """
    return (_margin(chosen, rejected, reference_chosen, reference_rejected) - 1 / (2 * beta)).square()


def orpo(
    chosen: Tensor,  # (n,)
    rejected: Tensor,  # (n,)
    *,
    weight: float = 0.1,
) -> Tensor:
    """Odds ratio preference optimisation: `-chosen - weight log sigmoid(log odds(chosen) - log odds(rejected))`: (n,).

    Arguments are average log-probabilities a token, below 0; `log odds(x) = x - log(1 - exp(x))`. The first term is the
    cross-entropy of the chosen answer.

    Source: arXiv 2403.07691, where the weight is called lambda.
    """
    odds_ratio = (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))
    return -chosen - weight * F.logsigmoid(odds_ratio)


def simpo(
    chosen: Tensor,  # (n,)
    rejected: Tensor,  # (n,)
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> Tensor:
    """Simple preference optimisation: `-log sigmoid(beta (chosen - rejected) - gamma)`: (n,).

    Arguments are average log-probabilities a token; there is no reference.

    Source: arXiv 2405.14734.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def kto(
    logprobs: Tensor,  # (n,)
    reference: Tensor,  # (n,)
    desirable: Tensor,  # (n,) bool
    kl: Tensor,  # ()
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation, of single answers that are desirable or not: (n,).

    With `r = logprobs - reference`, `w_D (1 - sigmoid(beta (r - z)))` for a desirable answer and
    `w_U (1 - sigmoid(beta (z - r)))` for another; `z = max(kl, 0)` has no gradient.

    Args:
        logprobs, reference: summed log-probabilities of the answers, under the policy and under the reference.
        kl: estimate of KL(policy || reference): the mean over the batch of `logprobs - reference` of answers paired
            with other prompts.

    Source: arXiv 2402.01306.
    """
    _check_mask(desirable, logprobs)
    gain = beta * (logprobs - reference - kl.detach().clamp(min=0))
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(gain.dtype)
    return weight * torch.sigmoid(torch.where(desirable, -gain, gain))


def group_advantages(
    rewards: Tensor,  # (groups, G)
    *,
    eps: float = 1e-4,
) -> Tensor:
    """`(reward - mean) / (deviation + eps)` within each group of G answers to one prompt: (groups, G).

    Source: arXiv 2402.03300, where eps is 0.
    """
    return (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + eps)


def grpo(
    logprobs: Tensor,  # (n, T)
    advantages: Tensor,  # (n,)
    mask: Tensor,  # (n, T) bool
    *,
    old: Tensor | None = None,  # (n, T)
    reference: Tensor | None = None,  # (n, T)
    clip: float = 0.2,
    beta: float = 0.04,
) -> Tensor:
    """Group relative policy optimisation, a sequence's mean over the tokens where the mask is True: (n,).

    A token's loss is `-min(ratio A, clamp(ratio, 1 - clip, 1 + clip) A) + beta (exp(d) - d - 1)`, with
    `ratio = exp(logprobs - old)` and `d = reference - logprobs`; without a reference there is no second term.

    Args:
        advantages: A, one a sequence: `group_advantages(rewards).flatten()`.
        old: log-probabilities under the policy that drew the answers; None for the policy itself.

    Source: arXiv 2402.03300.
    """
    _check_mask(mask, logprobs)
    if advantages.shape != logprobs.shape[:-1]:
        raise RuntimeError(
            f"advantages must have shape {tuple(logprobs.shape[:-1])}, one a sequence, got {tuple(advantages.shape)}"
        )
    old = logprobs.detach() if old is None else old
    # What lies outside the mask may be anything: it must not reach an exponential.
    ratio = torch.where(mask, logprobs - old, 0.0).exp()
    advantage = advantages[..., None]
    tokens = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    if reference is not None:
        difference = torch.where(mask, reference - logprobs, 0.0)
        tokens = tokens + beta * (torch.expm1(difference) - difference)
    return sequence_logprobs(tokens, mask, average=True)


def _margin(chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
    return (chosen - reference_chosen) - (rejected - reference_rejected)


def _check_mask(mask: Tensor, values: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != values.shape:
        raise RuntimeError(
            f"the mask must be torch.bool of shape {tuple(values.shape)}, got {mask.dtype} of {tuple(mask.shape)}; "
            "for labels, it is labels != ignore_index"
        )
