"""Classifier and dual encoder of extreme classification, on a data set that is learnt within seconds."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from recipes.common.errors import RecipeError
from recipes.extreme_classification.command import main
from recipes.extreme_classification.dataset import Dataset, Splits
from recipes.extreme_classification.neural import command, predict, training
from recipes.extreme_classification.neural.documents import Documents
from recipes.extreme_classification.neural.encoders import make_encoder
from recipes.extreme_classification.neural.inputs import TokenInputs, make_reader
from recipes.extreme_classification.neural.model import CLASSIFIER, DUAL_ENCODER, XmcModel
from recipes.extreme_classification.neural.predict import Predictor
from recipes.extreme_classification.neural.run import run_model
from recipes.extreme_classification.neural.training import Training
from tests.extreme_words import WORDS, small_options, word_splits
from xhead.retrieval import metrics


@pytest.fixture(scope="module")
def splits():
    return word_splits()


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        (DUAL_ENCODER, {}),
        (DUAL_ENCODER, {"encoder": "tiny", "layers": 1, "learning_rate": 5e-3}),
        (DUAL_ENCODER, {"encoder": "tfidf", "own_vectors": True, "dropout": 0.2, "learning_rate": 5e-2}),
        (DUAL_ENCODER, {"prototypes": True, "own_vectors": True, "own_rate": 0.5, "prototype_parts": 2}),
        (DUAL_ENCODER, {"loss": "infonce", "own_vectors": True, "clustered": True, "refresh_epochs": 2}),
        (DUAL_ENCODER, {"negatives": "hard", "refresh_epochs": 2, "negative_count": 200}),
        (DUAL_ENCODER, {"negatives": "random", "negative_count": 3, "loss": "mann_whitney"}),
        (DUAL_ENCODER, {"loss": "soft_topk", "loss_options": '{"k": [1, 3]}', "normalise": False}),
        (CLASSIFIER, {"classifier_learning_rate": 5.0}),
        (CLASSIFIER, {"loss": "sigmoid", "classifier_dtype": "bfloat16", "classifier_learning_rate": 1.0}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else value,
)
def test_it_learns(kind, changed, splits, tmp_path):
    results = run_model(kind, splits, small_options(**changed), tmp_path)
    assert results["metrics"]["P@1"] > 0.6  # one document in four has no label
    assert results == json.loads((tmp_path / "results.json").read_text())
    best = Predictor(tmp_path)(["the glass island here", "the lamp here"], k=2)
    assert {name for name, _ in best[0]} == {"a glass", "a island"} and best[1][0][0] == "a lamp"
    assert best[0][0][1] >= best[0][1][1]


RESUMED = {"epochs": 4, "dropout": 0.2, "encoder": "tfidf", "clustered": True, "refresh_epochs": 3}


def test_resuming_is_going_on(splits, tmp_path, capsys):
    whole = run_model(DUAL_ENCODER, splits, small_options(**RESUMED), tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def interrupt(self):
        save(self)
        if self.epoch == 2:
            raise Interrupted

    save = Training._save
    settings = small_options(**RESUMED, resume=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_save", interrupt)
        with pytest.raises(Interrupted):
            run_model(DUAL_ENCODER, splits, settings, tmp_path / "parts")
    other = small_options(**RESUMED, resume=True, loss="infonce")
    with pytest.raises(RecipeError, match="where loss is 'decoupled_softmax' and not 'infonce'"):
        run_model(DUAL_ENCODER, splits, other, tmp_path / "parts")
    parts = run_model(DUAL_ENCODER, splits, settings, tmp_path / "parts")
    assert "resumed after epoch 2" in capsys.readouterr().out
    assert parts["history"] == whole["history"] and parts["metrics"] == whole["metrics"]


@pytest.mark.parametrize("encoder", ["bag", "tfidf", "tiny"])
def test_texts_without_a_word(encoder, tmp_path):
    whole = word_splits()
    texts, label_texts = ["", *whole.train.texts[1:]], ["\u2603", *whole.train.label_texts[1:]]
    train = dataclasses.replace(whole.train, texts=texts, label_texts=label_texts)
    test = dataclasses.replace(whole.test, texts=["", *whole.test.texts[1:]], label_texts=label_texts)
    settings = small_options(encoder=encoder, layers=1, epochs=1)
    results = run_model(DUAL_ENCODER, Splits(train, test, None, (0.55, 1.5), "words"), settings, tmp_path)
    assert np.isfinite(results["history"][0]["loss"]) and len(Predictor(tmp_path)([""], k=2)[0]) == 2


def test_a_batch_without_labels_takes_its_step(tmp_path):
    whole = word_splits()
    labels = whole.train.labels.copy()
    labels.data[:] = 0
    labels.eliminate_zeros()
    bare = Splits(dataclasses.replace(whole.train, labels=labels), whole.test, None, (0.55, 1.5), "bare")
    settings = small_options(epochs=1, negatives="hard", in_batch_epochs=1)
    assert run_model(DUAL_ENCODER, bare, settings, tmp_path)["history"][0]["loss"] == 0


def test_an_index_is_exported_and_searched(splits, tmp_path):
    pytest.importorskip("faiss")
    run_model(DUAL_ENCODER, splits, small_options(epochs=3, index="HNSW32"), tmp_path)
    texts = ["the glass island here", "the lamp here"]
    by_index = Predictor(tmp_path)
    assert by_index.index is not None
    found = by_index(texts, k=3)
    (tmp_path / "labels.faiss").unlink()
    for mine, exact in zip(found, Predictor(tmp_path)(texts, k=3), strict=True):
        assert [name for name, _ in mine] == [name for name, _ in exact]
        assert [score for _, score in mine] == pytest.approx([score for _, score in exact], rel=1e-4)


def test_an_index_without_faiss_is_refused_before_training(splits, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="--index Flat needs faiss: pip install faiss-cpu"):
        run_model(DUAL_ENCODER, splits, small_options(index="Flat"), tmp_path)


def test_training_stops_when_it_gets_no_better(splits, tmp_path):
    settings = small_options(epochs=50, patience=2, learning_rate=0.0)
    results = run_model(DUAL_ENCODER, splits, settings, tmp_path)
    assert len(results["history"]) == 3


def test_an_encoder_that_is_not_there(splits, tmp_path):
    with pytest.raises(RecipeError, match="--encoder is 'nobody/nothing'; it must be one of bag, tiny, tfidf, or a"):
        run_model(DUAL_ENCODER, splits, small_options(encoder="nobody/nothing"), tmp_path)


def test_vectors_of_one_text_do_not_depend_on_its_neighbours():
    for encoder, pooling in (("bag", "mean"), ("tfidf", "mean"), ("tiny", "mean"), ("tiny", "cls")):
        settings = small_options(encoder=encoder, layers=1, pooling=pooling)
        reader = make_reader(settings, WORDS)
        model = make_encoder(settings, reader.size).eval()
        alone = model(**reader(["apple"]).batch(np.arange(1)))
        padded = model(**reader(["apple", "cloud drum engine forest"]).batch(np.arange(2)))
        assert torch.allclose(alone[0], padded[0], atol=1e-5)


def test_quality_is_ndcg(splits, tmp_path, monkeypatch):
    """Against the recipe's own metric, on documents that have labels."""
    test = splits.test
    some = np.flatnonzero(np.diff(test.labels.indptr))
    ranked = np.stack([np.random.default_rng(row).permutation(len(WORDS)) for row in range(len(some))])
    inputs = TokenInputs([np.zeros(1, np.int32)] * len(test.labels.indptr), 0)
    documents = Documents(inputs, test.labels, some)
    monkeypatch.setattr(training, "predict", lambda model, inputs, k, rows: (None, torch.from_numpy(ranked[:, :k])))
    ranking = metrics.rank(ranked, test.labels[some], None, k=5)
    expected = metrics.evaluate(ranking, splits.train.labels, ks=[5], constants=(0.55, 1.5), recall_ks=[])["nDCG@5"]
    found = Training.quality(SimpleNamespace(model=None), documents)
    assert found == pytest.approx(expected, rel=1e-5)


