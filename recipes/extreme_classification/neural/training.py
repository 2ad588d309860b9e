"""Train a model on documents with label sets: batches, negatives, early stopping by held-out documents, resuming."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from recipes.common.errors import RecipeError
from recipes.extreme_classification.neural.documents import Documents, set_prototypes
from recipes.extreme_classification.neural.inputs import Inputs
from recipes.extreme_classification.neural.model import DUAL_ENCODER, XmcModel
from recipes.extreme_classification.neural.options import NeuralOptions
from recipes.extreme_classification.neural.processes import (
    of_main_process,
    own_share,
    seed_apart,
    sum_gradients,
    sum_over_processes,
)
from recipes.extreme_classification.neural.state import (
    checkpoint,
    last_checkpoint,
    load,
    remove_checkpoints,
    save,
)
from xhead.heads import InPlaceClassifier
from xhead.heads.label_batches import candidates, clustered_batches, drawn_negatives, hard_negatives, random_negatives
from xhead.losses import get_loss
from xhead.retrieval import topk


class Training:
    """A model, its optimiser, and what a run that goes on needs to know.

    Args:
        model: on its device.
        options: of the run.
        documents: of training; some are held out to stop by.
        folder: for the best model and the last state.
        state: the processes that train together.

    Raises:
        RecipeError: too few documents.
    """

    def __init__(
        self, model: XmcModel, options: NeuralOptions, documents: Documents, folder: Path, state: PartialState
    ):
        self.model, self.options, self.folder, self.state = model, options, folder, state
        self.generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(documents), generator=self.generator)
        kept_out = max(1, round(options.held_out * len(documents)))
        if kept_out >= len(documents):
            raise RecipeError(f"{len(documents)} documents are too few to hold {kept_out} of them out")
        self.held_out, self.train = documents.part(order[:kept_out]), documents.part(order[kept_out:])
        self.loss = get_loss(options.loss, **options.parsed_loss_options)
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(),
            lr=options.learning_rate,
            eps=options.adam_epsilon,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.steps = -(-len(self.train) // options.batch_size)
        self.steps_of_part = -(-self.steps // options.prototype_parts)
        total = self.steps * options.epochs
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, int(options.warmup * total), total)
        self.epoch, self.best, self.waited = 0, -1.0, 0
        self.history: list[dict[str, float]] = []
        self.document_vectors = self.hard = None

    def run(self) -> None:
        """Train to the end, or until the held-out documents get no better; the best model is left in the folder."""
        last = last_checkpoint(self.folder)
        if self.options.resume and last is not None:
            self._load(last)
        seed_apart(self.options.seed + self.epoch, self.state)
        while self.epoch < self.options.epochs and self.waited < self.options.patience:
            loss = self._train_epoch()
            self._set_prototypes()
            quality = of_main_process(self.quality(self.held_out))
            self.epoch += 1
            self.history.append({"epoch": self.epoch, "loss": loss, "held_out_nDCG@5": quality})
            if self.state.is_main_process:
                print(f"epoch {self.epoch}: loss {loss:.4f}, held-out nDCG@5 {100 * quality:.2f}", flush=True)
            self.waited += 1
            if quality > self.best:
                self.best, self.waited = quality, 0
            self._save()
        load(self._best_checkpoint(), self.model)
        self._set_prototypes()

    def _train_epoch(self) -> float:
        if self.epoch % self.options.refresh_epochs == 0 or self.epoch == self.options.in_batch_epochs:
            self._refresh()
        self.model.train()
        total = torch.zeros((), dtype=torch.float64)
        batches = list(self._batches())
        progress = tqdm(
            batches,
            desc=f"epoch {self.epoch + 1}",
            leave=False,
            disable=None if self.state.is_main_process else True,
        )
        head, rate = self.model.head, self.options.classifier_learning_rate
        for step, index in enumerate(progress):
            if step % self.steps_of_part == 0:
                self._set_prototypes(torch.cat(batches[step : step + self.steps_of_part]))
            if isinstance(head, InPlaceClassifier):
                # Its own rate follows the same schedule.
                head.lr = rate * self.schedule.lr_lambdas[0](self.schedule.last_epoch)
            loss = self._share_of_loss(index)
            self.optimizer.zero_grad()
            loss.backward()
            sum_gradients(self.model.shared_parameters())
            self.optimizer.step()
            self.schedule.step()
            total += loss.item() * len(index)
            progress.set_postfix(loss=f"{loss.item():.4f}")
        total = total.to(self.model.device)
        if self.model.vocabulary is None:
            sum_over_processes(total)
        return total.item() / len(self.train)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        own = [self.model.head.own] if getattr(self.model.head, "own", None) is not None else []
        others = [parameter for parameter in self.model.parameters() if not any(parameter is one for one in own)]
        rate = self.options.learning_rate * self.options.own_rate
        return [{"params": others}, *({"params": [parameter], "lr": rate} for parameter in own)]

    def _set_prototypes(self, left_out: Tensor | None = None) -> None:
        """The labels' documents, without those that are compared with them next. left_out: (m,)"""
        if not self.options.prototypes or self.model.kind != DUAL_ENCODER:
            return
        kept = torch.ones(len(self.train), dtype=torch.bool)
        if left_out is not None:
            kept[left_out] = False
        set_prototypes(self.model, self.train.part(kept.nonzero()[:, 0]))

    def _batches(self) -> Iterator[Tensor]:
        if self.options.clustered:
            assert self.document_vectors is not None
            yield from clustered_batches(self.document_vectors, self.options.batch_size, generator=self.generator)
        else:
            yield from torch.randperm(len(self.train), generator=self.generator).split(self.options.batch_size)

    def _share_of_loss(self, index: Tensor) -> Tensor:
        """This process's part of the mean over the documents of a batch, or all of it where labels are shared.

        index: (b,)
        """
        rows, counted = torch.arange(len(index)), 1.0
        if self.model.vocabulary is None:
            rows, counted = own_share(rows, self.state)
        labels, negatives = self.train.part(index).padded_labels(), self._negatives(index)
        if negatives is None:
            candidate_labels = None
        else:  # of the whole batch, so that every process has the same
            candidate_labels, labels = candidates(labels, negatives)
            if not len(candidate_labels):  # documents without labels alone: some label is there to be encoded
                candidate_labels = torch.zeros(1, dtype=torch.int64)
        documents = self.train.part(index[rows])
        logits = self.model.logits(documents.inputs, documents.rows, candidate_labels)
        return counted * self.loss(logits, labels[rows]).sum() / len(index)

    def _negatives(self, index: Tensor) -> Tensor | None:
        """Labels that a batch has beside its own; None for all labels."""
        if self.model.kind != DUAL_ENCODER or self.options.negatives == "all":
            return None
        if self.options.negatives == "hard":
            if self.hard is None:  # those of the batch alone
                return index[:0]
            if self.options.shortlist:
                return drawn_negatives(self.hard[index], self._hard_count, self.generator)
            return self.hard[index]
        return random_negatives(self.options.negative_count, self.train.label_count, self.generator)

    @property
    def _hard_count(self) -> int:
        """Hard negatives of a document."""
        return max(1, self.options.negative_count // 100)

    def _refresh(self) -> None:
        """The vectors that clusters and hard negatives are found by."""
        hard = self.options.negatives == "hard" and self.model.kind == DUAL_ENCODER
        hard = hard and self.epoch >= self.options.in_batch_epochs
        if not hard and not self.options.clustered:
            return
        vectors = self.model.document_vectors(self.train.inputs, self.train.rows)
        if self.options.clustered:
            self.document_vectors = vectors.cpu()
        if hard:
            count = max(self.options.shortlist, self._hard_count)
            right = self.train.padded_labels().to(vectors.device)
            found = hard_negatives(vectors, self.model.label_vectors(), right, count, vocabulary=self.model.vocabulary)
            self.hard = found.cpu()

    def quality(self, documents: Documents, k: int = 5) -> float:
        """nDCG@k, over the documents that have a label."""
        right = documents.padded_labels()
        found = predict(self.model, documents.inputs, min(k, documents.label_count), documents.rows)[1]
        gains = (found[:, :, None] == right[:, None, :]).any(-1) / torch.arange(2.0, found.shape[1] + 2).log2()
        ideal = (1 / torch.arange(2.0, found.shape[1] + 2).log2()).cumsum(0)
        counts = (right >= 0).sum(1).clamp(max=found.shape[1])
        labelled = counts > 0
        shares = gains.sum(1)[labelled] / ideal[counts[labelled] - 1]
        return shares.mean().item() if len(shares) else 0.0

    def _best_checkpoint(self) -> Path:
        best = max(self.history, key=lambda epoch: epoch["held_out_nDCG@5"])
        return checkpoint(self.folder, int(best["epoch"]))

    def _save(self) -> None:
        path = checkpoint(self.folder, self.epoch)
        more = {
            "schedule": self.schedule.state_dict(),
            "progress": (self.epoch, self.best, self.waited, self.history),
            "random": (torch.get_rng_state(), self.generator.get_state()),
            "found": (self.document_vectors, self.hard),
        }
        save(path, self.model, self.optimizer, self.state, more)
        if self.state.is_main_process:
            remove_checkpoints(self.folder, keep=(path, self._best_checkpoint()))

    def _load(self, path: Path) -> None:
        state = load(path, self.model, self.optimizer)
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.best, self.waited, self.history = state["progress"]
        random, generator = state["random"]
        torch.set_rng_state(random)
        self.generator.set_state(generator)
        self.document_vectors, self.hard = state["found"]
        if self.state.is_main_process:
            print(f"resumed after epoch {self.epoch}")


def predict(model: XmcModel, inputs: Inputs, k: int, rows: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    """Scores and labels of the k best for some documents, or for all, exact: (n, k) both, on the CPU. rows: (n,)

    Where processes share the labels, all of them call it, and get the same.
    """
    vectors = model.document_vectors(inputs, rows).float()
    found = topk(vectors, model.label_vectors(), k, vocabulary=model.vocabulary)
    return (found.scores / model.temperature).cpu(), found.classes.cpu()
