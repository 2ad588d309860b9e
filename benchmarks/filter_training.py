"""`python -m benchmarks.filter_training`: does a model train as well with the gradient filter as without?

A small word-level GRU is trained from scratch with the exact gradient, with what the filter skips dropped, and with it
compensated, at several thresholds and seeds: final validation loss (always exact), JSON and a plot. The filter works
here even where it would stand aside because it does not pay. Each run is written as it ends; the same command goes on
where it was interrupted.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from benchmarks import measure
from benchmarks.cpu import xhead_loss
from benchmarks.report import RESULTS, markdown_table, power_of_two, save_json
from xhead.engines import skipping

SETTINGS = ["exact", "compensated:12", "dropped:12", "compensated:8", "dropped:8", "compensated:6", "dropped:6"]


@dataclass(frozen=True)
class Configuration:
    """Everything that two runs must share for their losses to be compared."""

    data: str
    classes: int
    width: int
    steps: int
    batch: int  # sequences a step
    length: int  # tokens a sequence
    learning_rate: float
    warmup: int
    filtered: str  # the gradients that the filter may touch: hidden, weight or both


@dataclass(frozen=True)
class Text:
    """Word numbers, in frequency order, of one stream a split."""

    train: Tensor  # (tokens,)
    valid: Tensor  # (tokens,)
    classes: int


class WordModel(nn.Module):
    """Embedding, GRU, projection to the width of the output embedding, which is a matrix of its own."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.recurrent = nn.GRU(width, 2 * width, batch_first=True)
        self.projection = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, classes, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, L) -> hidden (B, L, D)
        return self.projection(self.recurrent(self.embedding(tokens))[0])


def read_text(data: str | None, classes: int, valid_tokens: int = 60_000) -> Text:
    """The corpus that the One Billion Word recipe reads from `data`, as two streams of word numbers."""
    from recipes.one_billion_word.corpora import load_corpus
    from recipes.one_billion_word.vocabulary import Vocabulary

    corpus = load_corpus(data)
    vocabulary = Vocabulary.build(corpus.lines("train"), min_count=1, size=classes)

    def stream(split: str) -> Tensor:
        sentences = (vocabulary.encode(line) for line in corpus.lines(split))
        return torch.tensor([word for words in sentences if words for word in (*words, vocabulary.end)])

    return Text(stream("train"), stream("valid")[:valid_tokens], len(vocabulary))


