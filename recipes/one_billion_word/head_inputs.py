"""Save what the output head of a trained model gets: real hidden states, weight and targets for measuring losses."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from recipes.one_billion_word.packing import PackedSentences
from recipes.one_billion_word.perplexity import hidden_and_targets
from recipes.one_billion_word.scoring import output_head


@torch.no_grad()
def save_head_inputs(model: PreTrainedModel, blocks: PackedSentences, tokens: int, path: Path) -> int:
    """Write a .safetensors file with `hidden` (N, D), `weight` (V, D) and `target` (N,) long; `bias` (V,) if any.

    Args:
        model: a causal language model.
        blocks: where the tokens come from, first blocks first.
        tokens: how many tokens are wanted; all there are, where there are fewer.
        path: the file.

    Returns:
        N, the number of tokens written.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    hidden: list[torch.Tensor] = []
    target: list[torch.Tensor] = []
    collected = 0
    for index in range(len(blocks)):
        if collected >= tokens:
            break
        batch = {name: value[None].to(device) for name, value in blocks[index].items()}
        some_hidden, some_target = hidden_and_targets(model, batch)
        hidden.append(some_hidden.cpu())
        target.append(some_target.cpu())
        collected += len(some_target)
    model.train(was_training)
    head = output_head(model)
    saved = {
        "hidden": torch.cat(hidden)[:tokens].contiguous(),
        "weight": head.weight.detach().cpu().clone().contiguous(),
        "target": torch.cat(target)[:tokens].contiguous(),
    }
    if head.bias is not None:
        saved["bias"] = head.bias.detach().cpu().clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(saved, path, metadata={"format": "pt"})
    return len(saved["target"])
