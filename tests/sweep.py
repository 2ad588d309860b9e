"""Patch a tiny random model of every class in four auto-mappings; compare loss and gradients with the stock model.

`python -m tests.sweep` runs all of them, two at a time, each in a process of its own, and prints the counts.
"""

import argparse
import copy
import json
import multiprocessing
import os
import resource
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

MAPPINGS = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
LARGEST = 30_000_000
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 2e-4
KINDS = ("fused", "dense", "wrong", "refused", "not built", "crashed")


def classes() -> list[str]:
    """The names of the distinct model classes in the four mappings."""
    from transformers.models.auto import modeling_auto

    names: dict[str, None] = {}
    for mapping in MAPPINGS:
        for value in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            for name in (value,) if isinstance(value, str) else value:
                names[name] = None
    return list(names)


def build(name: str) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """A tiny random model of the class that its stock forward runs for, the inputs, and the loss; gradients taken.

    In evaluation mode (no dropout). Raises RuntimeError, with what went wrong, where none can be built.
    """
    import transformers

    from tests.shrink import SIZES, shrink

    cls = getattr(transformers, name)
    failures = []
    for size in SIZES:
        try:
            config = shrink(cls.config_class(), size)
            with torch.device("meta"):
                parameters = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
            if parameters > LARGEST:
                raise ValueError(f"{parameters:,} parameters after shrinking")
            torch.manual_seed(0)
            model = cls(config).float().eval()
            return model, *stock(model)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}"[:200])
    raise RuntimeError(" | ".join(dict.fromkeys(failures)))


