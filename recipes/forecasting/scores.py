"""Scores of a forecaster: likelihood of what followed, sampled paths against it, smoothness."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import set_seed

from recipes.forecasting.smoothness import smoothness
from recipes.forecasting.windows import MISSING, ValueTokens, Windows

LEVELS = tuple(level / 10 for level in range(1, 10))
SCORES = {"nll": "NLL", "wql": "WQL", "mase": "MASE", "smoothness": "smoothness"}


class Forecast(NamedTuple):
    """What is scored, and drawn."""

    scores: dict[str, float]
    paths: Tensor  # (n, samples, horizon)


def quantile_loss(paths: Tensor, truth: Tensor) -> float:
    """The mean over the levels 0.1 .. 0.9 of `2 sum pinball / sum |y|`, over (n, samples, horizon) and (n, horizon)."""
    seen = ~truth.isnan()
    quantiles = torch.quantile(paths, torch.tensor(LEVELS, dtype=paths.dtype), dim=1)  # (levels, n, horizon)
    levels = torch.tensor(LEVELS, dtype=paths.dtype)[:, None, None]
    over = truth - quantiles
    pinball = torch.maximum(levels * over, (levels - 1) * over)[:, seen].sum(-1)
    return float((2 * pinball / truth[seen].abs().sum()).mean())


def scaled_error(paths: Tensor, truth: Tensor, context: Tensor, season: int) -> float:
    """MASE: the median path's mean absolute error, by that of repeating the season within the context (n, context)."""
    error = (paths.median(1).values - truth).abs().nanmean(-1)
    naive = (context[:, season:] - context[:, :-season]).abs().nanmean(-1)
    ratio = error / naive
    return float(ratio[ratio.isfinite()].mean())


@torch.no_grad()
def forecast(
    model: Any, windows: Windows, tokens: ValueTokens, context: int, season: int, samples: int, batch_size: int
) -> Forecast:
    """Score a model on windows; the paths are drawn with a fixed seed."""
    model.eval()
    set_seed(0)
    log_likelihood, rough, count, paths = 0.0, 0.0, 0, []
    for start in range(0, len(windows.tokens), batch_size):
        ids = windows.tokens[start : start + batch_size].to(model.device)
        logits = model(input_ids=ids).logits[:, context - 1 : -1].float()
        # A distribution over values: a missing one is not forecast.
        log_probs = logits[..., slice(*tokens.token_range)].log_softmax(-1).cpu()
        labels = ids[:, context:].cpu()
        seen = labels != MISSING
        log_likelihood += log_probs[seen].gather(-1, labels[seen][:, None] - 1).sum().item()
        rough += smoothness(log_probs[seen].exp()).sum().item()
        count += int(seen.sum())
        drawn = model.generate(
            input_ids=ids[:, :context],
            attention_mask=torch.ones_like(ids[:, :context]),
            max_new_tokens=ids.shape[1] - context,
            do_sample=True,
            top_k=0,
            num_return_sequences=samples,
            suppress_tokens=[MISSING],
            pad_token_id=MISSING,
        )
        values = tokens.decode(drawn[:, context:].cpu().double()).unflatten(0, (-1, samples))
        paths.append(values * windows.scale[start : start + batch_size, None, None])
    found = torch.cat(paths)
    truth, past = windows.values[:, context:], windows.values[:, :context]
    scores = {
        "nll": -log_likelihood / count,
        "wql": quantile_loss(found, truth),
        "mase": scaled_error(found, truth, past, season),
        "smoothness": rough / count,
    }
    return Forecast(scores, found)
