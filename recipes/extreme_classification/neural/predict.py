"""`python -m recipes.extreme_classification.neural.predict FOLDER TEXT ...`: the best labels of new texts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes.extreme_classification.neural.run import Predictor
from recipes.one_billion_word.errors import RecipeError


def main(arguments: list[str] | None = None) -> None:
    """The command. What the user got wrong ends it with status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.extreme_classification.neural.predict", description="The best labels of new texts."
    )
    parser.add_argument("folder", type=Path, help="what was trained with --output_dir FOLDER")
    parser.add_argument("texts", nargs="*", help="default: a text a line of the standard input")
    parser.add_argument("--k", type=int, default=5, help="labels of a text (default %(default)s)")
    options = parser.parse_args(arguments)
    texts = options.texts or [line.strip() for line in sys.stdin if line.strip()]
    try:
        found = Predictor(options.folder)(texts, options.k)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    for text, labels in zip(texts, found, strict=True):
        print(text)
        for label, score in labels:
            print(f"  {score:8.3f}  {label}")


if __name__ == "__main__":
    main()
