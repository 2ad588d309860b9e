"""What the command takes, beside every option of `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from transformers import TrainingArguments

from recipes.common.command_line import at_least, json_object, parse
from recipes.common.errors import RecipeError

MODELS = ("llama", "gpt2", "t5")


@dataclass
class DataOptions:
    """Which problems."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "A .jsonl or .jsonl.gz file, or a folder of such with train and optionally val, valid or test in "
            "their names; with the keys question and solution, or question and an answer that ends in #### NUMBER. "
            "Default: sums and differences made on the spot."
        },
    )
    operations: str = field(default="+-", metadata={"help": "Of the problems made on the spot: any of + - *."})
    largest: int = field(default=99, metadata={"help": "Their operands go from 0 to this."})
    train_problems: int = field(default=8000, metadata={"help": "Train on at most so many problems."})
    test_problems: int = field(default=500, metadata={"help": "Test on at most so many others."})
    longest: int = field(default=128, metadata={"help": "Leave out problems of more characters."})

    def __post_init__(self) -> None:
        at_least(1, largest=self.largest, train_problems=self.train_problems, test_problems=self.test_problems)
        if not self.operations or set(self.operations) - set("+-*"):
            raise RecipeError(f"--operations is {self.operations!r}; it must be one or more of + - *")


@dataclass
class ModelOptions:
    """The model, from scratch, whose tokens are characters: each digit is one."""

    model: str = field(default="llama", metadata={"help": f"One of {', '.join(MODELS)}."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the hidden states."})
    layers: int = field(default=2, metadata={"help": "Layers (of T5: in the encoder, and in the decoder)."})
    attention_heads: int = field(default=4, metadata={"help": "Attention heads; twice their number divides the width."})

    def __post_init__(self) -> None:
        at_least(1, hidden_size=self.hidden_size, layers=self.layers, attention_heads=self.attention_heads)
        if self.model not in MODELS:
            raise RecipeError(f"--model is {self.model!r}; known: {', '.join(MODELS)}")
        if self.hidden_size % (2 * self.attention_heads):
            raise RecipeError(
                f"--hidden_size is {self.hidden_size}; it must be a multiple of 2 x --attention_heads = "
                f"{2 * self.attention_heads}"
            )


@dataclass
class RunOptions:
    """What is compared."""

    losses: list[str] = field(
        default_factory=lambda: ["cce", "cce+0.3*ntl_was", "cce+0.3*ntl_mse"],
        metadata={"help": "Losses of xhead.patch, the first of which the others are compared with."},
    )
    loss_options: str = field(default="{}", metadata={"help": """JSON for all of them, as in '{"reweigh": true}'."""})
    seeds: int = field(default=3, metadata={"help": "Train each loss so many times, with seeds 1, 2, ..."})
    resume: bool = field(
        default=False, metadata={"help": "Keep the runs in --output_dir that are done, and go on with the others."}
    )

    def __post_init__(self) -> None:
        at_least(1, seeds=self.seeds)
        if len(set(self.losses)) != len(self.losses):
            raise RecipeError(f"--losses is {' '.join(self.losses)}; each may be there once")
        _ = self.parsed_loss_options

    @property
    def parsed_loss_options(self) -> dict[str, Any]:
        return json_object("--loss_options", self.loss_options)


Options: TypeAlias = tuple[DataOptions, ModelOptions, RunOptions, TrainingArguments]


def parse_options(arguments: list[str] | None = None) -> Options:
    """Parse a command line. Raises RecipeError for what is unknown or out of range."""
    defaults = {
        "output_dir": "runs/arithmetic",
        "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 250,
        "max_steps": 600,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 30,
        "weight_decay": 0.01,
        "logging_steps": 50,
        "save_steps": 300,
        "save_total_limit": 1,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
    kinds = (DataOptions, ModelOptions, RunOptions, TrainingArguments)
    description = "Train on arithmetic with several losses and seeds, and compare the numbers that come out."
    data, model, run, training = parse(kinds, "python -m recipes.arithmetic", description, defaults, arguments)
    return data, model, run, training
