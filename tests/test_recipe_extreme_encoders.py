"""Encoders of Hugging Face and folders of sentence-transformers in extreme classification."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel

from recipes.common.errors import RecipeError
from recipes.extreme_classification.neural import command
from recipes.extreme_classification.neural.encoders import make_encoder
from recipes.extreme_classification.neural.inputs import make_reader
from recipes.extreme_classification.neural.model import DUAL_ENCODER, XmcModel
from recipes.extreme_classification.neural.predict import Predictor
from recipes.extreme_classification.neural.run import run_model
from tests.extreme_words import WORDS, small_options, word_splits
from tests.small_encoders import KINDS, write_encoder, write_sentence_folder

TEXTS = ["apple", "cloud drum engine forest", "the lamp here"]
SPLITS = word_splits()
ALL_TEXTS = [*SPLITS.train.texts, *WORDS]


@pytest.mark.parametrize(("kind", "pooling"), [("bert", "mean"), ("distilbert", "cls"), ("modernbert", "mean")])
def test_an_encoder_of_hugging_face(kind, pooling, tmp_path):
    folder = write_encoder(kind, tmp_path / "encoder", ALL_TEXTS)
    settings = small_options(encoder=str(folder), pooling=pooling, epochs=1, batch_size=64)
    results = run_model(DUAL_ENCODER, SPLITS, settings, tmp_path / "run")
    assert results["options"]["encoder"] == str(folder)
    assert len(Predictor(tmp_path / "run")(["the lamp here"], k=2)[0]) == 2


FOLDERS = {
    "bert": {"pooling": "cls", "inside": "0_Transformer", "older": True},
    "distilbert": {"pooling": "mean", "normalise": False, "older": True},
    "modernbert": {"pooling": "cls", "normalise": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_sentence_transformers(kind, tmp_path):
    wanted = FOLDERS[kind]
    folder = write_sentence_folder(kind, tmp_path / "encoder", ALL_TEXTS, **wanted)
    settings = small_options(encoder=str(folder), epochs=1, batch_size=64)
    normalise = wanted.get("normalise", True)
    assert (settings.pooling, settings.normalise) == (wanted["pooling"], normalise)
    results = run_model(DUAL_ENCODER, SPLITS, settings, tmp_path / "run")
    assert (results["options"]["pooling"], results["options"]["normalise"]) == (wanted["pooling"], normalise)
    predictor = Predictor(tmp_path / "run")
    assert predictor.normalise == normalise and len(predictor(["the lamp here"], k=2)[0]) == 2
    # What is given wins.
    given = command.parse(DUAL_ENCODER, ["--encoder", str(folder), "--pooling", "mean", "--normalise", "True"])[1]
    assert (given.pooling, given.normalise) == ("mean", True)


def vectors_of(folder, **options):
    settings = small_options(encoder=str(folder), **options)
    reader = make_reader(settings, TEXTS)
    model = XmcModel(DUAL_ENCODER, make_encoder(settings, reader.size), settings, len(TEXTS), reader(TEXTS))
    return model.document_vectors(reader(TEXTS)), reader


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pooling", "normalise"), [("mean", True), ("cls", False)])
def test_vectors_are_pooled_as_the_folder_says(kind, pooling, normalise, tmp_path):
    folder = write_sentence_folder(kind, tmp_path / "encoder", ALL_TEXTS, pooling=pooling, normalise=normalise)
    found, reader = vectors_of(folder)
    backbone = AutoModel.from_pretrained(folder).eval()
    for row, text in enumerate(TEXTS):
        ids = torch.from_numpy(np.array([reader.tokenizer(text)["input_ids"]]))
        with torch.no_grad():
            states = backbone(input_ids=ids).last_hidden_state[0]
        expected = states[0] if pooling == "cls" else states.mean(0)
        expected = expected / expected.norm() if normalise else expected
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pooling", "normalise"), [("mean", True), ("cls", False)])
@pytest.mark.filterwarnings("ignore")
def test_vectors_are_those_of_sentence_transformers(kind, pooling, normalise, tmp_path):
    theirs = pytest.importorskip("sentence_transformers")
    folder = write_sentence_folder(kind, tmp_path / "made", ALL_TEXTS, pooling=pooling, normalise=normalise, older=True)
    model = theirs.SentenceTransformer(str(folder), device="cpu")
    model.save(str(tmp_path / "saved"))
    for path in (folder, tmp_path / "saved"):
        found, _ = vectors_of(path)
        expected = torch.from_numpy(model.encode(TEXTS))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def change(folder, name, edit):
    path = folder / name
    content = json.loads(path.read_text())
    path.write_text(json.dumps(edit(content)))


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("modules.json", lambda m: m[:1], "modules.json has the modules Transformer; what can be read is Transformer,"),
        ("modules.json", lambda m: [*m[:2], {"path": "2_Dense", "type": "a.Dense"}], "the modules .* Pooling, Dense;"),
        ("modules.json", lambda m: {}, "modules.json must hold a JSON list"),
        ("modules.json", lambda m: [{"type": "a.Transformer"}], "no list of modules with `type` and `path`"),
        ("1_Pooling/config.json", lambda c: {"pooling_mode": "max"}, "asks for the pooling max; .* one of mean, cls"),
        ("1_Pooling/config.json", lambda c: {"pooling_mode": ["mean", "cls"]}, "asks for the pooling mean, cls;"),
        ("1_Pooling/config.json", lambda c: {"pooling_mode_lasttoken": True}, "the pooling pooling_mode_lasttoken;"),
        ("1_Pooling/config.json", lambda c: {}, "asks for the pooling of nothing"),
        ("sentence_bert_config.json", lambda c: {"do_lower_case": True}, "says do_lower_case"),
    ],
)
def test_folders_that_cannot_be_read(name, edit, message, tmp_path):
    folder = write_sentence_folder("bert", tmp_path / "encoder", TEXTS)
    change(folder, name, edit)
    with pytest.raises(RecipeError, match=message):
        small_options(encoder=str(folder))


def test_a_pooling_file_that_is_no_json(tmp_path):
    folder = write_sentence_folder("bert", tmp_path / "encoder", TEXTS)
    (folder / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(RecipeError, match=r"1_Pooling/config.json cannot be read"):
        small_options(encoder=str(folder))
