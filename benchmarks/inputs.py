"""Inputs of a vocabulary loss: from a trained model's file, made like a trained model's, or as at initialisation."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import power_of_two


@dataclass(frozen=True)
class HeadInputs:
    """What a vocabulary loss reads, and where it comes from."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    target: Tensor  # (N,)
    source: str

    @property
    def shape(self) -> dict[str, int]:
        return {"N": self.hidden.shape[0], "V": self.weight.shape[0], "D": self.hidden.shape[1]}


@dataclass(frozen=True)
class Softmax:
    """How concentrated the softmax of some inputs is: averages over rows."""

    kept_share: dict[str, float]  # of the entries, those with p >= the threshold
    kept_mass: dict[str, float]  # their share of the probability
    entropy: float  # nats
    perplexity: float  # of the targets


def load(path: str | Path, rows: int | None = None) -> HeadInputs:
    """Read `hidden (N, D)`, `weight (V, D)` and `target (N,)` from a .safetensors file; the first `rows` rows.

    Raises:
        ValueError: a tensor is missing, or there are fewer rows than asked for.
    """
    from safetensors.torch import load_file

    tensors = load_file(path)
    missing = [name for name in ("hidden", "weight", "target") if name not in tensors]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(sorted(tensors))}")
    if tensors.get("bias") is not None:
        raise ValueError(f"{path} holds a bias, which these benchmarks do not measure; save the head without one")
    hidden, target = tensors["hidden"], tensors["target"].long()
    if rows is not None:
        if hidden.shape[0] < rows:
            raise ValueError(
                f"{path} has {hidden.shape[0]} rows, fewer than the {rows} asked for; use a smaller --rows"
            )
        hidden, target = hidden[:rows], target[:rows]
    return HeadInputs(hidden.contiguous(), tensors["weight"].contiguous(), target, f"file {Path(path).name}")


def random_initialisation(
    rows: int, classes: int, width: int, *, seed: int = 0, device: torch.device | str = "cpu"
) -> HeadInputs:
    """As a model computes before its first step: hidden states of a layer norm, weights of deviation 0.02."""
    generator = torch.Generator(device).manual_seed(seed)
    options: Any = {"generator": generator, "device": device}
    hidden = torch.nn.functional.layer_norm(torch.randn(rows, width, **options), (width,))
    weight = torch.randn(classes, width, **options) * 0.02
    target = torch.randint(classes, (rows,), **options)
    return HeadInputs(hidden, weight, target, "random initialisation")