def test_no_document_is_compared_with_a_label_that_holds_it(splits, tmp_path, monkeypatch):
    """And every other training document is in its labels' vectors; all of them are when the model is measured."""
    seen, compared, made = [], [], training.set_prototypes
    share, quality = Training._share_of_loss, Training.quality

    def note(model, documents):
        made(model, documents)
        seen[:] = [set(documents.rows.tolist())]
        vectors = model.document_vectors(documents.inputs, documents.rows)
        members = torch.from_numpy(documents.labels[documents.rows].toarray().T).float()
        torch.testing.assert_close(model.head.document_sums, members @ vectors)
        assert torch.equal(model.head.document_counts, members.sum(1))

    def compare(self, index):
        part = set(self.train.rows[index.numpy()].tolist())
        assert not part & seen[0] and len(seen[0]) >= 0.6 * len(self.train)
        compared.append(part)
        return share(self, index)

    def measure(self, documents):
        assert seen[0] == set(self.train.rows.tolist()) and not seen[0] & set(documents.rows.tolist())
        return quality(self, documents)

    monkeypatch.setattr(training, "set_prototypes", note)
    monkeypatch.setattr(Training, "_share_of_loss", compare)
    monkeypatch.setattr(Training, "quality", measure)
    settings = small_options(prototypes=True, prototype_parts=3, epochs=1, batch_size=16)
    run_model(DUAL_ENCODER, splits, settings, tmp_path)
    assert len(set.union(*compared)) == sum(map(len, compared))


