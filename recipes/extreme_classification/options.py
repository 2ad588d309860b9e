"""Options that every model takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from recipes.common.errors import RecipeError
from recipes.extreme_classification.dataset import TEXTS, Dataset, Splits, load


@dataclass
class DataOptions:
    """Which documents."""

    data: str | None = field(
        default=None,
        metadata={
            "help": "The folder of a data set in a form of the Extreme Classification Repository. Default: made from "
            "this Python installation."
        },
    )
    text: str = field(default="title", metadata={"help": "What is read of a document: title, or content for both."})
    cache: str | None = field(default=None, metadata={"help": "Keep texts in this folder instead of in memory."})
    train_documents: int = field(default=0, metadata={"help": "Train on the first so many documents; 0 for all."})
    test_documents: int = field(default=0, metadata={"help": "Test on the first so many documents; 0 for all."})

    def __post_init__(self) -> None:
        if self.text not in TEXTS:
            raise RecipeError(f"--text is {self.text!r}; it must be one of {', '.join(TEXTS)}")
        for name in ("train_documents", "test_documents"):
            if getattr(self, name) < 0:
                raise RecipeError(f"--{name} is {getattr(self, name)}; it must be 0 or more")


def load_data(options: DataOptions) -> Splits:
    """The data set that the options name, cut to the documents wanted; its name tells of a cut."""
    splits = load(options.data, options.text, cache=options.cache)
    train, test = (
        _first(split, count)
        for split, count in ((splits.train, options.train_documents), (splits.test, options.test_documents))
    )
    pairs = splits.filter
    if train is splits.train and test is splits.test:
        return splits
    return replace(
        splits,
        train=train,
        test=test,
        filter=None if pairs is None else pairs[pairs[:, 0] < test.shape[0]],
        name=f"{splits.name}, the first {train.shape[0]} + {test.shape[0]} documents",
    )


def _first(split: Dataset, count: int) -> Dataset:
    if not 0 < count < split.shape[0]:
        return split
    return Dataset(
        texts=None if split.texts is None else split.texts[:count],
        labels=split.labels[:count],
        label_texts=split.label_texts,
        features=None if split.features is None else split.features[:count],
    )
