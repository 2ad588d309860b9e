"""Independent sentences packed into blocks of one length, without one seeing another.

A block holds whole sentences, as many as fit, in order. Positions restart at 0 with each sentence, which is how
transformers is told to keep the attention of packed sequences apart. Which tokens count is in the labels: -100 for
`<S>`, for padding, and for tokens repeated as context; every other token of the corpus is a label exactly once.
A sentence longer than a block is cut into pieces that overlap, and only the first piece scores the overlap.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset

from recipes.one_billion_word.encoding import Encoded

IGNORED = -100


class PackedSentences(Dataset[dict[str, torch.Tensor]]):
    """Blocks of packed sentences, ready for a causal language model of transformers.

    Item: `input_ids`, `labels`, `position_ids`, each (block_length,) long. Labels lie at their own token's place, as
    transformers expects: the model shifts them.

    Args:
        encoded: the sentences.
        block_length: tokens a block, at least 2.
        overlap: tokens of context repeated when a sentence is cut; 1 wastes least, half a block scores best.
        padding: id put behind the last sentence of a block.

    Raises:
        ValueError: `block_length` or `overlap` out of range.
    """

    def __init__(self, encoded: Encoded, block_length: int, *, overlap: int = 1, padding: int = 0) -> None:
        if block_length < 2:
            raise ValueError(f"block_length is {block_length}; a block needs at least a token and the one it predicts")
        if not 1 <= overlap < block_length:
            raise ValueError(f"overlap is {overlap}; it must lie between 1 and block_length - 1 = {block_length - 1}")
        self.block_length = block_length
        self.padding = padding
        self.tokens = encoded.tokens
        self.piece_starts, self.piece_stops, self.contexts = cut_sentences(encoded.starts, block_length, overlap)
        self.block_pieces = fill_blocks(self.piece_stops - self.piece_starts, block_length)

    def __len__(self) -> int:
        return len(self.block_pieces) - 1

    @property
    def predicted(self) -> int:
        """Labels that count, in all blocks."""
        return int((self.piece_stops - self.piece_starts - self.contexts).sum())

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        ids = np.full(self.block_length, self.padding, dtype=np.int64)
        labels = np.full(self.block_length, IGNORED, dtype=np.int64)
        positions = np.empty(self.block_length, dtype=np.int64)
        filled = 0
        for piece in range(self.block_pieces[index], self.block_pieces[index + 1]):
            begin, end, context = self.piece_starts[piece], self.piece_stops[piece], self.contexts[piece]
            length = end - begin
            ids[filled : filled + length] = self.tokens[begin:end]
            labels[filled + context : filled + length] = self.tokens[begin + context : end]
            positions[filled : filled + length] = np.arange(length)
            filled += length
        positions[filled:] = np.arange(self.block_length - filled)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(positions),
        }


def cut_sentences(starts: np.ndarray, longest: int, overlap: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut sentences into pieces of at most `longest` tokens.

    Args:
        starts: (S + 1,) where sentences begin, then the end of the last.
        longest: tokens a piece.
        overlap: tokens that a later piece repeats from the one before it.

    Returns:
        For each piece: where it starts, where it stops, and how many of its first tokens are context and not scored.
    """
    starts = np.asarray(starts)
    lengths = np.diff(starts)
    stride = longest - overlap
    pieces = 1 + np.maximum(0, -(-(lengths - longest) // stride))
    sentence = np.repeat(np.arange(len(lengths)), pieces)
    number = np.arange(len(sentence)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    begin = starts[:-1][sentence] + number * stride
    return begin, np.minimum(begin + longest, starts[1:][sentence]), np.where(number == 0, 1, overlap)


def fill_blocks(lengths: np.ndarray, block_length: int) -> np.ndarray:
    """The first piece of each block when pieces are taken in order and a block closes before one that does not fit.

    Args:
        lengths: (P,) of the pieces, none above `block_length`.

    Returns:
        (B + 1,) first pieces; the last entry is P.
    """
    ends = np.cumsum(lengths)
    firsts = [0]
    taken = 0
    while firsts[-1] < len(lengths):
        following = int(np.searchsorted(ends, taken + block_length, side="right"))
        taken = int(ends[following - 1])
        firsts.append(following)
    return np.array(firsts)
