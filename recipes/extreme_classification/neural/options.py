"""What the neural models take, and the published settings of four data sets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from recipes.common.command_line import json_object
from recipes.common.errors import RecipeError
from recipes.extreme_classification.neural.sentence_folder import POOLINGS, sentence_folder
from xhead.losses import get_loss

FROM_NOTHING = ("bag", "tiny", "tfidf")
TF_IDF = "tfidf"

_DEXML: dict[str, Any] = {
    "loss": "decoupled_softmax",
    "encoder": "distilbert-base-uncased",
    "pooling": "cls",
    "normalise": True,
    "temperature": 0.05,
    "negatives": "all",
    "epochs": 100,
    "patience": 100,
    "warmup": 0.1,
    "dropout": 0.0,
}
_LARGE: dict[str, Any] = {**_DEXML, "normalise": False, "temperature": 1.0}
_WIKIPEDIA: dict[str, Any] = {
    **_LARGE,
    "text": "content",
    "batch_size": 768,
    "max_length": 128,
    "label_chunk": 512,
}

PRESETS: dict[str, dict[str, Any]] = {
    "eurlex-4k": {**_DEXML, "batch_size": 512, "learning_rate": 5e-5, "max_length": 128, "label_chunk": 4096},
    "lf-amazontitles-131k": {**_DEXML, "batch_size": 3000, "learning_rate": 3e-4, "max_length": 32},
    "lf-amazontitles-1.3m": {
        **_LARGE,
        "batch_size": 3000,
        "learning_rate": 3e-4,
        "max_length": 32,
        "label_chunk": 3000,
    },
    "lf-wikipedia-500k": {**_WIKIPEDIA, "learning_rate": 7e-5},
    "lf-wikipedia-500k-hnm": {
        **_WIKIPEDIA,
        "learning_rate": 2e-5,
        "negatives": "hard",
        "negative_count": 500,
        "shortlist": 100,
        "in_batch_epochs": 5,
        "refresh_epochs": 5,
    },
    "lf-tibkat-41k": {
        "text": "content",
        "encoder": "tfidf",
        "vocab_size": 120_000,
        "max_length": 128,
        "hidden_size": 1024,
        "own_vectors": True,
        "prototypes": True,
        "label_chunk": 65536,
        "batch_size": 1024,
        "negatives": "random",
        "negative_count": 8192,
        "learning_rate": 1.5e-3,
        "adam_epsilon": 1e-6,
        "temperature": 0.05,
        "weight_decay": 0.0,
        "dropout": 0.3,
        "epochs": 3,
        "warmup": 0.05,
        "held_out": 0.01,
    },
}
"""Settings of data sets: DEXML's published ones (arXiv 2310.10636, configurations of the public code) for its four
sets, one of them with hard negatives too, and for LF-TIBKAT-41K what trains within minutes on two cores."""

NEGATIVES = ("all", "random", "hard")
_COUNTS = (
    "hidden_size",
    "layers",
    "vocab_size",
    "max_length",
    "negative_count",
    "refresh_epochs",
    "prototype_parts",
    "label_chunk",
    "batch_size",
    "epochs",
    "patience",
)


@dataclass
class NeuralOptions:
    """The encoder, the label side and the training of `--model classifier` and `--model dual_encoder`."""

    loss: str = field(
        default="decoupled_softmax",
        metadata={"help": "decoupled_softmax, infonce, soft_topk, sigmoid, mann_whitney, or any loss with label sets."},
    )
    loss_options: str = field(default="{}", metadata={"help": """JSON for the loss, as in '{"k": 5}'."""})
    encoder: str = field(
        default="bag",
        metadata={"help": f"{', '.join(FROM_NOTHING)} (trained from nothing), or a name or folder of Hugging Face."},
    )
    pooling: str = field(
        default="",
        metadata={"help": "mean or cls, of a transformer. Default: as a sentence-transformers folder says, else mean."},
    )
    hidden_size: int = field(default=128, metadata={"help": "Size of a vector, of encoders from nothing."})
    layers: int = field(default=2, metadata={"help": "Transformer layers of --encoder tiny."})
    vocab_size: int = field(
        default=8000, metadata={"help": "Tokens of encoders from nothing; of tfidf, words, and as many n-grams."}
    )
    max_length: int = field(
        default=32, metadata={"help": "Tokens of a text, the rest is cut off; of tfidf, its largest features."}
    )
    normalise: bool | None = field(
        default=None,
        metadata={"help": "Unit vectors, of a dual encoder. Default: as such a folder says, else True."},
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Scores are divided by it. Default: 0.05 for unit vectors, else 1."}
    )
    own_vectors: bool = field(
        default=False, metadata={"help": "A dual encoder's labels get a vector of their own too."}
    )
    own_rate: float = field(default=1.0, metadata={"help": "Learning rate of own vectors, as a part of the others'."})
    prototypes: bool = field(
        default=False,
        metadata={"help": "A dual encoder's label vector is the mean of its text's and its training documents'."},
    )
    prototype_parts: int = field(
        default=4,
        metadata={"help": "Of an epoch: the documents of a part are compared with labels that are made without them."},
    )
    negatives: str = field(
        default="all", metadata={"help": "all labels, or a batch's own with random ones or hard ones (dual encoder)."}
    )
    negative_count: int = field(
        default=1000, metadata={"help": "Random negatives a batch; hard ones a query are a hundredth, at least 1."}
    )
    shortlist: int = field(
        default=0,
        metadata={"help": "Hard negatives are drawn anew for each batch from so many; 0: they are the hardest."},
    )
    in_batch_epochs: int = field(
        default=0, metadata={"help": "Epochs with the labels of the batch alone, before there are hard negatives."}
    )
    clustered: bool = field(default=False, metadata={"help": "Batches of near queries."})
    refresh_epochs: int = field(default=5, metadata={"help": "Hard negatives and clusters are found anew so often."})
    label_chunk: int = field(default=2048, metadata={"help": "Labels encoded at a time."})
    classifier_learning_rate: float = field(default=20.0, metadata={"help": "Of the SGD of --model classifier."})
    classifier_adaptive: bool = field(
        default=False,
        metadata={"help": "A label has a rate of its own, which falls with its gradients (row-wise Adagrad)."},
    )
    classifier_dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16, of the classifier."})
    batch_size: int = field(default=128, metadata={"help": "Documents of a step."})
    epochs: int = field(default=10, metadata={"help": "At most."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Of AdamW."})
    adam_epsilon: float = field(
        default=1e-8,
        metadata={"help": "Of AdamW; a larger one keeps what only has tiny gradients, rare labels, where it is."},
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    warmup: float = field(default=0.1, metadata={"help": "Share of the steps; then the rate falls to 0, linearly."})
    dropout: float = field(default=0.0, metadata={"help": "Of the encoder; of tfidf, the share of features left out."})
    held_out: float = field(default=0.05, metadata={"help": "Share of the training documents to stop early by."})
    patience: int = field(default=4, metadata={"help": "Epochs without a better nDCG@5 before training stops."})
    preset: str | None = field(
        default=None, metadata={"help": f"Settings of a data set: {', '.join(PRESETS)}. Other options win."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "For the model and the report. Default: runs/extreme_classification_MODEL."}
    )
    index: str | None = field(
        default=None,
        metadata={"help": "Export a faiss index of the label vectors too: HNSW32, or any of faiss.index_factory."},
    )
    shard_labels: bool = field(
        default=True,
        metadata={"help": "Each of several processes holds a part of the labels; else all of them."},
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the last whole epoch in --output_dir."})
    seed: int = field(default=0, metadata={"help": "Of everything that is drawn."})

    def __post_init__(self) -> None:
        if not self.pooling or self.normalise is None:
            said = sentence_folder(self.encoder)
            self.pooling = self.pooling or (POOLINGS[0] if said is None else said.pooling)
            self.normalise = (said is None or said.normalise) if self.normalise is None else self.normalise
        for name, allowed in (
            ("pooling", POOLINGS),
            ("negatives", NEGATIVES),
            ("classifier_dtype", ("float32", "bfloat16")),
            ("preset", (None, *PRESETS)),
        ):
            if getattr(self, name) not in allowed:
                known = ", ".join(str(value) for value in allowed if value is not None)
                raise RecipeError(f"--{name} is {getattr(self, name)!r}; it must be one of {known}")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise RecipeError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("shortlist", "in_batch_epochs"):
            value = getattr(self, name)
            if value < 0 or (value and self.negatives != "hard"):
                raise RecipeError(f"--{name} is {value}; it must be 0 or more, and 0 without --negatives hard")
        for name in ("learning_rate", "classifier_learning_rate", "own_rate", "weight_decay", "adam_epsilon"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"--{name} must be 0 or more, got {getattr(self, name)}")
        if not (0 <= self.dropout < 1 and 0 <= self.warmup <= 1):
            raise RecipeError(f"--dropout is {self.dropout}, --warmup {self.warmup}; they are shares of 1")
        if not 0 < self.held_out < 1:
            raise RecipeError(f"--held_out must be a share between 0 and 1, got {self.held_out}")
        if self.temperature is not None and not self.temperature > 0:
            raise RecipeError(f"--temperature must be above 0, got {self.temperature}")
        try:
            get_loss(self.loss, **self.parsed_loss_options)
        except (ValueError, TypeError, AttributeError) as error:
            raise RecipeError(f"--loss {self.loss}: {error}") from error

    @property
    def parsed_loss_options(self) -> dict[str, Any]:
        found = json_object("--loss_options", self.loss_options)
        return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def preset_defaults(name: str | None) -> dict[str, Any]:
    """The options that a preset sets. Raises RecipeError for an unknown one."""
    if name is None:
        return {}
    if name not in PRESETS:
        raise RecipeError(f"--preset is {name!r}; it must be one of {', '.join(PRESETS)}")
    return PRESETS[name]
