"""What the command takes, beside every option of `transformers.TrainingArguments`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from transformers import TrainingArguments

from recipes.common.command_line import at_least, json_object, parse
from recipes.common.errors import RecipeError

STOCK = "stock"
SAMPLED = "sampled"
LINEAR, ADAPTIVE, SPHERICAL, VQ = "linear", "adaptive", "spherical", "vq"
TRANSFORMER, NGRAM = "transformer", "ngram"

PRESETS = {
    # The network of the Z-loss paper, arXiv 1604.08859: 200 places a step.
    "ngram": {"network": NGRAM, "block_length": 100, "per_device_train_batch_size": 2, "weight_decay": 0.0},
    "ngram_small": {
        "network": NGRAM,
        "embedding_size": 64,
        "hidden_sizes": "128,128,64",
        "block_length": 64,
        "per_device_train_batch_size": 16,
        "weight_decay": 0.0,
    },
}


@dataclass
class DataOptions:
    """Which text, and how it becomes blocks of word ids."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "The benchmark's folder, a folder or file of text (plain or .gz) or parquet, or a dataset name. "
            "Default: the documentation inside this Python installation."
        },
    )
    vocab: str | None = field(
        default=None,
        metadata={"help": "A vocabulary file, `word count` a line in frequency order. Default: built from the text."},
    )
    vocab_size: int | None = field(
        default=None, metadata={"help": "Keep so many of the most frequent words when building. Default: all."}
    )
    min_count: int = field(default=3, metadata={"help": "Words seen less often become <UNK> when building."})
    block_length: int = field(default=128, metadata={"help": "Tokens in a block of packed sentences."})
    join_lines: bool = field(
        default=False,
        metadata={"help": "Lines belong together (WikiText) instead of being independent sentences."},
    )
    valid_sentences: int = field(
        default=10_000, metadata={"help": "Use at most so many validation sentences. The test set is never cut."}
    )

    def __post_init__(self) -> None:
        at_least(1, min_count=self.min_count, valid_sentences=self.valid_sentences)
        at_least(8, block_length=self.block_length)
        if self.vocab is not None and self.vocab_size is not None:
            raise RecipeError("--vocab and --vocab_size exclude each other: cut the file to the lines wanted instead")


