"""Several processes train the models of extreme classification as one does."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from recipes.common.errors import RecipeError
from recipes.extreme_classification import evaluation
from recipes.extreme_classification.neural.model import CLASSIFIER, DUAL_ENCODER
from recipes.extreme_classification.neural.run import run_model
from recipes.extreme_classification.neural.training import Training
from tests.extreme_words import WORDS, small_options, word_splits
from tests.processes import in_forks
from xhead.vocabulary import even_shards

# 216 documents to train on: the last batch has one, and the other processes have none of it.
COMMON = {"encoder": "tfidf", "batch_size": 43, "epochs": 2}
SOFT_TOPK = {"loss": "soft_topk", "loss_options": '{"k": 1}'}
RUNS = {
    "all": (DUAL_ENCODER, {"own_vectors": True}),
    "whole": (DUAL_ENCODER, {"own_vectors": True, "shard_labels": False}),
    "random": (DUAL_ENCODER, {"own_vectors": True, "negatives": "random", "negative_count": 3, "clustered": True}),
    "prototypes": (DUAL_ENCODER, {"prototypes": True, "own_vectors": True, "own_rate": 0.5}),
    "hard": (DUAL_ENCODER, {"negatives": "hard", "negative_count": 200, "refresh_epochs": 1, **SOFT_TOPK}),
    "classifier": (CLASSIFIER, {"classifier_learning_rate": 1.0, "classifier_adaptive": True}),
    "whole classifier": (CLASSIFIER, {"classifier_learning_rate": 1.0, "shard_labels": False}),
}
RESUMED = {"prototypes": RUNS["prototypes"], "classifier": RUNS["classifier"]}


class Interrupted(Exception):
    pass


def _run_all(folder, runs=RUNS, **options):
    for name, (kind, changed) in runs.items():
        settings = small_options(**{**COMMON, **changed, **options})
        with mock.patch.object(evaluation, "plot_groups"):
            run_model(kind, word_splits(), settings, folder / name)


def _run_interrupted(folder):
    """All processes stop after the first epoch has been saved."""
    save = Training._save

    def interrupt(self):
        save(self)
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_save", interrupt)
        for name, run in RESUMED.items():
            with pytest.raises(Interrupted):
                _run_all(folder, {name: run})


def _check_own_part(rank, processes, folder):
    """What a process holds of the labels: texts, vectors and the optimiser's state, of its share alone."""
    held = []

    def look(self):
        moments = self.optimizer.state[self.model.head.own]
        own = (self.model.head.label_feature_ids, self.model.head.own, moments["exp_avg"], moments["exp_avg_sq"])
        held.extend(tensor.shape[0] for tensor in own)
        raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_save", look)
        with pytest.raises(Interrupted):
            _run_all(folder, {"all": RUNS["all"]})
    assert held == [even_shards(len(WORDS), processes)[rank]] * 4


def _train(rank, processes, folder):
    os.environ.update(LOCAL_WORLD_SIZE=str(processes), OMP_NUM_THREADS="1")
    folder = Path(folder)
    _run_all(folder / "many")
    _check_own_part(rank, processes, folder / "held")
    _run_interrupted(folder / "from many")
    _run_all(folder / "from one", RESUMED, resume=True)
    whole = small_options(classifier_dtype="bfloat16", shard_labels=False)
    with pytest.raises(RecipeError, match="bfloat16 rounds at random, .* or --shard_labels True"):
        run_model(CLASSIFIER, word_splits(), whole, folder / "none")
    run_model(CLASSIFIER, word_splits(), small_options(classifier_dtype="bfloat16", epochs=1), folder / "rounded")


def _compare(processes, folder):
    _run_all(folder / "one")
    _run_interrupted(folder / "from one")
    in_forks(_train, processes, folder, processes, str(folder))
    _run_all(folder / "from many", RESUMED, resume=True)
    pairs = [("many", name, processes) for name in RUNS]
    pairs += [("from one", name, processes) for name in RESUMED] + [("from many", name, 1) for name in RESUMED]
    for place, name, count in pairs:
        one, many = folder / "one" / name, folder / place / name
        of_one, of_many = (json.loads((each / "results.json").read_text()) for each in (one, many))
        assert (of_one["processes"], of_many["processes"]) == (1, count)
        for mine, theirs in zip(of_one["history"], of_many["history"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
        assert of_one["metrics"] == pytest.approx(of_many["metrics"], abs=1e-6)
        vectors = [load_file(each / "labels.safetensors")["vectors"] for each in (one, many)]
        torch.testing.assert_close(*vectors, rtol=1e-3, atol=1e-3)
        assert len(list(many.glob("epoch-*"))) <= 2 and not (many / "vectors").exists()


def test_two_processes_train_as_one(tmp_path):
    _compare(2, tmp_path)


@pytest.mark.slow
def test_four_processes_train_as_one(tmp_path):
    _compare(4, tmp_path)
