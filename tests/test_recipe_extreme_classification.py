"""The command of the extreme-classification recipe: the linear opponent, the report, and wrong options."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")

from scipy.sparse import csr_matrix, random_array
from sklearn.feature_extraction.text import TfidfVectorizer

from recipes.common.errors import RecipeError
from recipes.extreme_classification import compare
from recipes.extreme_classification.command import main
from recipes.extreme_classification.dataset import Dataset, Splits, load
from recipes.extreme_classification.evaluation import Evaluation, measure, ranks_needed, table
from recipes.extreme_classification.features import TfIdf, make_features
from recipes.extreme_classification.linear import LinearModel, LinearOptions
from recipes.extreme_classification.options import DataOptions, load_data

TOPICS = ["river", "mountain", "engine", "violin", "harbour", "glacier", "turbine", "cello", "unseen"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Documents name their topics among noise; `unseen` is in test documents only."""
    generator = np.random.default_rng(0)

    def documents(number: int, topics: int) -> str:
        lines = []
        for _ in range(number):
            labels = sorted({int(label) for label in generator.integers(topics, size=2)})
            words = [f"noise{word}" for word in generator.integers(60, size=4)] + [TOPICS[label] for label in labels]
            lines.append(json.dumps({"title": " ".join(generator.permutation(words)), "target_ind": labels}))
        return "\n".join(lines)

    for name, text in (
        ("trn", documents(150, 8)),
        ("tst", documents(60, 9)),
        ("lbl", "\n".join(json.dumps({"title": topic}) for topic in TOPICS)),
    ):
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "tst_filter_labels.txt").write_text("0 8\n")
    return tmp_path


def test_the_linear_model_learns_and_is_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "report"
    arguments = ["--model", "linear", "--data", str(folder), "--output_dir", str(output), "--negatives", "4"]
    main(arguments)
    results = json.loads((output / "results.json").read_text())
    assert results["metrics"]["P@1"] > 0.95
    assert results["metrics"]["nDCG@5"] > 0.9
    assert results["filtered_pairs"] == 1
    assert results["propensity"] == {"A": 0.55, "B": 1.5}
    never = results["by_frequency"][0]
    assert (never["labels"], never["most"]) == (1, 0)
    assert never["recall"] > 0.9  # by its text
    assert (output / "frequency.png").read_bytes()[1:4] == b"PNG"
    assert results["seconds"]["wall"] > 0 and results["seconds"]["cpu"] > 0
    shown = capsys.readouterr().out
    assert "PSnDCG@5" in shown
    assert "never" in shown
    assert "seconds:" in shown
    first = results["metrics"]
    main(arguments)
    assert json.loads((output / "results.json").read_text())["metrics"] == first


def test_the_label_tree_learns(folder: Path) -> None:
    pytest.importorskip("napkinxc.models")
    output = folder / "report"
    main(["--model", "label_tree", "--data", str(folder), "--output_dir", str(output), "--threads", "1"])
    results = json.loads((output / "results.json").read_text())
    assert results["model"] == "label_tree"
    assert results["metrics"]["P@1"] > 0.9


def test_too_few_documents_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", str(folder), "--train_documents", "10", "--output_dir", str(folder / "report")])
    assert "10 training documents; one in 20 is held out" in capsys.readouterr().err


def test_features_of_the_data_set_serve_where_there_are_no_texts() -> None:
    features = csr_matrix(random_array((80, 30), density=0.2, rng=0), dtype=np.float32)
    labels = csr_matrix(features[:, :10] > 0, dtype=np.float32)
    split = Dataset(None, labels, None, features)
    splits = Splits(split, split, None, (0.55, 1.5), "features")
    made = make_features(splits)
    np.testing.assert_allclose(np.asarray(made.train.power(2).sum(axis=1)).ravel(), 1, rtol=1e-6)
    predictions = LinearModel(made, labels, LinearOptions(negatives=5)).predict(made.test, ranks_needed(splits))
    assert predictions.shape == (80, 10)
    assert measure(splits, predictions).metrics["P@1"] > 0.8


def test_tf_idf_of_words_is_the_usual_one() -> None:
    texts = ["red Fox, red hen", "fox", "blue hen blue blue", "!"]
    usual = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True).fit(texts)
    mine = TfIdf.fit(texts, characters=0)
    assert sorted(mine.features) == sorted(usual.vocabulary_)
    columns = [usual.vocabulary_[name] for name in mine.features]
    new = [*texts, "hen unknown hen"]
    np.testing.assert_allclose(mine(new).toarray(), usual.transform(new).toarray()[:, columns], rtol=1e-6)


