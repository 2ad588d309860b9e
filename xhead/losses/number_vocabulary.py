"""Which tokens are numbers, and what they are worth: read off any Hugging Face tokenizer."""

import itertools
import math
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DIGIT = re.compile(r"[0-9]")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)")
_SPACES = ("\u0120", "\u2581", " ")  # of byte-level BPE, of SentencePiece, and itself


class NumberTokens(NamedTuple):
    """Tokens that are numbers, by ascending id, and the distances between their values."""

    token_ids: Tensor  # (J,) int64
    values: Tensor  # (J,) float64
    after_space: Tensor  # (J,) bool: the token begins with a space, and so does not go on with a number
    last_id: int
    smallest_distance: float  # between different values; 0 where all are equal
    largest_distance: float

    def positions(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each label is a number token, and its position among them (0 where it is none): both as `labels`."""
        token_ids = self.token_ids.to(labels.device)
        position = torch.searchsorted(token_ids, labels.long().contiguous()).clamp(max=len(token_ids) - 1)
        found = token_ids[position] == labels
        return found, position.masked_fill(~found, 0)


def number_tokens(tokenizer: Any, digit_level: bool = True, space_prefixed: bool = False) -> NumberTokens:
    """The number tokens of a tokenizer's vocabulary and their values.

    Args:
        tokenizer: anything with `get_vocab() -> {token: id}`; it is not changed.
        digit_level: only the ten single digits `0` to `9`. Otherwise every token that is a number in ASCII digits as a
            whole, signed or with a decimal point too: `12`, `007` (worth 7), `-3`, `1.5`.
        space_prefixed: tokens with a space in front, in the writing of byte-level BPE, SentencePiece or plain, count
            too, and are worth what they are worth without.

    Raises:
        TypeError: no tokenizer of that kind.
        ValueError: no token is a number; or at digit level, a digit has no token of its own.
    """
    if not callable(getattr(tokenizer, "get_vocab", None)):
        raise TypeError(f"tokenizer must have get_vocab(), got {type(tokenizer).__name__}")
    pattern = _DIGIT if digit_level else _NUMBER
    found, after_space = {}, set()
    for token, token_id in tokenizer.get_vocab().items():
        # Some tokenizers keep bytes.
        text = token.decode("ascii", "replace") if isinstance(token, bytes) else token
        spaced = space_prefixed and text.startswith(_SPACES)
        text = text[1:] if spaced else text
        if pattern.fullmatch(text):
            found[token_id] = float(text)
            after_space |= {token_id} if spaced else set()
    missing = sorted({str(digit) for digit in range(10)} - {f"{value:g}" for value in found.values()})
    if not found or (digit_level and missing):
        what = f"no token for the digits {', '.join(missing)}" if digit_level else "no token that is a number"
        advice = "" if space_prefixed else ", or space_prefixed=True where digits are only found with a space in front"
        raise ValueError(
            f"the vocabulary of {type(tokenizer).__name__} has {what}; give token_ids= and values=, or add the digits "
            f"with tokenizer.add_tokens([...]) and model.resize_token_embeddings(len(tokenizer)){advice}"
        )
    return from_lists(list(found), list(found.values()), after_space)


def from_lists(
    token_ids: Sequence[int], values: Sequence[float], after_space: Collection[int] = frozenset()
) -> NumberTokens:
    """Number tokens given one by one; `after_space` are the ids of those that begin with a space.

    Raises ValueError or TypeError for lists that do not say that.
    """
    for name, given in (("token_ids", token_ids), ("values", values)):
        if isinstance(given, (Tensor, str)) or not isinstance(given, Sequence):
            raise TypeError(f"{name} must be a list or tuple, one number a token, got {type(given).__name__}")
    if len(token_ids) != len(values) or not token_ids or len(set(token_ids)) != len(token_ids):
        raise ValueError(
            f"token_ids and values must be of one length, not empty, and no id twice; got {len(token_ids)} ids, "
            f"{len(set(token_ids))} of them different, and {len(values)} values"
        )
    if any(isinstance(each, bool) or not isinstance(each, int) or each < 0 for each in token_ids):
        raise ValueError(f"token_ids must be whole numbers of at least 0, got {list(token_ids)}")
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"values must be finite, got {list(values)}")
    ordered = sorted(zip(token_ids, map(float, values), strict=True))
    distinct = sorted(set(map(float, values)))
    return NumberTokens(
        torch.tensor([token_id for token_id, _ in ordered]),
        torch.tensor([value for _, value in ordered], dtype=torch.float64),
        torch.tensor([token_id in after_space for token_id, _ in ordered]),
        last_id=ordered[-1][0],
        smallest_distance=min((b - a for a, b in itertools.pairwise(distinct)), default=0.0),
        largest_distance=distinct[-1] - distinct[0],
    )
