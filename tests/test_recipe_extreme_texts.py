"""Texts and token ids that stay on disk, the embedded data set, and the real one where it is at hand."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

pytest.importorskip("scipy")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from recipes.common.errors import RecipeError
from recipes.extreme_classification.dataset import load
from recipes.extreme_classification.embedded import embedded_splits, in_words
from recipes.extreme_classification.readers.text import MappedLines, write_lines
from recipes.extreme_classification.readers.tokens import padded, tokenize

SHARED = Path(os.environ.get("XHEAD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def test_mapped_lines(tmp_path: Path) -> None:
    texts = ["", "Größe", "two\nlines", "x" * 100]
    lines = write_lines(texts, tmp_path / "lines.txt")
    expected = ["", "Größe", "two lines", "x" * 100]
    assert len(lines) == 4
    assert list(lines) == expected == list(pickle.loads(pickle.dumps(lines)))
    assert lines[-1] == expected[-1]
    assert lines[1:3] == expected[1:3]
    with pytest.raises(IndexError):
        lines[4]
    (tmp_path / "broken.txt").write_bytes(b"good\n\xff\nlast")
    broken = MappedLines(tmp_path / "broken.txt")
    assert broken[0] == "good"
    assert broken[2] == "last"
    with pytest.raises(RecipeError, match=r"broken\.txt, line 2: not UTF-8"):
        broken[1]
    (tmp_path / "empty.txt").touch()
    assert len(MappedLines(tmp_path / "empty.txt")) == 0


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(["[UNK]", "[PAD]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


def test_token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["red fox", "", "fox fox fox red", "unknown"]
    tokenizer = word_tokenizer(["red", "fox"])
    path = tmp_path / "ids"
    tokens = tokenize(texts, tokenizer, 3, path)
    assert [tokens[row].tolist() for row in range(len(tokens))] == [[2, 3], [], [3, 3, 3], [0]]
    again = pickle.loads(pickle.dumps(tokens))
    ids, mask = padded([again[2], again[0]], padding=1)
    assert ids.tolist() == [[3, 3, 3], [2, 3, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]

    monkeypatch.setattr(type(tokenizer), "__call__", lambda *_, **__: pytest.fail("tokenized again"))
    assert len(tokenize(texts, tokenizer, 3, path)) == 4
    monkeypatch.undo()
    assert tokenize([*texts[:3], "red"], tokenizer, 3, path)[3].tolist() == [2]
    assert tokenize(texts, tokenizer, 4, path)[2].tolist() == [3, 3, 3, 2]
    assert tokenize(texts, word_tokenizer(["fox", "red"]), 4, path)[0].tolist() == [3, 2]

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer), "__call__", fail)
    with pytest.raises(KeyboardInterrupt):
        tokenize(texts, tokenizer, 2, path)
    monkeypatch.undo()
    assert tokenize(texts, tokenizer, 2, path)[2].tolist() == [3, 3]


def test_embedded_set_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(
        '"""Of the module: left out."""\n'
        "class Reader:\n"
        '    """Reads.\n\n    More of it.\n    """\n'
        "    limit = sizeLimit\n"
        "    def read_all(self):\n"
        '        """Read all."""\n'
        "        return self.raw_file.read()\n"
        "def empty():\n"
        '    """Uses nothing."""\n'
    )
    (tmp_path / "broken.py").write_text("def (")
    splits = embedded_splits("title", tmp_path)
    found: dict[str, list[str]] = {}
    for split in (splits.train, splits.test):
        assert split.texts is not None
        assert split.label_texts is not None
        for row, text in enumerate(split.texts):
            found[text] = sorted(split.label_texts[label] for label in split.labels[row].indices)
    assert found == {
        "Read all.": ["raw file", "read", "self"],
        "Reads.": ["limit", "raw file", "read", "self", "size limit"],
    }
    assert [in_words(name) for name in ("readFile_now", "HTTPServer", "_", "x2")] == [
        "read file now",
        "http server",
        "_",
        "x2",
    ]


def test_embedded_set() -> None:
    titles, contents = load(), load(text="content")
    train, test = titles.train, titles.test
    assert 6_000 < train.shape[0] < 12_000
    assert 400 < test.shape[0] < 1_300
    assert 12_000 < train.shape[1] < 30_000
    assert 10 < train.labels.nnz / train.shape[0] < 20
    assert not set(contents.train.texts or ()) & set(contents.test.texts or ())
    assert (titles.train.labels != contents.train.labels).nnz == 0
    assert train.label_texts is not None
    assert all(train.label_texts)


@pytest.mark.skipif(
    not (SHARED / "LF-TIBKAT-41K").is_dir(), reason="no folder LF-TIBKAT-41K in XHEAD_DATA or in ../shared/data"
)
def test_library_records() -> None:
    splits = load(SHARED / "LF-TIBKAT-41K", features=False)
    assert splits.train.shape == (90_452, 41_218)
    assert splits.test.shape == (19_949, 41_218)
    assert round(splits.train.labels.nnz / 90_452, 2) == 2.85
    assert int((splits.train.labels.getnnz(axis=0) == 0).sum()) == 6_102