def test_n_grams_find_the_parts_of_words(tmp_path: Path) -> None:
    made = TfIdf.fit(["Fachwerkbau", "Fachwerk", "Bau", "Bau"], characters=5)
    made.save(tmp_path)
    made = TfIdf.load(tmp_path)
    assert {"fachwerk", "#fachw", "# fach", "# bau "} <= set(made.features)
    assert "#werkb" not in made.features  # in one text only
    found = made(["Fachwerkhaus", "Bau", "unknown", ""])
    np.testing.assert_allclose(found.power(2).sum(axis=1).ravel(), [[1, 1, 0, 0]], rtol=1e-6)
    assert (found[0] @ made(["Fachwerk"]).T).toarray() > 0.5
    few = TfIdf.fit(["a b", "a c", "a b"], characters=0, limit=2)
    assert few.features == ["a", "b"]


def test_runs_are_compared(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [tmp_path / "linear", tmp_path / "encoder"]
    main(["--data", str(folder), "--negatives", "4", "--output_dir", str(runs[0])])
    small = ["--epochs", "1", "--hidden_size", "8", "--vocab_size", "80", "--max_length", "8"]
    main(["--model", "dual_encoder", "--data", str(folder), "--output_dir", str(runs[1]), *small])
    capsys.readouterr()
    compare.main([*map(str, runs), "--output_dir", str(tmp_path / "both")])
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "both" / "results.json").read_text())
    assert [run["model"] for run in record["runs"]] == ["linear", "dual_encoder, decoupled_softmax"]
    assert compare.table(record) in shown
    assert "1 labels never occur in training" in shown
    assert (tmp_path / "both" / "frequency.png").read_bytes()[1:4] == b"PNG"
    main(["--data", str(folder), "--negatives", "4", "--train_documents", "100", "--output_dir", str(runs[1])])
    for wrong, message in ((runs[1], "was measured on another data set"), (tmp_path, "holds no results of a model")):
        with pytest.raises(SystemExit):
            compare.main([str(runs[0]), str(wrong), "--output_dir", str(tmp_path / "both")])
        assert message in capsys.readouterr().err


def test_the_first_documents_and_their_filter(folder: Path) -> None:
    splits = load_data(DataOptions(str(folder), train_documents=20, test_documents=5))
    assert splits.train.shape == (20, 9)
    assert splits.test.shape == (5, 9)
    assert splits.filter is not None
    assert splits.filter.tolist() == [[0, 8]]
    assert splits.name.endswith("the first 20 + 5 documents")
    assert load_data(DataOptions(str(folder))).train.shape == (150, 9)


def test_enough_ranks_are_asked_for(folder: Path) -> None:
    splits = load(folder)
    assert ranks_needed(splits) == 9
    many = csr_matrix((3, 5_000), dtype=np.float32)
    pairs = np.array([[1, 4], [1, 7], [0, 4]])
    split = Dataset(["a", "b", "c"], many, None, None)
    assert ranks_needed(Splits(split, split, pairs, (0.55, 1.5), "many")) == 102


def test_the_table_shows_percentages() -> None:
    about = {
        "data": "d",
        "train_documents": 1000,
        "test_documents": 10,
        "labels": 5000,
        "labels_per_train_document": 2.5,
        "propensity": {"A": 0.55, "B": 1.5},
    }
    text = table(Evaluation({"P@1": 0.5, "recall@10": 0.25}, [], about))
    assert "d: 1,000 + 10 documents, 5,000 labels, 2.50 a document; propensities A = 0.55, B = 1.5" in text
    assert "P@1  50.00" in text
    assert "recall@10  25.00" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "tree"], "--model is 'tree'; known: linear"),
        (["--unknown", "1"], "not understood: --unknown 1"),
        (["--text", "abstract"], "--text is 'abstract'"),
        (["--train_documents", "-1"], "--train_documents is -1; it must be 0 or more"),
        (["--cost", "0"], "--cost is 0.0"),
        (["--negatives", "0"], "--negatives is 0; it must be at least 1"),
        (["--data", "/nowhere"], "is no folder"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_texts_without_a_word_are_refused() -> None:
    split = Dataset(["", "."], csr_matrix((2, 3), dtype=np.float32), None, None)
    with pytest.raises(RecipeError, match="no features could be made"):
        make_features(Splits(split, split, None, (0.55, 1.5), "empty"))