def trained_like(
    rows: int,
    classes: int,
    width: int,
    *,
    kept_share: float = 0.005,
    threshold: float = 2.0**-12,
    clusters: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> HeadInputs:
    """Synthetic inputs whose softmax has a given share of entries at or above a threshold.

    Logits are a Zipf distribution over the classes, in frequency order, plus a term of the row's own: hidden states lie
    in clusters (contexts that want similar words), and rows differ in how sure they are. The size of that term is
    found by bisection. Targets are drawn from the softmax itself, as a calibrated model's would be. With V 50,257 and
    D 768, a share of 0.005 goes with a perplexity of 76 and leaves 12 % of the probability below 2^-12; 0.003 with 20
    and 6 %.

    Raises:
        ValueError: a kept share that no such inputs have.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    # One direction of the space carries the log-frequency of a class; the others its meaning.
    frequency = -torch.log(torch.arange(classes, device=device) + 2.7)
    frequency -= frequency.mean()
    meaning = normal(classes, width - 1) / math.sqrt(width - 1)
    weight = torch.cat([frequency[:, None] / math.sqrt(width), meaning], dim=1)

    centres = normal(clusters, width - 1)
    cluster = torch.randint(clusters, (rows,), generator=generator, device=device)
    context = 0.8 * centres[cluster] + 0.6 * normal(rows, width - 1)
    sureness = torch.exp(0.35 * normal(rows, 1))

    def hidden_states(strength: float, count: int) -> Tensor:
        own = strength * sureness[:count] * context[:count]
        return torch.cat([torch.full((count, 1), math.sqrt(width), device=device), own], dim=1)

    def share(strength: float) -> float:
        hidden = hidden_states(strength, min(rows, 256))
        return (torch.softmax(hidden @ weight.T, dim=1) >= threshold).float().mean().item()

    low, high = 0.0, 8.0
    if not share(high) < kept_share < share(low):
        raise ValueError(
            f"kept_share must lie between {share(high):.2g} and {share(low):.2g} at this shape, got {kept_share}"
        )
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) > kept_share else (low, middle)
    hidden = hidden_states((low + high) / 2, rows)
    target = torch.empty(rows, dtype=torch.long, device=device)
    for start in range(0, rows, 256):
        p = torch.softmax(hidden[start : start + 256] @ weight.T, dim=1)
        target[start : start + 256] = torch.multinomial(p, 1, generator=generator)[:, 0]
    return HeadInputs(hidden, weight, target, "synthetic, like a trained model")


def softmax_of(inputs: HeadInputs, thresholds: tuple[float, ...] = (2.0**-12,), block: int = 256) -> Softmax:
    """Measure the softmax of the inputs in float64, a block of rows at a time."""
    weight = inputs.weight.double()
    kept, mass = dict.fromkeys(thresholds, 0.0), dict.fromkeys(thresholds, 0.0)
    entropy = loss = 0.0
    for start in range(0, inputs.hidden.shape[0], block):
        logp = torch.log_softmax(inputs.hidden[start : start + block].double() @ weight.T, dim=1)
        p = logp.exp()
        loss -= logp.gather(1, inputs.target[start : start + block, None].to(logp.device)).sum().item()
        entropy -= (p * logp).sum().item()
        for threshold in thresholds:
            above = p >= threshold
            kept[threshold] += above.sum().item()
            mass[threshold] += p[above].sum().item()
    n, v = inputs.hidden.shape[0], inputs.weight.shape[0]
    return Softmax(
        kept_share={power_of_two(threshold): count / (n * v) for threshold, count in kept.items()},
        kept_mass={power_of_two(threshold): total / n for threshold, total in mass.items()},
        entropy=entropy / n,
        perplexity=math.exp(min(loss / n, 700.0)),
    )


def record_of(inputs: HeadInputs, softmax: Softmax) -> dict[str, object]:
    """What a result says of its inputs."""
    return {"source": inputs.source, **inputs.shape, "dtype": str(inputs.hidden.dtype), **vars(softmax)}


def describe(softmax: Softmax) -> str:
    """One line on how concentrated a softmax is."""
    shares = [f"{share:.3%} of the entries have p >= {eps}" for eps, share in softmax.kept_share.items()]
    masses = [f"{mass:.1%} of the mass" for mass in softmax.kept_mass.values()]
    kept = ", ".join(f"{share} with {mass}" for share, mass in zip(shares, masses, strict=True))
    return f"{kept}; perplexity {softmax.perplexity:.1f}"


def add_arguments(parser: argparse.ArgumentParser, *, rows: int, classes: int, width: int) -> None:
    """The options that choose inputs, the same for every benchmark."""
    parser.add_argument(
        "--inputs",
        type=Path,
        help="a .safetensors file with hidden, weight and target, such as a recipe's --save_head_inputs writes; "
        "without one, synthetic inputs like a trained model's",
    )
    parser.add_argument("--rows", type=int, default=rows, help="rows N of hidden (default %(default)s)")
    parser.add_argument("--classes", type=int, default=classes, help="classes V, where synthetic (default %(default)s)")
    parser.add_argument("--width", type=int, default=width, help="width D, where synthetic (default %(default)s)")
    parser.add_argument(
        "--kept_share",
        type=float,
        default=0.005,
        help="share of the entries with p >= 2^-12, where synthetic (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0)


def from_arguments(arguments: argparse.Namespace) -> HeadInputs:
    """The inputs that the options of `add_arguments` ask for."""
    if arguments.inputs is not None:
        return load(arguments.inputs, arguments.rows)
    return trained_like(
        arguments.rows, arguments.classes, arguments.width, kept_share=arguments.kept_share, seed=arguments.seed
    )
