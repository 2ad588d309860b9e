"""`python -m recipes.forecasting.toy`: learn three known densities, with a dense head and with Fourier heads.

The experiment of arXiv 2410.22269: a perceptron 2-64-32 with a head over 50 bins, 5,000 samples of which a fifth are
for testing, Adam, batches of 32, 500 epochs. The paper's learning rate is 1e-3 throughout, with which the networks are
not trained out; here it goes from 1e-2 to 0. Networks of all distributions and seeds train side by side as one batch of
networks, each on its own data with its own optimiser state.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import HfArgumentParser

from recipes.common.errors import RecipeError
from recipes.forecasting.smoothness import smoothness
from recipes.forecasting.toy_data import BINS, CENTRES, DISTRIBUTIONS, ToyData, draw
from recipes.forecasting.toy_report import plot_masses, toy_table
from xhead.heads import FourierHead


@dataclass
class ToyOptions:
    """What is trained."""

    heads: list[str] = field(
        default_factory=lambda: ["dense", "fourier-12"],
        metadata={"help": "dense, fourier-N of N frequencies, or fourier-N-G with the smoothness penalty times G."},
    )
    distributions: list[str] = field(
        default_factory=lambda: list(DISTRIBUTIONS), metadata={"help": f"Of {', '.join(DISTRIBUTIONS)}."}
    )
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3, 42], metadata={"help": "Of data and first weights."})
    samples: int = field(default=5000, metadata={"help": "A fifth of them are for testing."})
    epochs: int = field(default=500, metadata={"help": "Passes over the training samples."})
    batch_size: int = field(default=32, metadata={"help": "Samples a step, of each network."})
    learning_rate: float = field(default=1e-2, metadata={"help": "Of Adam; the paper's is 1e-3."})
    init_scale: float = field(default=0.01, metadata={"help": "Of the Fourier head; the paper's code has 0.01."})
    schedule: str = field(
        default="cosine", metadata={"help": "Of the learning rate: cosine, down to 0, or constant, as in the paper."}
    )
    output_dir: str = field(default="runs/toy", metadata={"help": "Where toy.json and toy.png go."})

    def __post_init__(self) -> None:
        unknown = [name for name in self.distributions if name not in DISTRIBUTIONS]
        if unknown:
            raise RecipeError(f"--distributions has {', '.join(unknown)}; known: {', '.join(DISTRIBUTIONS)}")
        if self.samples < 5 or self.epochs < 1 or self.batch_size < 1 or not self.seeds:
            raise RecipeError("--samples must be at least 5, --epochs and --batch_size at least 1, --seeds one or more")
        if self.schedule not in ("constant", "cosine"):
            raise RecipeError(f"--schedule is {self.schedule}; known are constant and cosine")
        for name in self.heads:
            make_head(name, self.init_scale)


def make_head(name: str, init_scale: float) -> Any:
    """The head of that name on 32 hidden units. Raises RecipeError for a name that is none."""
    if name == "dense":
        return nn.Linear(32, BINS)
    try:
        kind, frequencies, *penalty = name.split("-", 2)
        if kind != "fourier":
            raise ValueError("the name of a head is dense, fourier-N or fourier-N-G")
        regularization = float(penalty[0]) if penalty else 0.0
        return FourierHead(32, BINS, int(frequencies), regularization=regularization, init_scale=init_scale)
    except ValueError as error:
        raise RecipeError(f"--heads has {name!r}: {error}") from error


class Networks(nn.Module):
    """Perceptrons 2-64-32 with a head, one a seed, computed as one batch of matrix products."""

    def __init__(self, head: str, seeds: list[int], init_scale: float) -> None:
        super().__init__()
        layers = []
        for seed in seeds:
            torch.manual_seed(seed)
            last = make_head(head, init_scale)
            self.bins = last.bins if isinstance(last, FourierHead) else None
            layers.append((nn.Linear(2, 64), nn.Linear(64, 32), last.linear if self.bins else last))
        self.weights = nn.ParameterList([torch.stack([n[i].weight.detach().T for n in layers]) for i in range(3)])
        self.biases = nn.ParameterList([torch.stack([n[i].bias.detach()[None] for n in layers]) for i in range(3)])

    def forward(self, inputs: Tensor) -> Tensor:  # (networks, n, 2)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs = torch.baddbmm(bias, inputs.relu() if i else inputs, weight)
        return inputs

    def losses(self, inputs: Tensor, labels: Tensor) -> Tensor:  # (networks, n, 2), (networks, n)
        """The mean loss of each network, (networks,)."""
        found = self(inputs)
        if self.bins is None:
            rows = nn.functional.cross_entropy(found.transpose(1, 2), labels, reduction="none")
        else:
            real, imaginary = found.chunk(2, -1)
            rows = self.bins.loss_rows(real, imaginary, labels)
        return rows.mean(-1)

    @torch.no_grad()
    def log_probs(self, inputs: Tensor) -> Tensor:  # (networks, n, 2)
        found = self(inputs)
        return found.log_softmax(-1) if self.bins is None else self.bins.log_probs(*found.chunk(2, -1))


def train(head: str, data: list[ToyData], seeds: list[int], options: ToyOptions) -> Tensor:
    """Train a network on each of the data sets; the log-probabilities of their test samples, (networks, n, BINS)."""
    networks = Networks(head, seeds, options.init_scale)
    optimizer = torch.optim.Adam(networks.parameters(), lr=options.learning_rate, fused=True)
    inputs, labels = (torch.stack([getattr(each, name) for each in data]) for name in ("inputs", "labels"))
    kept = options.samples * 4 // 5
    generator = torch.Generator().manual_seed(seeds[0])
    member = torch.arange(len(data))[:, None]
    for epoch in tqdm(range(options.epochs), desc=head, disable=None):
        if options.schedule == "cosine":
            share = (1 + math.cos(math.pi * epoch / options.epochs)) / 2
            optimizer.param_groups[0]["lr"] = share * options.learning_rate
        order = torch.rand(len(data), kept, generator=generator).argsort(-1)
        epoch_inputs, epoch_labels = inputs[member, order], labels[member, order]
        for start in range(0, kept, options.batch_size):
            batch = slice(start, start + options.batch_size)
            optimizer.zero_grad()
            networks.losses(epoch_inputs[:, batch], epoch_labels[:, batch]).sum().backward()
            optimizer.step()
    return networks.log_probs(inputs[:, kept:])


def run(options: ToyOptions) -> dict[str, Any]:
    """Train, score, and write toy.json and toy.png. Returns what is in toy.json."""
    members = [(name, seed) for name in options.distributions for seed in options.seeds]
    data = [draw(name, options.samples, seed) for name, seed in members]
    truth = torch.stack([each.truth[options.samples * 4 // 5 :] for each in data])
    scores: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for head in options.heads:
        found = train(head, data, [seed for _, seed in members], options).double()
        divergence = (torch.xlogy(truth, truth) - truth * found).sum(-1).mean(-1)
        rough = smoothness(found.exp()).mean(-1)
        scores[head] = {name: {} for name in options.distributions}
        for (name, seed), kl, value in zip(members, divergence.tolist(), rough.tolist(), strict=True):
            scores[head][name][str(seed)] = {"kl": kl, "smoothness": value}
        curves[head] = {name: found[i * len(options.seeds), 0].exp() for i, name in enumerate(options.distributions)}
    exact = smoothness(truth).mean(-1).tolist()
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "options": {key: value for key, value in asdict(options).items() if key != "output_dir"},
        "torch": torch.__version__,
        "scores": scores,
        "true_smoothness": {
            name: sum(exact[i * len(options.seeds) : (i + 1) * len(options.seeds)]) / len(options.seeds)
            for i, name in enumerate(options.distributions)
        },
    }
    (folder / "toy.json").write_text(json.dumps(results, indent=1) + "\n")
    exact_curves = {name: truth[i * len(options.seeds), 0] for i, name in enumerate(options.distributions)}
    plot_masses(CENTRES, {"true": exact_curves, **curves}, folder / "toy.png")
    print(f"\n{toy_table(results)}\nnumbers: {folder / 'toy.json'}   plot: {folder / 'toy.png'}")
    return results


def main(arguments: list[str] | None = None) -> None:
    """The command. What the user got wrong ends it with status 2."""
    parser = HfArgumentParser(ToyOptions, prog="python -m recipes.forecasting.toy", allow_abbrev=False)  # pyright: ignore
    try:
        (options,) = parser.parse_args_into_dataclasses(arguments)
        run(options)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