def batches(text: Tensor, configuration: Configuration, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random pieces of the text: tokens (B, L) and the ones that follow them. The seed decides them all."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(configuration.length + 1)
    while True:
        start = torch.randint(len(text) - configuration.length, (configuration.batch, 1), generator=generator)
        piece = text[start + span]
        yield piece[:, :-1], piece[:, 1:]


def filter_of(setting: str) -> tuple[float | None, bool]:
    """`exact`, `compensated:8` or `dropped:8` (2^-8) as (filter_eps, compensate).

    Raises:
        ValueError: another setting.
    """
    name, _, exponent = setting.partition(":")
    if name == "exact" and not exponent:
        return None, True
    if name not in ("compensated", "dropped") or not exponent.isdecimal():
        raise ValueError(f"setting {setting!r} is not one of exact, compensated:N, dropped:N with a threshold of 2^-N")
    return 2.0 ** -int(exponent), name == "compensated"


@torch.no_grad()
def validation_loss(model: WordModel, text: Tensor, length: int) -> float:
    """Exact mean loss over the whole stream, cut into pieces."""
    pieces = (len(text) - 1) // length
    tokens = text[: pieces * length].view(pieces, length)
    target = text[1 : pieces * length + 1].view(pieces, length)
    total = 0.0
    for some_tokens, some_target in zip(tokens.split(32), target.split(32), strict=True):
        logits = model.head(model(some_tokens))
        total += F.cross_entropy(logits.flatten(0, 1), some_target.flatten(), reduction="sum").item()
    return total / (pieces * length)


@torch.no_grad()
def kept_share(model: WordModel, tokens: Tensor, threshold: float) -> float:
    """Share of the softmax entries at or above the threshold, on 256 rows."""
    hidden = model(tokens).flatten(0, 1)[:256]
    return (torch.softmax(model.head(hidden), dim=-1) >= threshold).float().mean().item()


def train(setting: str, seed: int, configuration: Configuration, text: Text) -> dict[str, object]:
    """One run. A loss that is no longer finite ends it: its validation loss is None."""
    torch.manual_seed(seed)
    model = WordModel(text.classes, configuration.width)
    threshold, compensate = filter_of(setting)
    loss_function = xhead_loss(
        filter_eps=threshold,
        compensate=compensate,
        filter_hidden_grad=configuration.filtered in ("hidden", "both"),
        filter_weight_grad=configuration.filtered in ("weight", "both"),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=configuration.learning_rate, weight_decay=0.01)
    steps, warmup = configuration.steps, configuration.warmup

    def schedule(step: int) -> float:
        return min((step + 1) / max(warmup, 1), 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    every = max(steps // 10, 1)
    curve: list[list[float]] = []  # [step, loss], as JSON gives them back
    kept: list[list[float]] = []
    bar = tqdm(
        itertools.islice(batches(text.train, configuration, seed), steps), total=steps, desc=f"{setting}, seed {seed}"
    )
    for step, (tokens, target) in enumerate(bar, start=1):
        loss = loss_function(model(tokens), model.head.weight, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
        if not math.isfinite(loss.item()):
            break
        if step % every == 0 or step == steps:
            curve.append([step, validation_loss(model, text.valid, configuration.length)])
            bar.set_postfix(validation=f"{curve[-1][1]:.4f}")
        if threshold and (step == 1 or step % every == 0):
            kept.append([step, kept_share(model, tokens, threshold)])
    bar.close()
    finished = len(curve) > 0 and curve[-1][0] == steps and math.isfinite(curve[-1][1])
    return {
        "setting": setting,
        "seed": seed,
        "validation_loss": curve[-1][1] if finished else None,
        "curve": [point for point in curve if math.isfinite(point[1])],
        "kept_share": kept,
    }


def read_runs(path: Path, configuration: Configuration) -> list[dict]:
    """The runs that an earlier call finished.

    Raises:
        ValueError: they were made with another configuration.
    """
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    if record["configuration"] != asdict(configuration):
        changed = [k for k, v in asdict(configuration).items() if record["configuration"].get(k) != v]
        raise ValueError(f"{path} holds runs of another configuration ({', '.join(changed)}); give another --output")
    return record["runs"]


def training_table(runs: list[dict]) -> str:
    """Mean and spread over seeds, and the mean difference from the exact run of the same seed."""
    exact = {run["seed"]: run["validation_loss"] for run in runs if run["setting"] == "exact"}
    rows = []
    for setting in dict.fromkeys(run["setting"] for run in runs):
        same = [run for run in runs if run["setting"] == setting]
        finite = [run for run in same if run["validation_loss"] is not None]
        losses = [run["validation_loss"] for run in finite]
        apart = [run["validation_loss"] - exact[run["seed"]] for run in finite if exact.get(run["seed"]) is not None]
        kept = [run["kept_share"] for run in same if run["kept_share"]]
        rows.append(
            [
                label(setting),
                f"{len(finite)} of {len(same)}",
                f"{statistics.mean(losses):.4f}" if losses else "-",
                f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-",
                f"{statistics.mean(apart):+.4f}" if apart else "-",
                f"{kept[0][0][1]:.2%} to {kept[0][-1][1]:.2%}" if kept else "100 %",
            ]
        )
    columns = [
        "gradient",
        "runs finite",
        "validation loss",
        "deviation",
        "from exact",
        "entries kept",
    ]
    return markdown_table(columns, rows)


def label(setting: str) -> str:
    name, _, exponent = setting.partition(":")
    return f"{name} {power_of_two(2.0 ** -int(exponent))}" if exponent else name


def plot(runs: list[dict], title: str, path: Path) -> None:
    """Mean validation loss over the steps, one line a setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    exponents = sorted({setting.partition(":")[2] for setting in (run["setting"] for run in runs)} - {""}, key=int)
    colors = {exponent: f"C{i}" for i, exponent in enumerate(exponents)} | {"": "black"}
    styles = {"exact": "-", "compensated": "-", "dropped": "--"}
    for setting in dict.fromkeys(run["setting"] for run in runs):
        name, _, exponent = setting.partition(":")
        points: dict[int, list[float]] = {}
        for step, loss in (point for run in runs if run["setting"] == setting for point in run["curve"]):
            points.setdefault(step, []).append(loss)
        means = [statistics.mean(values) for values in points.values()]
        axes.plot(list(points), means, styles[name], color=colors[exponent], label=label(setting), linewidth=1.3)
    losses = [loss for run in runs for _, loss in run["curve"]] or [0.0]
    best = min(losses)  # what diverges leaves the picture, so that the others can be told apart
    axes.set(
        xlabel="step",
        ylabel="validation loss (exact)",
        title=title,
        ylim=(best - 0.1, min(best + 2.5, max(losses) + 0.1)),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    description = "Validation loss of a small model trained with and without the gradient filter."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.filter_training", description=description)
    parser.add_argument("--data", help="what the One Billion Word recipe takes; default: Python's own documentation")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, help="exact, compensated:N or dropped:N for 2^-N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--classes", type=int, default=8192)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--filtered", choices=["hidden", "weight", "both"], default="both")
    parser.add_argument("--output", type=Path, default=RESULTS / "filter_training.json", help="the plot lies beside it")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, object]:
    options = parse_arguments(arguments)
    for setting in options.settings:
        filter_of(setting)
    data = "Python's documentation" if options.data is None else Path(options.data).name
    names = ("classes", "width", "steps", "batch", "length", "learning_rate", "warmup", "filtered")
    configuration = Configuration(data=data, **{name: getattr(options, name) for name in names})
    runs = read_runs(options.output, configuration)
    done = {(run["setting"], run["seed"]) for run in runs}
    record: dict[str, object] = {"configuration": asdict(configuration), "runs": runs}
    text = read_text(options.data, options.classes)
    print(f"{data}: {len(text.train)} training tokens, {text.classes} words; {len(done)} runs are there already")
    for seed, setting in itertools.product(options.seeds, options.settings):
        if (setting, seed) not in done:
            with skipping.always():
                runs.append(train(setting, seed, configuration, text))
            save_json(options.output, record | {"environment": measure.environment()})
    print(f"\n{training_table(runs)}\n")
    picture = options.output.with_suffix(".png")
    plot(runs, f"{data}, V {text.classes}, D {options.width}, {len(options.seeds)} seeds", picture)
    print(f"written: {options.output}, {picture}")
    return record


if __name__ == "__main__":
    main()
