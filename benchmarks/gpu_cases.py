"""What `benchmarks.gpu` measures on: shapes of models, kinds of inputs, and the exact gradients to compare with."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.cpu import relative_error
from benchmarks.inputs import HeadInputs

CHECKED = 64  # rows of hidden, and 4 times as many classes, whose gradient is compared


class Shape(NamedTuple):
    rows: int
    classes: int
    width: int
    kept_entries: tuple[int, ...] = (40, 200)  # a row, of p >= 2^-12, in inputs like a trained model's


CASES = {
    "gemma": Shape(8192, 256000, 2304),
    "llama3": Shape(8192, 128256, 4096),
    "qwen": Shape(4096, 151936, 896),
    "llama2": Shape(16384, 32000, 4096),
}
SMOKE = {"smoke": Shape(32, 512, 16, (61,))}


def kinds(shape: Shape) -> dict[str, Callable[..., HeadInputs]]:
    """Kinds of inputs by name: each a function of the device and the dtype."""

    def initialisation(device: torch.device) -> HeadInputs:
        return inputs.random_initialisation(*shape[:3], device=device)

    def trained(entries: int) -> Callable[..., HeadInputs]:
        share = entries / shape.classes
        return lambda device: inputs.trained_like(*shape[:3], kept_share=share, device=device)

    found: dict[str, Callable[..., HeadInputs]] = {"random initialisation": initialisation}
    for entries in shape.kept_entries:
        found[f"like trained, {entries} entries a row"] = trained(entries)
    return found


class Truth(NamedTuple):
    """Exact gradients of the mean loss for some rows and some classes."""

    row: Tensor
    hidden_grad: Tensor  # (r, D) float64
    classes: Tensor
    weight_grad: Tensor  # (c, D) float64

    def errors(self, hidden_grad: Tensor, weight_grad: Tensor) -> tuple[float, float]:
        return (
            relative_error(hidden_grad[self.row].double(), self.hidden_grad),
            relative_error(weight_grad[self.classes].double(), self.weight_grad),
        )


def exact(made: HeadInputs, block: int = 1024) -> Truth:
    """The truth from dense logits, a block of rows at a time: log-sum-exps in float32, the rest in float64."""
    hidden, weight, target = made.hidden, made.weight, made.target
    rows, classes, device = hidden.shape[0], weight.shape[0], hidden.device
    row = torch.arange(0, rows, max(rows // CHECKED, 1), device=device)[:CHECKED]
    # Half of the classes are targets, which rare ones seldom are.
    spread = torch.arange(0, classes, max(classes // (2 * CHECKED), 1), device=device)
    column = torch.cat([spread, target[: 2 * CHECKED]]).unique()
    wide = weight.float()
    lse = torch.cat([torch.logsumexp(part.float() @ wide.T, 1) for part in hidden.split(block)]).double()
    del wide
    residual = torch.exp(hidden.double() @ weight[column].double().T - lse[:, None])
    residual -= (target[:, None] == column).double()
    weight_grad = residual.T @ hidden.double() / rows
    hidden_grad = torch.zeros(row.shape[0], hidden.shape[1], dtype=torch.float64, device=device)
    for start in range(0, classes, 16384):
        part = weight[start : start + 16384].double()
        hidden_grad += torch.exp(hidden[row].double() @ part.T - lse[row, None]) @ part
    hidden_grad = (hidden_grad - weight[target[row]].double()) / rows
    return Truth(row, hidden_grad, column, weight_grad)
