"""The One Billion Word benchmark as it is distributed (Chelba et al. 2013, https://arxiv.org/abs/1312.3005).

99 training shards, and one held-out shard cut in 50. The published perplexities are on the first of those 50 alone;
the second serves as validation here.
"""

from __future__ import annotations

import re
from pathlib import Path

from recipes.common.errors import RecipeError
from recipes.one_billion_word.corpora.corpus import Corpus, file_identity
from recipes.one_billion_word.corpora.text import read_lines

TRAINING_FOLDER = "training-monolingual.tokenized.shuffled"
HELD_OUT_FOLDER = "heldout-monolingual.tokenized.shuffled"
TRAINING_SHARDS = 99
TRAINING_NAME = re.compile(r"news\.en-(\d{5})-of-00100(\.gz)?")
HELD_OUT_NAME = re.compile(r"news\.en\.heldout-(\d{5})-of-00050(\.gz)?")


def find_official_root(path: Path) -> Path | None:
    """The folder that holds the benchmark's two: `path`, or one directly inside it (what the archive unpacks to)."""
    if not path.is_dir():
        return None
    for folder in (path, *sorted(child for child in path.iterdir() if child.is_dir())):
        if (folder / TRAINING_FOLDER).is_dir() or (folder / HELD_OUT_FOLDER).is_dir():
            return folder
    return None


def official_corpus(root: Path) -> Corpus:
    """The benchmark's folder as a corpus.

    Raises:
        RecipeError: no training shard, or not the held-out files 00000 (test) and 00001 (validation).
    """
    training = _shards(root / TRAINING_FOLDER, TRAINING_NAME)
    training.pop(0, None)  # shard 0 is the held-out one; some copies lay it beside the others
    held_out = _shards(root / HELD_OUT_FOLDER, HELD_OUT_NAME)
    if not training:
        raise RecipeError(f"{root / TRAINING_FOLDER} holds no file news.en-000NN-of-00100 with NN from 01 to 99")
    missing = [number for number in (0, 1) if number not in held_out]
    if missing:
        names = ", ".join(f"news.en.heldout-{number:05d}-of-00050" for number in missing)
        raise RecipeError(f"{root / HELD_OUT_FOLDER} lacks {names}: 00000 is the published test set, 00001 validation")
    paths = [training[number] for number in sorted(training)]
    return Corpus(
        name=f"One Billion Word benchmark, {len(paths)} of its {TRAINING_SHARDS} training shards",
        test_name="heldout-00000-of-00050, the published test set",
        identity=file_identity([*paths, held_out[1], held_out[0]]),
        train=read_lines(paths),
        valid=read_lines([held_out[1]]),
        test=read_lines([held_out[0]]),
    )


def _shards(folder: Path, name: re.Pattern[str]) -> dict[int, Path]:
    if not folder.is_dir():
        raise RecipeError(f"{folder} is missing: the benchmark has both {TRAINING_FOLDER} and {HELD_OUT_FOLDER}")
    matches = ((name.fullmatch(file.name), file) for file in folder.iterdir())
    return {int(match[1]): file for match, file in matches if match}
