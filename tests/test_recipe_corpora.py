"""What the One Billion Word recipe reads from each form of data, and what it says of data that it cannot use."""

from __future__ import annotations

import gzip
import itertools
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from recipe_support import sentences, write_text

from recipes.common.errors import RecipeError
from recipes.one_billion_word.corpora import load_corpus
from recipes.one_billion_word.corpora.embedded import split_sentences
from recipes.one_billion_word.encoding import encode
from recipes.one_billion_word.train import main
from recipes.one_billion_word.vocabulary import Vocabulary

SHARED = Path(os.environ.get("XHEAD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def needs_data(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (SHARED / name).is_dir(), reason=f"no folder {name} in XHEAD_DATA or beside the project in ../shared/data"
    )


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    return write_text(tmp_path)


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
    with pytest.raises(RecipeError, match=r"need pyarrow: pip install -e '\.\[data\]'"):
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