def test_an_epoch_of_one_part_has_label_texts_alone(splits, tmp_path):
    """All documents are compared then, so that none is left to stand for a label."""
    settings = small_options(prototypes=True, prototype_parts=1, epochs=1)
    assert run_model(DUAL_ENCODER, splits, settings, tmp_path)["history"][0]["loss"] > 0


def test_batches_have_all_of_the_labels(splits):
    labels = splits.train.labels
    rows = np.array([5, 0, 17])
    inputs = TokenInputs([np.array([number]) for number in range(240)], 0)
    documents = Documents(inputs, labels, np.arange(240)).part(torch.from_numpy(rows))
    assert documents.batch()["input_ids"].tolist() == [[5], [0], [17]]
    padded = documents.padded_labels()
    for row, found in zip(rows.tolist(), padded.tolist(), strict=True):
        assert {label for label in found if label >= 0} == set(labels[row].indices.tolist())


def test_a_temperature_goes_with_the_vectors():
    settings = small_options()
    reader = make_reader(settings, WORDS)
    inputs = reader(WORDS)
    unit = XmcModel(DUAL_ENCODER, make_encoder(settings, reader.size), settings, len(WORDS), inputs)
    assert unit.temperature == 0.05
    assert torch.allclose(unit.label_vectors().norm(dim=-1), torch.ones(len(WORDS)))
    assert XmcModel(CLASSIFIER, make_encoder(settings, reader.size), settings, 12).temperature == 1.0


def test_the_command_runs_both(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_data", lambda options: splits)
    small = ["--epochs", "1", "--hidden_size", "8", "--vocab_size", "80", "--max_length", "8"]
    for kind in (CLASSIFIER, DUAL_ENCODER):
        main(["--model", kind, "--output_dir", str(tmp_path / kind), *small])
        assert json.loads((tmp_path / kind / "results.json").read_text())["model"] == f"{kind}, decoupled_softmax"


def test_presets_give_way_to_options():
    data, settings = command.parse(DUAL_ENCODER, ["--preset", "lf-tibkat-41k"])
    assert (data.text, settings.encoder) == ("content", "tfidf")
    settings = command.parse(DUAL_ENCODER, ["--preset", "lf-wikipedia-500k", "--batch_size", "7"])[1]
    assert (settings.batch_size, settings.learning_rate, settings.normalise) == (7, 7e-5, False)
    assert command.parse(CLASSIFIER, ["--normalise", "False"])[1].normalise is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "imagenet"], "--preset is 'imagenet'; it must be one of eurlex-4k"),
        (["--loss", "magic"], "--loss magic: unknown loss 'magic'"),
        (["--loss_options", '{"k": 0}', "--loss", "soft_topk"], "k must be a whole number"),
        (["--pooling", "max"], "--pooling is 'max'; it must be one of mean, cls"),
        (["--shortlist", "-1", "--negatives", "hard"], "--shortlist is -1; it must be 0 or more"),
        (["--in_batch_epochs", "2"], "--in_batch_epochs is 2; it must be 0 or more, and 0 without --negatives hard"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--held_out", "1"], "--held_out must be a share between 0 and 1"),
        (["--dropout", "1"], "--dropout is 1.0, --warmup 0.1; they are shares of 1"),
        (["--learning_rate", "-1"], "--learning_rate must be 0 or more, got -1.0"),
        (["--adam_epsilon", "-1"], "--adam_epsilon must be 0 or more, got -1.0"),
        (["--loss_options", "[]"], r"--loss_options is '\[\]'; it must be a JSON object"),
        (["--spoon"], "not understood: --spoon"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        command.parse(DUAL_ENCODER, arguments)


def test_data_that_cannot_serve(splits, tmp_path):
    features = csr_matrix(np.ones((2, 3), np.float32))
    labels = csr_matrix(np.ones((2, 2), np.float32))
    bare = Dataset(None, labels, None, features)
    no_texts = Splits(bare, bare, None, (0.55, 1.5), "bare")
    with pytest.raises(RecipeError, match="features only: use --model linear"):
        run_model(CLASSIFIER, no_texts, small_options(), tmp_path)
    unnamed = Dataset(["a", "b"], labels, None, None)
    with pytest.raises(RecipeError, match="has none: use --model classifier"):
        run_model(DUAL_ENCODER, Splits(unnamed, unnamed, None, (0.55, 1.5), "unnamed"), small_options(), tmp_path)
    with pytest.raises(SystemExit):
        predict.main([str(tmp_path / "nothing"), "text"])
