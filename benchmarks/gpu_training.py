"""A training run with the Triton engine beside one with stock, for `benchmarks.gpu`: do their loss curves agree?"""

import itertools
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cpu import Loss, stock, xhead_loss
from benchmarks.filter_training import Configuration, Text, WordModel, batches, read_text, validation_loss

CONFIGURATION = Configuration("Python's documentation", 8192, 256, 1000, 32, 32, 2e-3, 50, "both")
ALLOWED = 1e-3  # between the curves


def curve(
    loss: Loss, configuration: Configuration, text: Text, device: torch.device, seconds: float
) -> list[list[float]]:
    """[step, exact validation loss] ten times in a run, with a head in bfloat16; fewer where time runs out."""
    end = time.monotonic() + seconds
    torch.manual_seed(0)
    model = WordModel(text.classes, configuration.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=configuration.learning_rate, weight_decay=0.01)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / configuration.warmup, 1.0))
    every, valid = max(configuration.steps // 10, 1), text.valid.to(device)
    found: list[list[float]] = []
    steps = itertools.islice(batches(text.train, configuration, 0), configuration.steps)
    for step, (tokens, target) in enumerate(steps, start=1):
        hidden = model(tokens.to(device)).flatten(0, 1).bfloat16()
        optimizer.zero_grad(set_to_none=True)
        loss(hidden, model.head.weight.bfloat16(), target.flatten().to(device)).backward()
        optimizer.step()
        warmup.step()
        if step % every == 0:
            found.append([step, validation_loss(model, valid, configuration.length)])
            if time.monotonic() > end:
                break
    return found


def compare(device: torch.device, *, smoke: bool, seconds: float) -> dict[str, Any]:
    """Both curves, and how far apart they are at most, as far as both came. smoke: two steps on no text at all"""
    end = time.monotonic() + seconds
    configuration = CONFIGURATION
    if smoke:
        configuration = replace(configuration, width=16, steps=2, batch=2, length=8)
        text = Text(torch.arange(2000) % 300, torch.arange(60) % 300, 300)
    else:
        text = read_text(None, configuration.classes)
    losses = {"stock": stock, "xhead": xhead_loss(engine="triton")}
    curves = {}
    for left, (name, loss) in zip((2, 1), losses.items(), strict=True):
        curves[name] = curve(loss, configuration, text, device, (end - time.monotonic()) / left)
    pairs = zip(curves["stock"], curves["xhead"], strict=False)
    apart = max((abs(a[1] - b[1]) for a, b in pairs), default=None)
    return {"configuration": vars(configuration), **curves, "apart": apart}
