"""The One Billion Word recipe: what is read, counted and predicted, and that a killed run goes on."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, set_seed

import xhead
from recipes.one_billion_word.checkpoints import STATE, find_checkpoint
from recipes.one_billion_word.corpora import load_corpus
from recipes.one_billion_word.corpora.embedded import split_sentences
from recipes.one_billion_word.demo import comparison, loss_difference
from recipes.one_billion_word.encoding import Encoded, encode, is_encoded
from recipes.one_billion_word.errors import RecipeError
from recipes.one_billion_word.memory import _peak_cpu, measure_loss_memory
from recipes.one_billion_word.options import parse_options
from recipes.one_billion_word.packing import IGNORED, PackedSentences
from recipes.one_billion_word.perplexity import measure_perplexity
from recipes.one_billion_word.train import main, run
from recipes.one_billion_word.vocabulary import Vocabulary

SHARED = Path(os.environ.get("XHEAD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def needs_data(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (SHARED / name).is_dir(), reason=f"no folder {name} in XHEAD_DATA or beside the project in ../shared/data"
    )


def sentences(number: int, seed: int = 0) -> list[str]:
    """Sentences of a small made-up language whose next word depends on the last: there is something to learn."""
    generator = np.random.default_rng(seed)
    lines = []
    for _ in range(number):
        word, words = int(generator.integers(40)), []
        for _ in range(int(generator.integers(1, 14))):
            words.append(f"w{word}")
            word = (word * 7 + int(generator.integers(3))) % 40
        lines.append(" ".join(words))
    return lines


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for split, number in (("train", 300), ("valid", 30), ("test", 40)):
        (folder / f"{split}.txt").write_text("\n".join(sentences(number, seed=number)) + "\n")
    return folder


def tiny_model(vocabulary_size: int, block_length: int = 64) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=block_length,
        initializer_range=0.5,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


# --- corpora ---------------------------------------------------------------------------------------------------------


def make_official(root: Path, shards: tuple[int, ...] = (1, 2), held_out: tuple[int, ...] = (0, 1, 2)) -> None:
    training = root / "training-monolingual.tokenized.shuffled"
    held = root / "heldout-monolingual.tokenized.shuffled"
    training.mkdir(parents=True)
    held.mkdir()
    for shard in shards:
        (training / f"news.en-{shard:05d}-of-00100").write_text(f"train shard {shard}\n")
    (held / "news.en-00000-of-00100").write_text("the whole held-out shard\n")
    for part in held_out:
        (held / f"news.en.heldout-{part:05d}-of-00050").write_text(f"held out {part}\n")


def test_official_folder_takes_the_published_test_set(tmp_path: Path) -> None:
    make_official(tmp_path / "archive" / "inner", shards=(0, 2, 1))
    corpus = load_corpus(str(tmp_path / "archive"))
    assert list(corpus.lines("train")) == ["train shard 1", "train shard 2"]  # 0 is the held-out shard
    assert list(corpus.lines("valid")) == ["held out 1"]
    assert list(corpus.lines("test")) == ["held out 0"]
    assert "heldout-00000-of-00050" in corpus.test_name
    assert "2 of its 99" in corpus.name


def test_official_folder_without_the_test_file_is_refused(tmp_path: Path) -> None:
    make_official(tmp_path, held_out=(1, 2))
    with pytest.raises(RecipeError, match=r"lacks news\.en\.heldout-00000-of-00050"):
        load_corpus(str(tmp_path))


def test_official_folder_without_training_shards_is_refused(tmp_path: Path) -> None:
    make_official(tmp_path, shards=(0,))
    with pytest.raises(RecipeError, match="holds no file news"):
        load_corpus(str(tmp_path))


def test_one_text_file_is_split_without_loss_or_overlap(tmp_path: Path) -> None:
    lines = [f"{number} {word}" for number, word in enumerate(sentences(2000))]
    lines += lines[:200]
    with gzip.open(tmp_path / "all.tokens.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    corpus = load_corpus(str(tmp_path))
    parts = {split: list(corpus.lines(split)) for split in ("train", "valid", "test")}
    assert Counter(itertools.chain(*parts.values())) == Counter(lines)
    for one, other in itertools.combinations(parts.values(), 2):
        assert not set(one) & set(other)
    assert 60 < len(parts["valid"]) < 160
    assert 60 < len(parts["test"]) < 160


def test_named_files_are_the_splits_and_a_missing_one_is_taken_from_training(text_folder: Path) -> None:
    corpus = load_corpus(str(text_folder))
    assert list(corpus.lines("train")) == (text_folder / "train.txt").read_text().splitlines()
    assert list(corpus.lines("test")) == (text_folder / "test.txt").read_text().splitlines()
    assert corpus.test_name == "test.txt"
    (text_folder / "valid.txt").unlink()
    corpus = load_corpus(str(text_folder))
    together = Counter(corpus.lines("train")) + Counter(corpus.lines("valid"))
    assert together == Counter((text_folder / "train.txt").read_text().splitlines())
    assert any(corpus.lines("valid"))


def test_valid_limit_cuts_validation_only(text_folder: Path) -> None:
    corpus = load_corpus(str(text_folder))
    limited = corpus.with_valid_limit(7)
    assert list(limited.lines("valid")) == list(corpus.lines("valid"))[:7]
    assert list(limited.lines("test")) == list(corpus.lines("test"))
    assert limited.identity != corpus.identity


def test_parquet_folder(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the extra `data`")
    parquet = pytest.importorskip("pyarrow.parquet")
    for split in ("train", "test"):
        table = pyarrow.table({"text": [f"{split} sentence {number}" for number in range(200)]})
        parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    corpus = load_corpus(str(tmp_path))
    assert list(corpus.lines("test")) == [f"test sentence {number}" for number in range(200)]
    train, valid = list(corpus.lines("train")), list(corpus.lines("valid"))
    assert sorted(train + valid) == sorted(f"train sentence {number}" for number in range(200))
    assert valid

    parquet.write_table(pyarrow.table({"sentence": ["a b"]}), tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(RecipeError, match=r"columns \['sentence'\].*'text' is needed"):
        list(load_corpus(str(tmp_path)).lines("train"))


def test_a_dataset_name_is_loaded_and_its_failure_told(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets by name need the extra `data`")

    def table(split: str) -> object:
        return datasets.Dataset.from_dict({"text": [f"{split} {number}" for number in range(100)]})

    loaded = datasets.DatasetDict({"train": table("train"), "test": table("test")})
    monkeypatch.setattr(datasets, "load_dataset", lambda name: loaded)
    corpus = load_corpus("someone/lm1b")
    assert list(corpus.lines("test")) == [f"test {number}" for number in range(100)]
    assert len(list(corpus.lines("train"))) + len(list(corpus.lines("valid"))) == 100
    assert "whole test split" in corpus.test_name

    def refuse(name: str) -> None:
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(RecipeError, match=r"'someone/lm1b'.*no longer supported(.|\n)*--data takes one of"):
        load_corpus("someone/lm1b")


def test_embedded_corpus() -> None:
    corpus = load_corpus()
    parts = {split: list(corpus.lines(split)) for split in ("train", "valid", "test")}
    words = sum(len(line.split()) for part in parts.values() for line in part)
    assert words > 300_000
    assert not set(parts["test"]) & set(parts["train"])
    assert not set(parts["test"]) & set(parts["valid"])
    assert list(corpus.lines("test")) == parts["test"]


def test_split_sentences() -> None:
    text = 'First one. "Second" one!\nstill second\n\n>>> code()\nThird\n-----\nStop'
    assert list(split_sentences(text)) == ["First one .", '" Second " one ! still second', "Third Stop"]


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(RecipeError, match=r"need pyarrow: pip install 'xhead\[data\]'"):
        list(load_corpus(str(tmp_path)).lines("train"))


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="parquet needs the extra `data`")
    (tmp_path / "train.parquet").write_bytes(b"not parquet, though it is called so")
    with pytest.raises(RecipeError, match=r"train\.parquet cannot be read as parquet"):
        list(load_corpus(str(tmp_path)).lines("train"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, r"does not exist(.|\n)*--data takes one of"),
        ("empty", {}, r"holds no file that is understood(.|\n)*--data takes one of"),
        ("other", {"notes.md": b"a b c"}, "holds no file that is understood"),
        ("binary", {"train.txt": b"\xff\xfe\xfa broken"}, "cannot be read as UTF-8"),
        ("notgzip", {"train.txt.gz": b"plain"}, "cannot be read as UTF-8"),
        ("blank", {"train.txt": b"\n\n\n"}, "holds no words"),
    ],
)
def test_bad_data_is_a_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: dict[str, bytes] | None, message: str
) -> None:
    folder = tmp_path / name
    if content is not None:
        folder.mkdir()
        for file, written in content.items():
            (folder / file).write_bytes(written)
    with pytest.raises(SystemExit) as ended:
        main(["--data", str(folder), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(message, error)


# --- vocabulary ------------------------------------------------------------------------------------------------------


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


# --- encoding and packing --------------------------------------------------------------------------------------------


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


# --- perplexity ------------------------------------------------------------------------------------------------------


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


# --- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "nonsense"], r"--loss is 'nonsense'; known: stock, .*cce"),
        (["--hidden_size", "30", "--attention_heads", "4"], "--hidden_size is 30"),
        (["--loss_options", "{}}", "--loss", "cce"], "not JSON"),
        (["--loss_options", "[1]", "--loss", "cce"], "JSON object"),
        (["--loss_options", '{"filter_eps": 0}'], "needs a --loss other than stock"),
        (["--loss", "cce", "--loss_options", '{"nonsense": 1}'], "nonsense"),
        (["--bloc_length", "3"], "not understood: --bloc_length 3"),
        (["--block_length", "3"], "--block_length is 3; it must be at least 8"),
        (["--save_steps", "15", "--logging_steps", "10"], "--save_steps 15 must be a multiple"),
        (["--vocab", "x", "--vocab_size", "9"], "exclude each other"),
        (["--vocab", "nothing.txt"], "nothing.txt cannot be read"),
    ],
)
def test_bad_options_are_clear_errors(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--data", str(text_folder), "--output_dir", str(tmp_path / "run"), "--use_cpu", "True", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def command(data: Path, output: Path, *more: str) -> list[str]:
    fixed = {
        "data": data,
        "output_dir": output,
        "hidden_size": 16,
        "layers": 1,
        "attention_heads": 2,
        "block_length": 32,
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "logging_steps": 1,
        "save_steps": 5,
        "valid_steps": 4,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return [word for name, value in fixed.items() for word in (f"--{name}", str(value))] + list(more)


def losses(results: dict) -> list[tuple[int, float]]:
    return [
        (entry["step"], entry[key]) for entry in results["history"] for key in ("loss", "valid_loss") if key in entry
    ]


class KilledAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Steps(TrainerCallback):
    def __init__(self) -> None:
        self.taken: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.taken.append(state.global_step)


@pytest.mark.parametrize(("step", "checkpoint"), [(3, 0), (8, 5)])
def test_a_killed_run_goes_on_to_the_same_losses(text_folder: Path, tmp_path: Path, step: int, checkpoint: int) -> None:
    whole = run(*parse_options(command(text_folder, tmp_path / "whole")))
    with pytest.raises(KeyboardInterrupt):
        run(*parse_options(command(text_folder, tmp_path / "cut")), callbacks=[KilledAt(step)])
    steps = Steps()
    resumed = run(*parse_options(command(text_folder, tmp_path / "cut", "--resume")), callbacks=[steps])
    assert steps.taken == list(range(checkpoint + 1, 13))
    assert resumed["steps"] == 12
    assert [place for place, _ in losses(whole)] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]
    assert [place for place, _ in losses(resumed)] == [place for place, _ in losses(whole)]
    np.testing.assert_allclose([x for _, x in losses(resumed)], [x for _, x in losses(whole)], rtol=0, atol=1e-6)
    assert resumed["test"] == pytest.approx(whole["test"], abs=1e-5)


def test_output_folders_of_other_runs_are_refused(text_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(*parse_options(command(text_folder, output, "--max_steps", "5")))
    with pytest.raises(RecipeError, match="add --resume"):
        run(*parse_options(command(text_folder, output)))
    with pytest.raises(RecipeError, match="belong to another run: layers was 1 and is 2"):
        run(*parse_options(command(text_folder, output, "--layers", "2", "--resume")))
    with pytest.raises(RecipeError, match="belong to another run: data was"):
        run(*parse_options(command(text_folder, output, "--vocab_size", "20", "--resume")))


def test_a_checkpoint_cut_while_written_is_passed_over(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    for step in (5, 10, 100, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step, content in ((5, "{}"), (10, "{}"), (100, '{"cut":')):
        (tmp_path / f"checkpoint-{step}" / STATE).write_text(content)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


def test_outputs_of_a_run(text_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    results = run(*parse_options(command(text_folder, output, "--save_head_inputs", "50", "--measure_memory")))
    assert json.loads((output / "results.json").read_text()) == results
    assert (output / "losses.png").stat().st_size > 1000
    vocabulary = Vocabulary.read(output / "vocabulary.txt")
    test_words = (text_folder / "test.txt").read_text()
    assert results["test"]["tokens"] == len(test_words.split()) + len(test_words.splitlines())
    first = [entry["valid_loss"] for entry in results["history"] if "valid_loss" in entry]
    assert first[-1] < first[0] < math.log(len(vocabulary)) + 0.5

    saved = load_file(output / "head_inputs.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == {
        "hidden": (50, 16),
        "weight": (len(vocabulary), 16),
        "target": (50,),
    }
    model = LlamaForCausalLM.from_pretrained(output / "model").eval()
    corpus = load_corpus(str(text_folder))
    predicted: list[int] = []
    nll: list[torch.Tensor] = []
    for line in corpus.lines("valid"):
        ids = torch.tensor([[vocabulary.start, *vocabulary.encode(line), vocabulary.end]])
        with torch.no_grad():
            nll.append(F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"))
        predicted += ids[0, 1:].tolist()
    assert saved["target"].tolist() == predicted[:50]
    from_saved = F.cross_entropy(saved["hidden"] @ saved["weight"].T, saved["target"], reduction="none")
    torch.testing.assert_close(from_saved, torch.cat(nll)[:50], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tie", [True, False])
def test_patched_training_equals_stock(text_folder: Path, tmp_path: Path, tie: bool) -> None:
    arguments = ("--tie_embeddings", str(tie), "--gradient_accumulation_steps", "2")
    stock = run(*parse_options(command(text_folder, tmp_path / "stock", *arguments)))
    patched = run(*parse_options(command(text_folder, tmp_path / "cce", *arguments, "--loss", "cce")))
    np.testing.assert_allclose([x for _, x in losses(patched)], [x for _, x in losses(stock)], rtol=0, atol=1e-4)
    assert patched["patch"] == {"cut": 24, "materialized": 0}
    assert patched["valid"]["tokens"] == stock["valid"]["tokens"]


# --- memory and demo -------------------------------------------------------------------------------------------------


def test_peak_counts_what_is_held_at_once() -> None:
    def call() -> None:
        first = torch.ones(250_000)
        second = first + 1
        del first
        third = second + 1
        del second, third

    assert _peak_cpu(call) == pytest.approx(2 * 250_000 * 4, rel=0.01)


def test_loss_memory_of_stock_holds_the_logits_and_of_the_patch_does_not() -> None:
    model = tiny_model(5000)
    ids = torch.randint(0, 5000, (4, 64))
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(64).expand(4, -1)}
    stock = measure_loss_memory(model, batch, torch.enable_grad())
    assert stock["logits"] == 4 * 64 * 5000 * 4
    assert stock["gradients"] == (5000 + 4 * 64) * 16 * 4
    assert stock["peak"] > 2 * stock["logits"]
    assert all(parameter.grad is None for parameter in model.parameters())
    xhead.patch(model, loss="cce", filter_eps=None)
    patched = measure_loss_memory(model, batch, torch.enable_grad())
    assert patched["peak"] - patched["gradients"] < stock["logits"]


def side(loss: str, train: float, valid: float, peak: int) -> dict:
    return {
        "data": "some text",
        "loss": loss,
        "vocabulary": 1000,
        "parameters": 5000,
        "steps": 10,
        "tokens_per_step": 64,
        "train_loss": train,
        "valid": {"loss": valid},
        "loss_memory_bytes": {"peak": peak, "gradients": 10_000_000, "logits": 100_000_000},
        "process_peak_bytes": 500_000_000,
        "seconds_per_step_in_turn_median": 0.5,
    }


def test_demo_table() -> None:
    stock, patched = side("stock", 5.0, 5.2, 310_000_000), side("cce", 5.0002, 5.2, 13_000_000)
    assert loss_difference(stock, patched) == pytest.approx(2e-4)
    table = comparison(stock, patched)
    assert "equal: they differ by 2.0e-04" in table
    (beyond,) = (line.split() for line in table.splitlines() if "beyond" in line)
    assert beyond[-3:] == ["300.0", "3.0", "0.010"]
    assert "DIFFERENT: they differ by 2.0e-01" in comparison(stock, side("cce", 5.0, 5.4, 13_000_000))


@pytest.mark.slow
def test_demo_end_to_end(text_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    small = [
        "--max_steps",
        "6",
        "--hidden_size",
        "16",
        "--layers",
        "1",
        "--valid_steps",
        "3",
        "--data",
        str(text_folder),
    ]
    subprocess.run(
        [sys.executable, "-m", "recipes.one_billion_word.demo", "--output_dir", str(output), *small],
        check=True,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert (output / "losses.png").exists()
    assert "patched / stock" in (output / "table.txt").read_text()


@pytest.mark.slow
def test_two_processes_train_and_measure_as_one(text_folder: Path, tmp_path: Path) -> None:
    one = run(*parse_options(command(text_folder, tmp_path / "one", "--loss", "cce")))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "recipes.one_billion_word"]
    arguments = command(text_folder, tmp_path / "two", "--loss", "cce", "--per_device_train_batch_size", "2")
    subprocess.run([sys.executable, *launch, *arguments], check=True, cwd=Path(__file__).resolve().parents[1])
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["tokens_per_step"] == one["tokens_per_step"]
    np.testing.assert_allclose([x for _, x in losses(two)], [x for _, x in losses(one)], rtol=0, atol=1e-4)
    assert two["test"] == pytest.approx(one["test"], abs=1e-4)


# --- real data -------------------------------------------------------------------------------------------------------


@needs_data("lm1b-sample")
def test_the_benchmark_sample_has_its_words() -> None:
    corpus = load_corpus(str(SHARED / "lm1b-sample"))
    lines = [line for split in ("train", "valid", "test") for line in corpus.lines(split)]
    words = Counter(word for line in lines for word in line.split())
    assert (len(lines), sum(words.values()), len(words)) == (12_216, 310_490, 32_785)


@needs_data("wikitext-2")
def test_wikitext_token_counts(tmp_path: Path) -> None:
    corpus = load_corpus(str(SHARED / "wikitext-2"))
    vocabulary = Vocabulary.build(corpus.lines("train"))
    assert len(vocabulary) == 33_278 + 1  # beside the published types there is <S>; <unk> and <eos> are among them
    assert encode(corpus.lines("valid"), vocabulary, tmp_path / "valid", join_lines=True).predicted == 217_646
    assert encode(corpus.lines("test"), vocabulary, tmp_path / "test", join_lines=True).predicted == 245_569
