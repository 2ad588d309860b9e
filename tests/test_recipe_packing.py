"""Which words count: vocabulary, packed blocks and the perplexity over them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_support import sentences, tiny_model

from recipes.common.errors import RecipeError
from recipes.one_billion_word.encoding import Encoded, encode, is_encoded
from recipes.one_billion_word.packing import IGNORED, PackedSentences
from recipes.one_billion_word.perplexity import measure_perplexity
from recipes.one_billion_word.vocabulary import Vocabulary


def test_vocabulary_counts_as_the_benchmark_does() -> None:
    lines = ["b b b a a a a", "c c a e e e", "<unk> d", "<S> a é\u00a0é </S>"]
    vocabulary = Vocabulary.build(lines, min_count=3)
    # <UNK> holds 2 c, 1 d, 1 <unk> and the word with the no-break space; there are 4 sentences
    expected = {"a": 6, "<UNK>": 5, "</S>": 4, "<S>": 4, "b": 3, "e": 3}
    assert dict(zip(vocabulary.words, vocabulary.counts or [], strict=True)) == expected
    assert vocabulary.counts == sorted(vocabulary.counts or [], reverse=True)
    decoded = [[vocabulary.words[number] for number in vocabulary.encode(line)] for line in lines]
    assert decoded[1] == ["<UNK>", "<UNK>", "a", "e", "e", "e"]
    assert decoded[3] == ["a", "<UNK>"]
    assert vocabulary.encode("a <S> a") == [vocabulary.ids["a"], vocabulary.unknown, vocabulary.ids["a"]]


def test_vocabulary_size_keeps_the_most_frequent() -> None:
    lines = [" ".join(f"w{number}" for number in range(limit)) for limit in range(1, 20)]
    vocabulary = Vocabulary.build(lines, min_count=1, size=8)
    assert len(vocabulary) == 8
    assert set(vocabulary.words) == {"<S>", "</S>", "<UNK>", "w0", "w1", "w2", "w3", "w4"}
    total = sum(len(line.split()) for line in lines)
    counts = dict(zip(vocabulary.words, vocabulary.counts or [], strict=True))
    assert sum(counts.values()) - counts["<S>"] - counts["</S>"] == total


@pytest.mark.parametrize("with_counts", [True, False])
def test_vocabulary_file_round_trip(tmp_path: Path, with_counts: bool) -> None:
    built = Vocabulary.build(sentences(100))
    vocabulary = built if with_counts else Vocabulary(built.words)
    vocabulary.write(tmp_path / "vocab.txt")
    read = Vocabulary.read(tmp_path / "vocab.txt")
    assert read.words == vocabulary.words
    assert read.counts == vocabulary.counts
    assert read.fingerprint == vocabulary.fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("a 3\nb 2\n</S> 1\n<UNK> 1\n", "lacks <S>"),
        ("<S> 9\n</S> 9\n<UNK> 9\na 1\na 1\n", "'a' stands twice"),
        ("<S> 9\n</S> 9\n<UNK> 9\na 1\nb 2\n", r"not in frequency order: 'b' \(2\) comes after 'a' \(1\)"),
        ("<S> 9\n</S> 9\n<UNK> 9\na one\n", "line 4 of .* is 'a one'"),
        ("<S> 9\n</S>\n<UNK> 9\n", "line 2 of "),
        ("<S> 9 9\n", "line 1 of "),
    ],
)
def test_bad_vocabulary_file(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "vocab.txt").write_text(content)
    with pytest.raises(RecipeError, match=message):
        Vocabulary.read(tmp_path / "vocab.txt")
    with pytest.raises(RecipeError, match="cannot be read"):
        Vocabulary.read(tmp_path / "nothing.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"min_count": 0}, "min_count is 0"), ({"size": 3}, "vocabulary size 3"), ({"lines": ["", " "]}, "no words")],
)
def test_bad_vocabulary_options(options: dict[str, object], message: str) -> None:
    lines = options.pop("lines", ["a b"])
    with pytest.raises(RecipeError, match=message):
        Vocabulary.build(lines, **options)  # type: ignore[arg-type]


def test_encoding_marks_sentences_and_drops_blank_lines(tmp_path: Path) -> None:
    vocabulary = Vocabulary.build(["a b", "a"], min_count=1)
    words = vocabulary.words
    encoded = encode(["a b", "", "a"], vocabulary, tmp_path / "split")
    assert [words[number] for number in encoded.tokens] == ["<S>", "a", "b", "</S>", "<S>", "a", "</S>"]
    assert list(encoded.starts) == [0, 4, 7]
    assert (encoded.sentences, encoded.predicted, encoded.blank_lines) == (2, 5, 1)
    joined = encode(["a b", "", "a"], vocabulary, tmp_path / "joined", join_lines=True)
    assert [words[number] for number in joined.tokens] == ["<S>", "a", "b", "</S>", "</S>", "a", "</S>"]
    assert (joined.sentences, joined.predicted) == (1, 6)
    with pytest.raises(RecipeError, match="no line with a word"):
        encode(["", " "], vocabulary, tmp_path / "blank")
    assert not is_encoded(tmp_path / "blank")


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    block_length=st.integers(2, 24),
    data=st.data(),
)
def test_every_token_but_the_first_of_a_sentence_is_predicted_once(
    lengths: list[int], block_length: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(1, block_length - 1))
    starts = np.cumsum([0, *lengths])
    tokens = np.arange(1, starts[-1] + 1, dtype=np.int32)  # every token its own id, so that each can be followed
    blocks = PackedSentences(Encoded(tokens, starts), block_length, overlap=overlap, padding=0)
    sentence_of = {
        int(token): number for number, length in enumerate(lengths) for token in tokens[starts[number] :][:length]
    }
    first_tokens = set(tokens[starts[:-1]].tolist())
    predicted: list[int] = []
    for index in range(len(blocks)):
        ids, labels, positions = (blocks[index][name].tolist() for name in ("input_ids", "labels", "position_ids"))
        assert len(ids) == len(labels) == len(positions) == block_length
        assert labels[0] == IGNORED
        assert positions[0] == 0
        assert all(positions[place] == 0 for place in range(block_length) if ids[place] in first_tokens)
        for place in range(block_length):
            if labels[place] == IGNORED:
                continue
            assert labels[place] == ids[place]
            assert ids[place - 1] == ids[place] - 1  # predicted from the token before it
            assert positions[place] == positions[place - 1] + 1  # which is of the same piece
            assert sentence_of[ids[place]] == sentence_of[ids[place - 1]]
            predicted.append(labels[place])
    assert sorted(predicted) == sorted(set(tokens.tolist()) - first_tokens)
    assert blocks.predicted == len(predicted)
    if max(lengths) <= block_length:
        assert blocks.predicted == Encoded(tokens, starts).predicted


def test_cut_sentences_keep_their_context() -> None:
    blocks = PackedSentences(Encoded(np.arange(10, dtype=np.int32), np.array([0, 10])), 6, overlap=3, padding=-7)
    rows = [(block["input_ids"].tolist(), block["labels"].tolist()) for block in (blocks[0], blocks[1], blocks[2])]
    assert rows[0] == ([0, 1, 2, 3, 4, 5], [IGNORED, 1, 2, 3, 4, 5])
    assert rows[1] == ([3, 4, 5, 6, 7, 8], [IGNORED, IGNORED, IGNORED, 6, 7, 8])
    assert rows[2] == ([6, 7, 8, 9, -7, -7], [IGNORED, IGNORED, IGNORED, 9, IGNORED, IGNORED])
    with pytest.raises(IndexError):
        blocks[3]


@pytest.mark.parametrize(("length", "overlap"), [(1, 1), (8, 0), (8, 8)])
def test_bad_packing_options(length: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=r"block_length|overlap"):
        PackedSentences(Encoded(np.arange(4), np.array([0, 4])), length, overlap=overlap)


@pytest.mark.parametrize("max_logits", [1, 1000, 1 << 25])
def test_perplexity_is_that_of_each_sentence_alone(tmp_path: Path, max_logits: int) -> None:
    lines = sentences(25)
    vocabulary = Vocabulary.build(lines, min_count=2)
    model = tiny_model(len(vocabulary))
    nll, count = 0.0, 0
    with torch.no_grad():
        for line in lines:
            ids = torch.tensor([[vocabulary.start, *vocabulary.encode(line), vocabulary.end]])
            probabilities = model(input_ids=ids).logits.double().softmax(-1)[0]
            for place in range(ids.shape[1] - 1):
                nll -= math.log(probabilities[place, ids[0, place + 1]])
                count += 1
    blocks = PackedSentences(encode(lines, vocabulary, tmp_path / "split"), 32, overlap=16, padding=vocabulary.end)
    assert len(blocks) < len(lines)  # sentences do share blocks
    measured = measure_perplexity(model, blocks, batch_size=3, max_logits=max_logits)
    assert measured.tokens == count == sum(len(line.split()) + 1 for line in lines)
    assert measured.nll == pytest.approx(nll, rel=1e-5)
    assert measured.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert not model.training
