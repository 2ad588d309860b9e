"""Two processes train the models of extreme classification as one does."""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from recipes.common.errors import RecipeError
from recipes.extreme_classification.neural.model import CLASSIFIER, DUAL_ENCODER
from recipes.extreme_classification.neural.run import run_model
from tests.extreme_words import small_options, word_splits

PROCESSES = 2
# 216 documents to train on: the last batch has one, and a process has none of it.
COMMON = {"encoder": "tfidf", "batch_size": 43, "epochs": 3}
RUNS = {
    "all": (DUAL_ENCODER, {"own_vectors": True}),
    "random": (DUAL_ENCODER, {"negatives": "random", "negative_count": 3, "clustered": True}),
    "hard": (DUAL_ENCODER, {"negatives": "hard", "negative_count": 200, "refresh_epochs": 2}),
    "classifier": (CLASSIFIER, {"classifier_learning_rate": 1.0}),
}


def _run_all(folder):
    for name, (kind, changed) in RUNS.items():
        run_model(kind, word_splits(), small_options(**COMMON, **changed), folder / name)


def _train(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(PROCESSES), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(PROCESSES))
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    try:
        _run_all(Path(folder) / "two")
        with pytest.raises(RecipeError, match="bfloat16 rounds at random in each process"):
            run_model(CLASSIFIER, word_splits(), small_options(classifier_dtype="bfloat16"), Path(folder) / "none")
        # A process that leaves while another still sends takes its threads away under it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    context = torch.multiprocessing.spawn(_train, args=(str(tmp_path),), nprocs=PROCESSES, join=False)
    assert context is not None
    _run_all(tmp_path / "one")
    while not context.join(timeout=120):
        pass
    for name in RUNS:
        one, two = (tmp_path / folder / name for folder in ("one", "two"))
        of_one, of_two = (json.loads((folder / "results.json").read_text()) for folder in (one, two))
        assert (of_one["processes"], of_two["processes"]) == (1, PROCESSES)
        for mine, theirs in zip(of_one["history"], of_two["history"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
        assert of_one["metrics"] == pytest.approx(of_two["metrics"], abs=1e-6)
        vectors = [load_file(folder / "labels.safetensors")["vectors"] for folder in (one, two)]
        torch.testing.assert_close(*vectors, rtol=1e-3, atol=1e-3)
