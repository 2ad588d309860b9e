"""The vocabulary: every word with its count, most frequent first, as the One Billion Word benchmark defines it.

`<S>` begins a sentence and is never predicted, `</S>` ends it and is predicted, `<UNK>` stands for every word seen
fewer than three times and is predicted and counted like a word. Ids are ranks of frequency: losses that sample or
cluster words by frequency rely on that.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from recipes.common.errors import RecipeError

START, END, UNKNOWN = "<S>", "</S>", "<UNK>"
SPECIALS = (START, END, UNKNOWN)
NOT_WORDS = frozenset((*SPECIALS, "<unk>"))
WORD = re.compile(r"[^ \t\n\r\f\v]+")  # the benchmark's words may hold other Unicode spaces, which str.split cuts at


class Vocabulary:
    """Words in frequency order.

    Args:
        words: every word once, the three special ones among them; a word's position is its id.
        counts: how often each occurs in the training text, or None where the file had no counts.

    Raises:
        RecipeError: a special word is missing, a word stands twice, or the counts are not in frequency order.
    """

    def __init__(self, words: Sequence[str], counts: Sequence[int] | None = None) -> None:
        self.words = list(words)
        self.counts = None if counts is None else list(counts)
        self.ids = {word: number for number, word in enumerate(self.words)}
        missing = [word for word in SPECIALS if word not in self.ids]
        if missing:
            raise RecipeError(
                f"the vocabulary lacks {', '.join(missing)}; all of {', '.join(SPECIALS)} are needed, "
                "each as a line at its place in frequency order"
            )
        if len(self.ids) < len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise RecipeError(f"the word {twice!r} stands twice in the vocabulary; give each word one line")
        self._check_order()
        self.start, self.end, self.unknown = (self.ids[word] for word in SPECIALS)

    def __len__(self) -> int:
        return len(self.words)

    def _check_order(self) -> None:
        if self.counts is None:
            return
        # The special words are exempt: published files put them first whatever their counts.
        plain = [number for number, word in enumerate(self.words) if word not in SPECIALS]
        for before, after in itertools.pairwise(plain):
            if self.counts[after] > self.counts[before]:
                raise RecipeError(
                    f"the vocabulary is not in frequency order: {self.words[after]!r} ({self.counts[after]}) comes "
                    f"after {self.words[before]!r} ({self.counts[before]}); sort it by falling count"
                )

    @property
    def fingerprint(self) -> str:
        """A digest of the words in their order."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()[:16]

    def encode(self, line: str) -> list[int]:
        """The ids of a line's words, without the marks of its ends. Words that are not known become `<UNK>`."""
        get, unknown = self.ids.get, self.unknown
        return [get(word, unknown) for word in words_of(line)]

    @classmethod
    def build(cls, lines: Iterable[str], *, min_count: int = 3, size: int | None = None) -> Vocabulary:
        """Count the words of the training lines.

        Args:
            lines: one sentence a line.
            min_count: words seen less often become `<UNK>`; the benchmark's value is 3.
            size: keep at most so many entries, the three special ones included.

        Raises:
            RecipeError: `min_count` or `size` too small, or no words at all.
        """
        if min_count < 1:
            raise RecipeError(f"min_count is {min_count}; it must be at least 1 (1 keeps every word)")
        if size is not None and size <= len(SPECIALS):
            raise RecipeError(f"vocabulary size {size} leaves no room for words beside the three special ones")
        seen: Counter[str] = Counter()
        sentences = 0
        for line in lines:
            words = words_of(line)
            if words:
                seen.update(words)
                sentences += 1
        if not seen:
            raise RecipeError("the training text holds no words; give text with one sentence a line")
        total = sum(seen.values())
        kept = sorted(
            ((word, count) for word, count in seen.items() if count >= min_count and word != UNKNOWN),
            key=lambda entry: (-entry[1], entry[0]),
        )
        if size is not None:
            kept = kept[: size - len(SPECIALS)]
        unknown = total - sum(count for _, count in kept)
        kept += [(START, sentences), (END, sentences), (UNKNOWN, unknown)]
        kept.sort(key=lambda entry: (-entry[1], entry[0]))
        return cls([word for word, _ in kept], [count for _, count in kept])

    @classmethod
    def read(cls, path: Path) -> Vocabulary:
        """Read `word count` lines, or lines of one word each.

        Raises:
            RecipeError: the file cannot be read, or a line has another form than the first.
        """
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"the vocabulary file {path} cannot be read: {error}") from error
        while lines and not lines[-1].strip():
            lines.pop()
        if not lines:
            raise RecipeError(f"the vocabulary file {path} is empty")
        columns = len(lines[0].split())
        words: list[str] = []
        counts: list[int] = []
        for number, line in enumerate(lines, start=1):
            fields = line.split()
            if len(fields) != columns or columns not in (1, 2) or (columns == 2 and not fields[1].isdecimal()):
                raise RecipeError(
                    f"line {number} of {path} is {line!r}; every line must be `word count`, or every line one word"
                )
            words.append(fields[0])
            if columns == 2:
                counts.append(int(fields[1]))
        return cls(words, counts or None)

    def write(self, path: Path) -> None:
        """Write `word count` lines (words alone where there are no counts); `read` gives the same vocabulary back."""
        columns = zip(self.words, self.counts, strict=True) if self.counts else ((word,) for word in self.words)
        path.write_text("".join(" ".join(map(str, fields)) + "\n" for fields in columns), encoding="utf-8")


def words_of(line: str) -> list[str]:
    """The words of a line. A `<S>` before and a `</S>` behind the sentence, where a text carries them, are dropped;
    anywhere else the special words, and `<unk>`, are `<UNK>`."""
    words = line.split() if line.isascii() else WORD.findall(line)
    if NOT_WORDS.isdisjoint(words):
        return words
    first = 1 if words[0] == START else 0
    last = len(words) - (1 if len(words) > first and words[-1] == END else 0)
    return [UNKNOWN if word in NOT_WORDS else word for word in words[first:last]]
