"""Train a model on documents with label sets: batches, negatives, early stopping by held-out documents, resuming."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from scipy.sparse import csr_matrix
from torch import Tensor
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup

from recipes.extreme_classification.neural.model import DUAL_ENCODER, XmcModel
from recipes.extreme_classification.neural.options import NeuralOptions
from recipes.one_billion_word.checkpoints import written_aside
from recipes.one_billion_word.errors import RecipeError
from xhead.heads import InPlaceClassifier
from xhead.heads.label_batches import candidates, clustered_batches, hard_negatives, random_negatives
from xhead.losses import get_loss
from xhead.retrieval import topk

BEST, LAST = "model.safetensors", "checkpoint.pt"


@dataclass(frozen=True)
class Documents:
    """Tokens and label sets."""

    inputs: dict[str, Tensor]  # each (n, T)
    labels: csr_matrix  # (n, L)

    def rows(self, index: Tensor) -> Documents:
        """Some of them. index: (b,)"""
        return Documents({name: tensor[index] for name, tensor in self.inputs.items()}, self.labels[index.numpy()])

    def __len__(self) -> int:
        return self.labels.shape[0]  # pyright: ignore

    def padded_labels(self) -> Tensor:
        """(n, K), -1 for none"""
        counts = np.diff(self.labels.indptr)
        padded = np.full((len(self), max(int(counts.max(initial=0)), 1)), -1, dtype=np.int64)
        padded[np.arange(padded.shape[1]) < counts[:, None]] = self.labels.indices
        return torch.from_numpy(padded)


class Training:
    """A model, its optimiser, and what a run that goes on needs to know."""

    def __init__(self, model: XmcModel, options: NeuralOptions, documents: Documents, folder: Path):
        self.model, self.options, self.folder = model, options, folder
        self.generator = torch.Generator().manual_seed(options.seed)
        order = torch.randperm(len(documents), generator=self.generator)
        kept_out = max(1, round(options.held_out * len(documents)))
        if kept_out >= len(documents):
            raise RecipeError(f"{len(documents)} documents are too few to hold {kept_out} of them out")
        self.held_out, self.train = documents.rows(order[:kept_out]), documents.rows(order[kept_out:])
        self.loss = get_loss(options.loss, **options.parsed_loss_options)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        self.steps = -(-len(self.train) // options.batch_size)
        total = self.steps * options.epochs
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, int(options.warmup * total), total)
        self.epoch, self.best, self.waited = 0, -1.0, 0
        self.history: list[dict[str, float]] = []
        self.document_vectors = self.hard = None

    def run(self) -> None:
        """Train to the end, or until the held-out documents get no better; the best model is left in the folder."""
        if self.options.resume and (self.folder / LAST).is_file():
            self._load()
        while self.epoch < self.options.epochs and self.waited < self.options.patience:
            loss = self._train_epoch()
            quality = self.quality(self.held_out)
            self.epoch += 1
            self.history.append({"epoch": self.epoch, "loss": loss, "held_out_nDCG@5": quality})
            print(f"epoch {self.epoch}: loss {loss:.4f}, held-out nDCG@5 {100 * quality:.2f}", flush=True)
            self.waited += 1
            if quality > self.best:
                self.best, self.waited = quality, 0
                with written_aside(self.folder / BEST) as path:
                    save_model(self.model, str(path))
            self._save()
        load_model(self.model, str(self.folder / BEST))

    def _train_epoch(self) -> float:
        if self.epoch % self.options.refresh_epochs == 0 or self.document_vectors is None:
            self._refresh()
        self.model.train()
        total = 0.0
        progress = tqdm(self._batches(), total=self.steps, desc=f"epoch {self.epoch + 1}", leave=False, disable=None)
        head, rate = self.model.head, self.options.classifier_learning_rate
        for index in progress:
            if isinstance(head, InPlaceClassifier):
                # Its own rate follows the same schedule.
                head.lr = rate * float(self.schedule.get_last_lr()[0]) / self.options.learning_rate
            loss = self._batch_loss(index)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.item() * len(index)
            progress.set_postfix(loss=f"{loss.item():.4f}")
        return total / len(self.train)

    def _batches(self) -> Iterator[Tensor]:
        if self.options.clustered:
            assert self.document_vectors is not None
            yield from clustered_batches(self.document_vectors, self.options.batch_size, generator=self.generator)
        else:
            yield from torch.randperm(len(self.train), generator=self.generator).split(self.options.batch_size)

    def _batch_loss(self, index: Tensor) -> Tensor:
        batch = self.train.rows(index)
        labels, kind = batch.padded_labels(), self.options.negatives
        if self.model.kind != DUAL_ENCODER or kind == "all":
            return self.loss(self.model.logits(batch.inputs), labels).mean()
        if kind == "hard":
            assert self.hard is not None
            negatives = self.hard[index]
        else:
            negatives = random_negatives(self.options.negative_count, batch.labels.shape[1], self.generator)  # pyright: ignore
        chosen = candidates(labels, negatives)
        return self.loss(self.model.logits(batch.inputs, chosen.index), chosen.labels).mean()

    def _refresh(self) -> None:
        """The vectors that clusters and hard negatives are found by."""
        hard = self.options.negatives == "hard" and self.model.kind == DUAL_ENCODER
        if not hard and not self.options.clustered:
            return
        self.model.eval()
        self.document_vectors = self.model.document_vectors(self.train.inputs)
        if hard:
            count = max(1, self.options.negative_count // 100)
            right = self.train.padded_labels()
            self.hard = hard_negatives(self.document_vectors, self.model.label_vectors(), right, count)

    def quality(self, documents: Documents, k: int = 5) -> float:
        """nDCG@k, over the documents that have a label."""
        right = documents.padded_labels()
        found = predict(self.model, documents.inputs, min(k, documents.labels.shape[1]))[1]  # pyright: ignore
        gains = (found[:, :, None] == right[:, None, :]).any(-1) / torch.arange(2.0, found.shape[1] + 2).log2()
        ideal = (1 / torch.arange(2.0, found.shape[1] + 2).log2()).cumsum(0)
        counts = (right >= 0).sum(1).clamp(max=found.shape[1])
        labelled = counts > 0
        shares = gains.sum(1)[labelled] / ideal[counts[labelled] - 1]
        return shares.mean().item() if len(shares) else 0.0

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": (self.epoch, self.best, self.waited, self.history),
            "random": (torch.get_rng_state(), self.generator.get_state()),
        }
        with written_aside(self.folder / LAST) as path:
            torch.save(state, path)

    def _load(self) -> None:
        state = torch.load(self.folder / LAST, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.best, self.waited, self.history = state["progress"]
        random, generator = state["random"]
        torch.set_rng_state(random)
        self.generator.set_state(generator)
        print(f"resumed after epoch {self.epoch}")


def predict(model: XmcModel, inputs: dict[str, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Scores and labels of the k best, exact: (n, k) both."""
    model.eval()
    found = topk(model.document_vectors(inputs).float(), model.label_vectors(), k)
    return found.scores / model.temperature, found.classes