def inputs(model: Any) -> Iterable[dict[str, Any]]:
    """Inputs worth trying, in turn: what a class needs besides token ids is found by whether its stock forward runs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 60, (2, 12), generator=generator)
    labels = ids.clone()
    labels[:, :3] = -100
    mask = torch.ones_like(ids)
    text = {"input_ids": ids, "labels": labels}
    yield text
    yield {**text, "attention_mask": mask}
    yield {**text, "use_cache": False}
    yield {**text, "attention_mask": mask, "decoder_input_ids": ids}
    yield {**text, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}
    yield {**text, "position_ids": torch.arange(12).expand(2, -1), "attention_mask": mask}
    config = model.config
    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    size = getattr(vision, "image_size", 32)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    pixels = torch.randn(2, getattr(vision, "num_channels", 3), height, width, generator=generator)
    yield {"pixel_values": pixels, "labels": labels}
    yield {**text, "pixel_values": pixels}
    yield {**text, "pixel_values": pixels, "attention_mask": mask}
    yield {**text, "bbox": torch.zeros(2, 12, 4, dtype=torch.long)}
    mels = getattr(config, "num_mel_bins", None) or 80
    frames = 2 * getattr(config, "max_source_positions", 64)
    yield {"input_features": torch.randn(2, mels, frames, generator=generator), "labels": labels}
    yield {"input_values": torch.randn(2, 4000, generator=generator), "labels": labels}
    yield {"flattened_patches": torch.randn(2, 16, 770, generator=generator), "labels": labels}


def run(model: Any, batch: dict[str, Any]) -> Any:
    torch.manual_seed(2)
    return model(**batch)


def stock(model: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """The first inputs that the stock model takes, and its loss with the gradients taken."""
    failures = []
    for batch in inputs(model):
        try:
            loss = run(model, batch).loss
            if loss is not None and loss.requires_grad and torch.isfinite(loss):
                loss.backward()
                return batch, loss.detach()
            failures.append("no finite loss")
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}"[:120])
        model.zero_grad(set_to_none=True)
    raise RuntimeError("; ".join(dict.fromkeys(failures)))


def compare(name: str, spoil: float = 1.0) -> tuple[str, str]:
    """`(kind, why)` of a class. `spoil` multiplies the patched logits, to see that an error is found."""
    import xhead

    try:
        plain, batch, stock_loss = build(name)
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}"[:300]
    # Some classes keep tensors of the last forward, which cannot be copied: hence no copy of the model.
    model = type(plain)(copy.deepcopy(plain.config)).float().eval()
    model.load_state_dict(plain.state_dict())
    try:
        xhead.patch(model)
    except (TypeError, ValueError) as error:
        return "refused", str(error)[:300]
    if spoil != 1.0:
        model.get_output_embeddings().register_forward_hook(
            lambda module, args, out: out * spoil if isinstance(out, xhead.LazyLogits) else out
        )
    try:
        loss = run(model, batch).loss
    except RuntimeError as error:
        if "the patch has no part in it" not in str(error):
            raise
        return "refused", str(error)[:300]
    loss.backward()
    loss = loss.detach()
    status = xhead.status(model)
    error = float((loss - stock_loss).abs() / stock_loss.abs().clamp(min=1e-6))
    if not error <= LOSS_TOLERANCE:
        return "wrong", f"loss {float(loss)} for {float(stock_loss)}"
    largest = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for (parameter_name, expected), actual in zip(plain.named_parameters(), model.parameters(), strict=True):
        if (expected.grad is None) != (actual.grad is None):
            return "wrong", f"{parameter_name} has a gradient in one of the two only"
        if expected.grad is None or actual.grad is None:
            continue
        difference = float((expected.grad - actual.grad).abs().max())
        # Near-zero gradients are all rounding: below this floor they are compared with the largest of the model.
        if not difference <= GRADIENT_TOLERANCE * float(expected.grad.abs().max()) + 1e-6 * largest:
            return "wrong", f"gradient of {parameter_name} is off by {difference:.2e}"
    with torch.no_grad():
        try:
            if not torch.equal(run(model, batch).logits, run(plain, batch).logits):
                return "wrong", "logits without gradients are not those of the stock model"
        except AttributeError:
            pass
    if status.cut == 1 and status.materialized == 0:
        return "fused", ""
    return "dense", f"cut {status.cut}, materialized {status.materialized}: {status.operations}"


def _work(name: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    warnings.simplefilter("ignore")
    try:
        result = compare(name)
    except BaseException as error:
        result = "crashed", f"{type(error).__name__}: {error} {traceback.format_exc()[-1500:]}"
    pipe.send(result)


def sweep(
    names: list[str], processes: int = 2, timeout: float = 120.0, report: Any = None
) -> dict[str, tuple[str, str]]:
    """Class name -> `(kind, why)`. Each class runs in a fork of this process, so that none can end the sweep."""
    import transformers  # noqa: F401  imported once, before the forks

    import xhead  # noqa: F401

    context = multiprocessing.get_context("fork")
    waiting, running, results = list(reversed(names)), {}, {}
    while waiting or running:
        while waiting and len(running) < processes:
            name = waiting.pop()
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(name, theirs), daemon=True)
            process.start()
            theirs.close()
            running[mine] = (name, process, time.monotonic())
        ready = set(wait(list(running), timeout=1.0))
        for pipe in list(running):
            name, process, began = running[pipe]
            if pipe in ready:
                try:
                    results[name] = pipe.recv()
                except EOFError:
                    results[name] = ("crashed", f"the process ended with {process.exitcode}")
            elif time.monotonic() - began > timeout:
                results[name] = ("not built", f"no result in {timeout:.0f} s")
            else:
                continue
            del running[pipe]
            process.kill()
            process.join()
            pipe.close()
            if report is not None:
                report(name, *results[name])
    return results


def counts(results: dict[str, tuple[str, str]]) -> str:
    """`fused 257, dense 1, ...`"""
    found = Counter(kind for kind, _ in results.values())
    return ", ".join(f"{kind} {found[kind]}" for kind in KINDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes to try (default: all of the four mappings)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=120.0)
    parser.add_argument("--json", type=Path, help="write the result of each class here")
    arguments = parser.parse_args()

    def report(name: str, kind: str, why: str) -> None:
        print(f"{kind:10s} {name}  {why.splitlines()[0] if why else ''}", flush=True)

    results = sweep(arguments.names or classes(), arguments.processes, arguments.timeout, report)
    if arguments.json:
        found = Counter(kind for kind, _ in results.values())
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "transformers": version("transformers"),
            "torch": version("torch"),
            "counts": {kind: found[kind] for kind in KINDS},
            "classes": results,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    print(counts(results), f"of {len(results)} classes")


if __name__ == "__main__":
    main()
