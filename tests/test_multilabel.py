"""Losses with several right classes a row: against dense float64 definitions, in every form of the labels."""

import warnings

import pytest
import torch
import torch.nn.functional as F

import xhead
from tests.dense import dense_logits, relative_error
from tests.test_losses import CLASSES, ROWS, inputs
from xhead.losses import get_loss

NAMES = ["sigmoid", "asymmetric"]


def definition(name, logits, right):
    """right: (n, V) of zeros and ones"""
    if name == "sigmoid":
        return F.binary_cross_entropy_with_logits(logits, right, reduction="none").sum(-1)
    x = logits.sigmoid()
    z = (x - 0.05).clamp(min=0)
    return -(right * (1 - x) * x.log() + (1 - right) * z**4 * (1 - z).log()).sum(-1)


def label_forms():
    """Padded class indices with a repeat, an empty row and a full one; the same sets as sparse CSR and dense."""
    generator = torch.Generator().manual_seed(3)
    padded = torch.randint(-1, CLASSES, (ROWS, 4), generator=generator)
    padded[:, 2] = padded[:, 1]
    padded[7] = -1
    right = torch.zeros(ROWS, CLASSES, dtype=torch.float64)
    for row, columns in enumerate(padded.tolist()):
        for column in set(columns) - {-1}:
            right[row, column] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR is in beta, PyTorch says
        sparse = right.to_sparse_csr()
    return padded, sparse, right


@pytest.mark.parametrize("form", [{}, {"scale": 0.7, "softcap": 4.0}], ids=["linear", "capped"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_and_gradients(name, form):
    *sides, _ = inputs()
    padded, sparse, right = label_forms()
    upstream = torch.randn(ROWS, dtype=torch.float64)
    expected = definition(name, dense_logits(*sides, **form), right)
    true = torch.autograd.grad(expected, sides, upstream)
    for labels in (padded, sparse):
        for engine in ("reference", "chunked"):
            rows = get_loss(name, engine=engine)(xhead.LazyLogits(*sides, **form), labels)
            assert relative_error(rows, expected) < 1e-9
            ours = torch.autograd.grad(rows, sides, upstream)
            assert all(relative_error(mine, exact) < 1e-9 for mine, exact in zip(ours, true, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_float32(name):
    *sides, _ = inputs(torch.float32)
    padded, _, right = label_forms()
    expected = definition(name, dense_logits(*sides), right)
    rows = get_loss(name)(xhead.LazyLogits(*sides), padded)
    assert relative_error(rows, expected) < 1e-5
    pairs = zip(torch.autograd.grad(rows.sum(), sides), torch.autograd.grad(expected.sum(), sides), strict=True)
    assert all(relative_error(mine, exact) < 1e-5 for mine, exact in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_one_class_a_row_in_every_form(name):
    *sides, labels = inputs()
    logits = xhead.LazyLogits(*sides)
    rows = get_loss(name)(logits, labels)
    assert torch.allclose(rows, get_loss(name)(logits, labels[:, None]))
    padding = torch.full((ROWS, 2), -1)
    assert torch.allclose(rows, get_loss(name)(logits, torch.cat([padding, labels[:, None]], 1)))


@pytest.mark.parametrize("name", NAMES)
def test_no_right_class_no_rows_and_derivatives(name):
    *sides, _ = inputs(rows=3, classes=5, size=4)
    nothing = get_loss(name)(xhead.LazyLogits(*sides), torch.full((3, 2), -1))
    expected = definition(name, dense_logits(*sides), torch.zeros(3, 5, dtype=torch.float64))
    assert torch.allclose(nothing, expected)
    assert torch.autograd.grad(nothing.sum(), sides[0])[0].any()
    empty = get_loss(name)(xhead.LazyLogits(sides[0][:0], sides[1]), torch.zeros(0, 2, dtype=torch.int64))
    assert empty.shape == (0,)
    labels = torch.tensor([[0, 3], [-1, -1], [4, -1]])
    torch.autograd.gradcheck(lambda *s: get_loss(name)(xhead.LazyLogits(*s), labels), sides)


def test_asymmetric_is_that_of_timm():
    timm_loss = pytest.importorskip("timm.loss")
    *sides, _ = inputs(torch.float32)
    padded, _, right = label_forms()
    theirs = timm_loss.AsymmetricLossMultiLabel(reduction="sum")(dense_logits(*sides).float(), right.float())
    ours = get_loss("asymmetric")(xhead.LazyLogits(*sides), padded).sum()
    assert abs(ours / theirs - 1) < 1e-5


@pytest.mark.parametrize(
    ("error", "message", "labels"),
    [
        (RuntimeError, r"or sparse CSR.*got torch.float32.*to_sparse_csr", torch.zeros(ROWS, CLASSES)),
        (RuntimeError, r"labels must be int64 of shape \(41,\) or \(41, K\)", torch.zeros(40, 2, dtype=torch.int64)),
        (RuntimeError, "labels must be int64", torch.zeros(ROWS, 2, dtype=torch.int32)),
        (IndexError, "column 1031 is out of bounds", torch.full((ROWS, 1), CLASSES)),
        (IndexError, "target 1031 is out of bounds", torch.full((ROWS,), CLASSES)),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_labels_are_named(name, error, message, labels):
    *sides, _ = inputs()
    with pytest.raises(error, match=message):
        get_loss(name)(xhead.LazyLogits(*sides), labels)
