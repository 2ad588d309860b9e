"""The presets of extreme classification: DEXML's settings, and each of them run on a small folder of its set's form."""

import gzip
import json

import numpy as np
import pytest
import torch
from scipy.sparse import save_npz

from recipes.extreme_classification.command import main
from recipes.extreme_classification.neural import command
from recipes.extreme_classification.neural.model import DUAL_ENCODER
from recipes.extreme_classification.neural.options import PRESETS
from recipes.extreme_classification.neural.training import Training
from tests.extreme_words import WORDS, split_of
from tests.small_encoders import write_encoder

TITLES = {"batch_size": 3000, "learning_rate": 3e-4, "max_length": 32}
WIKIPEDIA = {"batch_size": 768, "label_chunk": 512}
UNIT, PLAIN = {"normalise": True, "temperature": 0.05}, {"normalise": False, "temperature": 1.0}
PUBLISHED = {
    "eurlex-4k": {"batch_size": 512, "learning_rate": 5e-5, "max_length": 128, "label_chunk": 4096, **UNIT},
    "lf-amazontitles-131k": {**TITLES, **UNIT},
    "lf-amazontitles-1.3m": {**TITLES, **PLAIN, "label_chunk": 3000},
    "lf-wikipedia-500k": {**WIKIPEDIA, **PLAIN, "learning_rate": 7e-5},
    "lf-wikipedia-500k-hnm": {
        **WIKIPEDIA,
        **PLAIN,
        "learning_rate": 2e-5,
        "negatives": "hard",
        "in_batch_epochs": 5,
        "refresh_epochs": 5,
        "shortlist": 100,
    },
}
OF_ALL = {
    "encoder": "distilbert-base-uncased",
    "pooling": "cls",
    "loss": "decoupled_softmax",
    "epochs": 100,
    "warmup": 0.1,
    "dropout": 0.0,
    "weight_decay": 0.01,
}
OF_DEXML = [name for name in PRESETS if name != "lf-tibkat-41k"]


def test_every_preset_is_checked():
    assert set(OF_DEXML) == set(PUBLISHED)


@pytest.mark.parametrize("name", OF_DEXML)
def test_settings_are_the_published_ones(name):
    settings = command.parse(DUAL_ENCODER, ["--preset", name])[1]
    expected = {"negatives": "all", **OF_ALL, **PUBLISHED[name]}
    assert {key: getattr(settings, key) for key in expected} == expected
    assert settings.patience >= settings.epochs  # the published runs do not stop early


def write_texts_and_matrices(folder, splits):
    """As EURLex-4K comes for encoders."""
    (folder / "raw").mkdir(parents=True)
    for name, split in splits.items():
        save_npz(folder / f"Y.{name}.npz", split.labels)
        (folder / "raw" / f"{name}_X.txt").write_text("".join(f"{text}\n" for text in split.texts))
    (folder / "raw" / "Y.txt").write_text("\n".join(splits["trn"].label_texts))


def write_json_lines(folder, splits):
    """As the sets with label texts come."""
    folder.mkdir(parents=True)
    parts = {"lbl": [{"uid": f"u{label}", "title": text} for label, text in enumerate(splits["trn"].label_texts)]}
    for name, split in splits.items():
        parts[name] = [
            {
                "uid": f"{name}{row}",
                "title": text,
                "content": "and more",
                "target_ind": split.labels[row].indices.tolist(),
            }
            for row, text in enumerate(split.texts)
        ]
    for name, records in parts.items():
        with gzip.open(folder / f"{name}.json.gz", "wt") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    (folder / "filter_labels_test.txt").write_text("0 2\n1 0\n")


@pytest.mark.parametrize("name", OF_DEXML)
@pytest.mark.filterwarnings("ignore")
def test_a_preset_runs(name, tmp_path, monkeypatch):
    splits = {"trn": split_of(40, 0), "tst": split_of(12, 1)}
    write = write_texts_and_matrices if name == "eurlex-4k" else write_json_lines
    folder = tmp_path / name
    write(folder, splits)
    encoder = write_encoder("distilbert", tmp_path / "encoder", [*splits["trn"].texts, *WORDS])
    kept = []
    negatives = Training._negatives

    def look(self, index):
        kept.append(negatives(self, index))
        return kept[-1]

    monkeypatch.setattr(Training, "_negatives", look)
    epochs = "7" if name.endswith("hnm") else "2"
    arguments = ["--data", str(folder), "--encoder", str(encoder), "--epochs", epochs, "--held_out", "0.1"]
    main(["--model", DUAL_ENCODER, "--preset", name, "--output_dir", str(tmp_path / "run"), *arguments])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert len(results["history"]) == int(epochs) and results["labels"] == len(WORDS)
    assert all(np.isfinite(epoch["loss"]) for epoch in results["history"])
    assert results["filtered_pairs"] == (0 if name == "eurlex-4k" else 2)
    if name.endswith("hnm"):  # the labels of the batch alone, and from the sixth epoch on others too
        assert [each.numel() for each in kept] == [0] * 5 + [36 * 5] * 2
        assert all(torch.is_tensor(each) and int(each.max()) < len(WORDS) for each in kept[5:])
    else:
        assert kept == [None, None]
