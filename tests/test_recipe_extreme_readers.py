"""What the readers of extreme-classification files make of each form, and what they say of files that are broken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy.sparse import csr_matrix, save_npz

from recipes.common.errors import RecipeError
from recipes.extreme_classification.dataset import Splits, load
from recipes.extreme_classification.readers.text import MappedLines

TRAIN = [("red fox", "runs", [0, 2]), ("blue bird", "", [1]), ("nothing", "here", [])]
TEST = [("red bird", "flies", [2, 1]), ("Größe", "groß", [0])]
LABELS = ["fox", "bird", "red"]


def write_json(path: Path, records: list[dict[str, object]]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def json_folder(root: Path) -> Path:
    for name, documents in (("trn", TRAIN), ("tst", TEST)):
        write_json(
            root / f"{name}.json.gz",
            [
                {"uid": str(number), "title": title, "content": content, "target_ind": labels}
                for number, (title, content, labels) in enumerate(documents)
            ],
        )
    write_json(root / "lbl.json.gz", [{"uid": f"u{number}", "title": text} for number, text in enumerate(LABELS)])
    return root


def pairs_folder(root: Path) -> Path:
    """Labels and features as `column:value` lines, texts one a line."""
    for name, documents in (("trn", TRAIN), ("tst", TEST)):
        rows = [" ".join(f"{label}:1.00000" for label in labels) for _, _, labels in documents]
        (root / f"{name}_X_Y.txt").write_text(f"{len(rows)} 3\n" + "\n".join(rows) + "\n")
        (root / f"{name}_X_Xf.txt").write_text(f"{len(rows)} 4\n" + "0:0.5 3:1.5\n" * len(rows))
        (root / f"{name}_X.txt").write_text("".join(f"{title}\n" for title, _, _ in documents), encoding="utf-8")
    (root / "Y.txt").write_text("\n".join(LABELS))
    return root


def old_folder(root: Path) -> Path:
    """The older form: labels and features on one line."""
    for name, documents in (("train", TRAIN), ("test", TEST)):
        rows = [",".join(map(str, labels)) + " 0:0.5 3:1.5" for _, _, labels in documents]
        (root / f"{name}.txt").write_text(f"{len(rows)} 4 3\n" + "\n".join(rows) + "\n")
    return root


def npz_folder(root: Path) -> Path:
    (root / "raw").mkdir()
    for name, documents in (("trn", TRAIN), ("tst", TEST)):
        save_npz(root / f"Y.{name}.npz", dense_labels(documents))
        (root / "raw" / f"{name}_X.txt").write_text(
            "".join(f"{title}\n" for title, _, _ in documents), encoding="utf-8"
        )
    (root / "raw" / "Y.txt").write_text("\n".join(LABELS))
    return root


def dense_labels(documents: list[tuple[str, str, list[int]]]) -> csr_matrix:
    dense = np.zeros((len(documents), 3))
    for row, (_, _, labels) in enumerate(documents):
        dense[row, labels] = 1
    return csr_matrix(dense)


def check(splits: Splits, texts: bool = True) -> None:
    for split, documents in ((splits.train, TRAIN), (splits.test, TEST)):
        np.testing.assert_array_equal(split.labels.toarray(), dense_labels(documents).toarray())
        if texts:
            assert split.texts is not None
            assert list(split.texts) == [title for title, _, _ in documents]
            assert split.label_texts == LABELS


def test_json_lines(tmp_path: Path) -> None:
    splits = load(json_folder(tmp_path))
    check(splits)
    assert splits.filter is None
    content = load(tmp_path, "content", cache=tmp_path / "cache").train.texts
    assert isinstance(content, MappedLines)
    assert list(content) == ["red fox runs", "blue bird", "nothing here"]


@pytest.mark.parametrize("write", [pairs_folder, npz_folder])
def test_sparse_labels_with_texts(tmp_path: Path, write) -> None:
    splits = load(write(tmp_path))
    check(splits)
    assert splits.train.features is None


@pytest.mark.parametrize("write", [pairs_folder, old_folder])
def test_features(tmp_path: Path, write) -> None:
    splits = load(write(tmp_path), features=True)
    check(splits, texts=splits.train.texts is not None)
    for split in (splits.train, splits.test):
        assert split.features is not None
        np.testing.assert_array_equal(split.features.toarray(), [[0.5, 0, 0, 1.5]] * split.shape[0])


def test_a_document_without_labels_may_start_with_its_features(tmp_path: Path) -> None:
    old_folder(tmp_path)
    (tmp_path / "train.txt").write_text("2 4 3\n0:0.5\n2 \n")
    splits = load(tmp_path)
    np.testing.assert_array_equal(splits.train.labels.toarray(), [[0, 0, 0], [0, 0, 1]])


@pytest.mark.parametrize("name", ["filter_labels_test.txt", "filter_labels_text.txt", "tst_filter_labels.txt"])
def test_filter_files_by_each_of_their_names(tmp_path: Path, name: str) -> None:
    json_folder(tmp_path)
    (tmp_path / name).write_text("0 2\n1 0\n")
    splits = load(tmp_path)
    assert splits.filter is not None
    assert splits.filter.tolist() == [[0, 2], [1, 0]]
    assert name in splits.name
    (tmp_path / name).write_text("0 2\n2 0\n")
    with pytest.raises(RecipeError, match=rf"{name}, line 2: pair 2 0 is out of range: 2 documents, 3 labels"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object with the key `title`"),
        ('{"title": 3, "target_ind": [0]}', "`title` is 3; it must be a string"),
        ('{"title": "a"}', "`target_ind` is None"),
        ('{"title": "a", "target_ind": [3]}', "label 3 is out of range; it must be from 0 to 2"),
        ('{"title": "a", "target_ind": [-1]}', "label -1 is out of range"),
        ('{"title": "a", "target_ind": [true]}', "a list of label indices"),
        ('{"title": "a", "target_ind": [1, 1]}', "named twice"),
        ('{"title": "a", "target_ind": [0], "target_rel": [1, 1]}', "1 labels in `target_ind`, 2 in `target_rel`"),
        ('{"title": "a", "target_ind": [0], "target_rel": [NaN]}', "finite numbers"),
    ],
)
def test_a_broken_json_line_is_named(tmp_path: Path, record: str, message: str) -> None:
    json_folder(tmp_path)
    with gzip.open(tmp_path / "tst.json.gz", "at") as file:
        file.write(record + "\n")
    with pytest.raises(RecipeError, match=rf"tst\.json\.gz, line 3: (.|\n)*{message}"):
        load(tmp_path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*tst*"))


def test_a_cut_or_undecodable_file_is_named(tmp_path: Path) -> None:
    whole = (json_folder(tmp_path) / "trn.json.gz").read_bytes()
    (tmp_path / "trn.json.gz").write_bytes(whole[:-20])
    with pytest.raises(RecipeError, match=r"trn\.json\.gz, line \d+: cannot be read"):
        load(tmp_path)
    (tmp_path / "trn.json.gz").write_bytes(gzip.compress(b'{"title": "a", "target_ind": [0]}\n\xff\n'))
    with pytest.raises(RecipeError, match=r"trn\.json\.gz, line 2: (.|\n)*UTF-8"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3 3\n0:1\n1:1\n", "line 1: the header says 3 rows, and the file has 2"),
        ("1 3\n0:1\n1:1\n", "line 3: the header in line 1 says 1 rows, and here is one more"),
        ("2 3\n0:1\n3:1\n", "line 3: column 3 is out of range: the header says 0 to 2"),
        ("2 3\n0:1\n1:2:3\n", "line 3: '1:2:3' is not of the form column:value"),
        ("2 3\n0\n1:1\n", "line 2: '0' is not of the form"),
        ("2 3\n0:inf\n1:1\n", "line 2: a value is not finite"),
        ("2 3 4\n0:1\n1:1\n", "line 1: '2 3 4' is no header of the form `rows columns`"),
        ("", "line 1: '' is no header"),
    ],
)
def test_a_broken_sparse_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    pairs_folder(tmp_path)
    (tmp_path / "trn_X_Y.txt").write_text(text)
    with pytest.raises(RecipeError, match=rf"trn_X_Y\.txt, {message}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 4 3\n0 0:1\n5 0:1\n", "line 3: label 5 is out of range: the header says 0 to 2"),
        ("2 4 3\n0 0:1\n1,x 0:1\n", "line 3: '1,x' is not a list of labels"),
        ("2 4 3\n0 0:1\n1 4:1\n", "line 3: feature 4 is out of range"),
        ("2 4 3\n0 0:1\n-1 0:1\n", "line 3: label -1 is out of range: the header says 0 to 2"),
        ("3 4 3\n0 0:1\n1 0:1\n", "line 1: the header says 3 rows, and the file has 2: it may be cut short"),
        ("1 4 3\n0 0:1\n1 0:1\n", "line 3: the header in line 1 says 1 rows, and here is one more"),
        ("2 4\n0 0:1\n1 0:1\n", "line 1: '2 4' is no header of the form `documents features labels`"),
        ("2 -4 3\n0 0:1\n1 0:1\n", "line 1: '2 -4 3' is no header"),
    ],
)
def test_a_broken_file_of_the_older_form_is_named(tmp_path: Path, text: str, message: str) -> None:
    old_folder(tmp_path)
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(RecipeError, match=rf"train\.txt, {message}"):
        load(tmp_path)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    npz_folder(tmp_path)
    (tmp_path / "raw" / "tst_X.txt").write_text("one\n")
    with pytest.raises(RecipeError, match=f"{tmp_path}, test split: 1 texts for a label matrix of 2 documents"):
        load(tmp_path)
    (tmp_path / "raw" / "Y.txt").write_text("one\n")
    with pytest.raises(RecipeError, match=r"labels: 3 in .*Y.trn.npz, 3 in .*Y.tst.npz, 1 in the label texts"):
        load(tmp_path)
    (tmp_path / "Y.tst.npz").write_bytes(b"no zip")
    with pytest.raises(RecipeError, match=r"Y\.tst\.npz is no sparse matrix"):
        load(tmp_path)


@pytest.mark.parametrize("texts", [True, False])
def test_headers_that_disagree_on_the_labels(tmp_path: Path, texts: bool) -> None:
    pairs_folder(tmp_path)
    if not texts:
        (tmp_path / "Y.txt").unlink()
    content = (tmp_path / "tst_X_Y.txt").read_text()
    (tmp_path / "tst_X_Y.txt").write_text(content.replace("2 3\n", "2 5\n", 1))
    with pytest.raises(RecipeError, match=r"number of labels: 3 in .*trn_X_Y.txt, 5 in .*tst_X_Y.txt"):
        load(tmp_path)


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_indices_of_a_matrix_are_checked(tmp_path: Path, form: str) -> None:
    npz_folder(tmp_path)
    path = tmp_path / "Y.trn.npz"
    save_npz(path, dense_labels(TRAIN).asformat(form))
    arrays = dict(np.load(path))
    name = "col" if form == "coo" else "indices"
    arrays[name][-1] = 9
    np.savez(path, **arrays)
    with pytest.raises(RecipeError, match=r"Y\.trn\.npz is no sparse matrix of scipy\.sparse\.save_npz: "):
        load(tmp_path)


def test_a_label_without_text_gets_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (npz_folder(tmp_path) / "raw" / "Y.txt").write_text("fox\n  \nred\n")
    assert load(tmp_path).train.label_texts == ["fox", "label 1", "red"]
    assert "1 labels have no text" in caplog.text


def test_labels_of_json_without_texts_are_counted_by_the_largest(tmp_path: Path) -> None:
    (json_folder(tmp_path) / "lbl.json.gz").unlink()
    write_json(tmp_path / "tst.json.gz", [{"title": "a", "target_ind": [6]}])
    splits = load(tmp_path)
    assert splits.train.shape == (3, 7) and splits.test.shape == (1, 7)
    save_npz(tmp_path / "Y.trn.npz", dense_labels(TRAIN))
    with pytest.raises(RecipeError, match="test split: label 6 of 3"):
        load(tmp_path)


def test_labels_without_a_title_are_called_by_their_uid(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_json(json_folder(tmp_path) / "lbl.json.gz", [{"uid": "u0", "title": ""}, {"title": " "}, {"title": "c"}])
    splits = load(tmp_path)
    assert splits.train.label_texts == ["u0", "label 1", "c"]
    assert "2 labels have no title" in caplog.text
    assert "1 training and 0 test documents have no label" in caplog.text


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds no labels of the train split(.|\n)*trn\.json\.gz"):
        load(tmp_path)
    with pytest.raises(RecipeError, match="is no folder"):
        load(tmp_path / "missing")
    with pytest.raises(RecipeError, match="--text is 'abstract'; it must be one of title, content"):
        load(json_folder(tmp_path), "abstract")


@pytest.mark.parametrize(("name", "expected"), [("LF-AmazonTitles-131K", (0.6, 2.6)), ("EURLex-4K", (0.55, 1.5))])
def test_propensity_constants_go_by_the_folder(tmp_path: Path, name: str, expected: tuple[float, float]) -> None:
    (tmp_path / name).mkdir()
    assert load(json_folder(tmp_path / name)).propensity == expected
