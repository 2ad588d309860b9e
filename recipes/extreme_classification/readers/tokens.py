"""Token ids on disk: every text is tokenized once, and read memory-mapped from then on."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from recipes.common.errors import RecipeError

TEXTS_AT_ONCE = 1024


class TokenIds:
    """The token ids of texts, int32, one after the other in a memory-mapped file.

    Args:
        path: the file that `tokenize` wrote, beside which lie where each text ends and what was tokenized.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._starts = np.load(_starts_file(path))
        self._ids = np.memmap(path, np.int32, "r") if self._starts[-1] else np.empty(0, np.int32)

    def __reduce__(self) -> tuple[type[TokenIds], tuple[Path]]:
        return TokenIds, (self.path,)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        position = range(len(self))[index]
        return self._ids[self._starts[position] : self._starts[position + 1]]


def padded(found: Sequence[np.ndarray], padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The ids of some texts, filled up on the right to the longest of them.

    Returns:
        ids, int32 (texts, longest), and mask, int32 of the same shape, 0 at the padding.
    """
    lengths = np.array([len(ids) for ids in found], np.int64)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    ids = np.full(mask.shape, padding, np.int32)
    if len(found):
        ids[mask] = np.concatenate(found)
    return ids, mask.astype(np.int32)


def tokenize(texts: Sequence[str], tokenizer: Any, max_length: int, path: Path) -> TokenIds:
    """Tokenize texts into `path`, or take what is there, where texts, tokenizer and length are still the same.

    An interrupted run leaves nothing that would be taken for the whole.

    Args:
        texts: in memory or memory-mapped.
        tokenizer: a fast tokenizer of transformers.
        max_length: tokens of a text that are kept, special ones included.
        path: the file for the ids; two more are written beside it.

    Raises:
        RecipeError: max_length below 1.
    """
    if max_length < 1:
        raise RecipeError(f"texts are cut to {max_length} tokens; it must be at least 1")
    wanted = {
        "texts": len(texts),
        "checksum": _checksum(texts),
        "tokenizer": _fingerprint(tokenizer),
        "max_length": max_length,
    }
    about = path.with_name(path.name + ".json")
    if path.is_file() and about.is_file() and json.loads(about.read_text()) == wanted:
        return TokenIds(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    about.unlink(missing_ok=True)  # it is written last, and without it the other files count for nothing
    lengths = np.zeros(len(texts), np.int64)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file, tqdm(total=len(texts), desc=path.name, delay=3, disable=None) as bar:
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            part = list(texts[start : start + TEXTS_AT_ONCE])
            ids = tokenizer(part, truncation=True, max_length=max_length)["input_ids"]
            lengths[start : start + len(part)] = [len(tokens) for tokens in ids]
            np.concatenate([np.empty(0, np.int32), *(np.array(tokens, np.int32) for tokens in ids)]).tofile(file)
            bar.update(len(part))
    os.replace(temporary, path)
    np.save(_starts_file(path), np.concatenate([[0], np.cumsum(lengths)]))
    about.write_text(json.dumps(wanted))
    return TokenIds(path)


def _starts_file(path: Path) -> Path:
    return path.with_name(path.name + ".starts.npy")


def _checksum(texts: Sequence[str]) -> int:
    checksum = 0
    for text in texts:
        checksum = zlib.crc32(text.encode() + b"\0", checksum)
    return checksum


def _fingerprint(tokenizer: Any) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for changing in ("truncation", "padding"):  # set by every call
        state.pop(changing, None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
