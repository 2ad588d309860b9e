"""What the command takes, beside every option of `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from transformers import TrainingArguments

from recipes.common.command_line import at_least, parse
from recipes.common.errors import RecipeError


@dataclass
class DataOptions:
    """Which series, and how they become tokens."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "A .csv or .csv.gz file with a header, or a folder of such: every column of numbers is a series. "
            "Default: series made on the spot."
        },
    )
    made_series: int = field(default=8, metadata={"help": "How many are made on the spot."})
    made_length: int = field(default=4000, metadata={"help": "Their length."})
    context: int = field(default=96, metadata={"help": "Values that a forecast is made from."})
    horizon: int = field(default=24, metadata={"help": "Values that are forecast."})
    season: int = field(default=24, metadata={"help": "Values a season; MASE compares with repeating the last one."})
    train_windows: int = field(default=8000, metadata={"help": "Stretches of context and horizon to train on."})
    test_windows: int = field(default=64, metadata={"help": "Others, of the last fifth of each series, to test on."})
    bins: int = field(default=512, metadata={"help": "Tokens for values."})
    low: float = field(default=-8.0, metadata={"help": "The first bin's lower end, in means of the context."})
    high: float = field(default=8.0, metadata={"help": "The last bin's upper end."})

    def __post_init__(self) -> None:
        at_least(1, made_series=self.made_series, horizon=self.horizon, season=self.season)
        at_least(1, train_windows=self.train_windows, test_windows=self.test_windows)
        at_least(2, bins=self.bins)
        if self.context <= self.season:
            raise RecipeError(f"--context is {self.context}; it must be more than --season, {self.season}")
        if not self.low < self.high:
            raise RecipeError(f"--low is {self.low} and --high {self.high}; low must be the smaller")


@dataclass
class ModelOptions:
    """The causal transformer, from scratch."""

    hidden_size: int = field(default=64, metadata={"help": "Width of the hidden states."})
    layers: int = field(default=2, metadata={"help": "Layers."})
    attention_heads: int = field(default=4, metadata={"help": "Attention heads; twice their number divides the width."})

    def __post_init__(self) -> None:
        at_least(1, hidden_size=self.hidden_size, layers=self.layers, attention_heads=self.attention_heads)
        if self.hidden_size % (2 * self.attention_heads):
            raise RecipeError(
                f"--hidden_size is {self.hidden_size}; it must be a multiple of 2 x --attention_heads = "
                f"{2 * self.attention_heads}"
            )


@dataclass
class RunOptions:
    """What is compared."""

    heads: list[str] = field(
        default_factory=lambda: ["dense", "fourier-32", "fourier-64", "fourier-128"],
        metadata={"help": "dense, or fourier-N of N frequencies; the first is what the others are compared with."},
    )
    regularization: float = field(default=1e-6, metadata={"help": "Factor of the Fourier heads' smoothness penalty."})
    floor: float = field(
        default=1e-5,
        metadata={"help": "Added to each bin's probability by the Fourier heads; paths are drawn from it too."},
    )
    init_scale: float = field(default=0.1, metadata={"help": "Of the Fourier heads' first weights."})
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Train each with these seeds."})
    samples: int = field(default=20, metadata={"help": "Paths drawn for a forecast."})

    def __post_init__(self) -> None:
        at_least(2, samples=self.samples)
        if len(set(self.heads)) != len(self.heads):
            raise RecipeError(f"--heads is {' '.join(self.heads)}; each may be there once")
        for head in self.heads:
            frequencies_of(head)


def frequencies_of(head: str) -> int | None:
    """N of `fourier-N`, None of `dense`. Raises RecipeError for anything else."""
    kind, _, number = head.partition("-")
    if head == "dense":
        return None
    if kind != "fourier" or not number.isdecimal():
        raise RecipeError(f"--heads has {head!r}; known are dense and fourier-N, such as fourier-64")
    return int(number)


Options: TypeAlias = tuple[DataOptions, ModelOptions, RunOptions, TrainingArguments]


def parse_options(arguments: list[str] | None = None) -> Options:
    """Parse a command line. Raises RecipeError for what is unknown or out of range."""
    defaults = {
        "output_dir": "runs/forecasting",
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 32,
        "max_steps": 400,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "weight_decay": 0.01,
        "logging_steps": 50,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "report_to": "none",
    }
    kinds = (DataOptions, ModelOptions, RunOptions, TrainingArguments)
    description = "Forecast time series as tokens, with the dense head and with Fourier heads, and compare."
    data, model, run, training = parse(kinds, "python -m recipes.forecasting", description, defaults, arguments)
    return data, model, run, training