@dataclass
class ModelOptions:
    """The network, its output head and the loss it trains with."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "ngram, the feed-forward network of the Z-loss paper, or ngram_small; other options override."
        },
    )
    network: str = field(default=TRANSFORMER, metadata={"help": "transformer or ngram."})
    context: int = field(default=9, metadata={"help": "ngram: words that the next one is predicted from."})
    embedding_size: int = field(default=512, metadata={"help": "ngram: width of the embeddings."})
    hidden_sizes: str = field(default="2048,2048,512", metadata={"help": "ngram: widths of the hidden layers."})
    head: str = field(
        default=LINEAR,
        metadata={
            "help": "linear; or adaptive (torch.nn.AdaptiveLogSoftmaxWithLoss), spherical "
            "(xhead.heads.SphericalHead) or vq (a codebook), which have losses of their own."
        },
    )
    head_options: str = field(
        default="{}",
        metadata={
            "help": """JSON for --head vq, as in '{"codebook_size": 512, "frequent": 256}', or for --head spherical: """
            """its arguments and its learning_rate, as in '{"loss": "zloss", "margin": 10, "learning_rate": 1}'."""
        },
    )
    start_from: str | None = field(
        default=None, metadata={"help": "The output folder of a run with a linear head: start from its model."}
    )
    hidden_size: int = field(default=256, metadata={"help": "Width of the hidden states."})
    layers: int = field(default=2, metadata={"help": "Transformer layers."})
    attention_heads: int = field(default=4, metadata={"help": "Attention heads; they divide hidden_size."})
    tie_embeddings: bool = field(default=True, metadata={"help": "Use one matrix for input and output words."})
    loss: str = field(
        default=STOCK,
        metadata={
            "help": "stock (the model as it is), sampled (softmax over words drawn by frequency), or a loss that "
            "xhead.patch knows, such as cce or zloss."
        },
    )
    loss_options: str = field(
        default="{}", metadata={"help": """JSON for xhead.patch, as in '{"filter_eps": 0.00390625}'."""}
    )

    def __post_init__(self) -> None:
        at_least(1, hidden_size=self.hidden_size, layers=self.layers, attention_heads=self.attention_heads)
        if self.hidden_size % (2 * self.attention_heads):
            raise RecipeError(
                f"--hidden_size is {self.hidden_size}: it must be a multiple of 2 x --attention_heads = "
                f"{2 * self.attention_heads}, since positions rotate pairs of a head's numbers"
            )
        for name, value, known in (
            ("preset", self.preset, (None, *PRESETS)),
            ("network", self.network, (TRANSFORMER, NGRAM)),
            ("head", self.head, (LINEAR, ADAPTIVE, SPHERICAL, VQ)),
        ):
            if value not in known:
                raise RecipeError(f"--{name} is {value!r}; known: {', '.join(filter(None, known))}")
        at_least(1, context=self.context, embedding_size=self.embedding_size)
        at_least(1, hidden_sizes=min(self.parsed_hidden_sizes))
        if self.head != LINEAR and self.loss != STOCK:
            raise RecipeError(f"--head {self.head} has a loss of its own: leave --loss {self.loss} out")
        options = self.parsed_loss_options
        if self.loss == STOCK and options:
            raise RecipeError("--loss_options needs a --loss other than stock, which has no options")
        if self.parsed_head_options and self.head not in (SPHERICAL, VQ):
            raise RecipeError(f"--head_options needs --head spherical or vq; --head {self.head} has no options")
        if self.start_from is not None and self.head not in (LINEAR, VQ):
            raise RecipeError(f"--start_from needs --head linear or vq, got {self.head}")

    @property
    def parsed_hidden_sizes(self) -> tuple[int, ...]:
        sizes = self.hidden_sizes.split(",")
        if not all(size.strip().isdecimal() for size in sizes):
            raise RecipeError(f"--hidden_sizes is {self.hidden_sizes!r}; give whole numbers with commas: 2048,2048,512")
        return tuple(map(int, sizes))

    @property
    def parsed_loss_options(self) -> dict[str, Any]:
        return json_object("--loss_options", self.loss_options)

    @property
    def parsed_head_options(self) -> dict[str, Any]:
        return json_object("--head_options", self.head_options)


@dataclass
class RunOptions:
    """What happens around training."""

    resume: bool = field(default=False, metadata={"help": "Go on from the last whole checkpoint in --output_dir."})
    valid_steps: int = field(default=500, metadata={"help": "Measure the validation perplexity every so many steps."})
    evaluate_test: bool = field(default=True, metadata={"help": "Measure the test perplexity at the end."})
    save_head_inputs: int = field(
        default=0,
        metadata={
            "help": "Save hidden (N, D), weight (V, D), target (N,) of so many validation tokens to "
            "head_inputs.safetensors, for measuring losses on a trained head."
        },
    )
    measure_memory: bool = field(default=False, metadata={"help": "Measure the peak memory of one loss call."})

    def __post_init__(self) -> None:
        at_least(1, valid_steps=self.valid_steps)
        at_least(0, save_head_inputs=self.save_head_inputs)


Options: TypeAlias = tuple[DataOptions, ModelOptions, RunOptions, TrainingArguments]


def parse_options(arguments: list[str] | None = None) -> Options:
    """Parse a command line.

    Raises:
        RecipeError: an option is not known, a value is out of range, or two exclude each other.
    """
    on_gpu = torch.cuda.is_available()
    defaults = {
        "output_dir": "runs/one_billion_word",
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "num_train_epochs": 1.0,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "weight_decay": 0.01,
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 2,
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": on_gpu,
        "ddp_find_unused_parameters": False,
        "report_to": "none",
    }
    defaults |= PRESETS.get(preset_of(arguments), {})
    kinds = (DataOptions, ModelOptions, RunOptions, TrainingArguments)
    description = "Train a word-level model and measure its exact perplexity and ranking errors."
    data, model, run, training = parse(kinds, "python -m recipes.one_billion_word", description, defaults, arguments)
    if training.save_strategy == "steps" and training.save_steps % training.logging_steps:
        raise RecipeError(
            f"--save_steps {training.save_steps} must be a multiple of --logging_steps {training.logging_steps}: "
            "a resumed run would otherwise log its first loss over another number of steps"
        )
    return data, model, run, training


def preset_of(arguments: list[str] | None) -> str:
    """The preset on a command line: it sets defaults, so it has to be known before the line is parsed."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset", default="")
    return finder.parse_known_args(arguments)[0].preset
