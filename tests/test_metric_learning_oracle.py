"""Values and gradients beside those of pytorch-metric-learning, where it is installed."""

import math

import pytest
import torch

import xhead
from tests.dense import relative_error
from xhead.losses import get_loss, pairs

oracle = pytest.importorskip("pytorch_metric_learning.losses")
MeanReducer = pytest.importorskip("pytorch_metric_learning.reducers").MeanReducer

ROWS, CLASSES, SIZE = 40, 50, 16

HEADS = {
    "normalised_softmax": ("NormalizedSoftmaxLoss", {"temperature": 0.05}, {"scale": 20.0}),
    "cosface": ("CosFaceLoss", {"margin": 0.35, "scale": 64}, {}),
    "arcface": ("ArcFaceLoss", {"margin": math.degrees(0.5), "scale": 64}, {}),
    "subcenter_arcface": ("SubCenterArcFaceLoss", {"margin": math.degrees(0.5), "scale": 64, "sub_centers": 3}, {}),
}
PAIRS = {
    "supcon": ("SupConLoss", {"temperature": 0.07}, {}),
    "circle": ("CircleLoss", {"m": 0.4, "gamma": 80}, {"detach_weights": True}),
    "multi_similarity": ("MultiSimilarityLoss", {"alpha": 2, "beta": 50, "base": 0.5}, {}),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name):
    theirs, their_options, options = HEADS[name]
    hidden = torch.randn(ROWS, SIZE, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(CLASSES, (ROWS,))
    module = getattr(oracle, theirs)(num_classes=CLASSES, embedding_size=SIZE, **their_options).double()
    weight = module.W.detach().T.clone().requires_grad_()
    expected = module(hidden, labels)
    actual = get_loss(name, **options)(xhead.LazyLogits(hidden, weight), labels).mean()
    assert relative_error(actual, expected) < 1e-12
    mine = torch.autograd.grad(actual, (hidden, weight))
    true = torch.autograd.grad(expected, (hidden, module.W))
    assert relative_error(mine[0], true[0]) < 1e-12
    assert relative_error(mine[1], true[1].T) < 1e-12


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    theirs, their_options, options = PAIRS[name]
    hidden = torch.randn(ROWS, SIZE, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(ROWS) % 6
    expected = getattr(oracle, theirs)(reducer=MeanReducer(), **their_options)(hidden, labels)
    actual = getattr(pairs, name)(hidden, labels, **options)
    assert relative_error(actual, expected) < 1e-12
    assert relative_error(*(torch.autograd.grad(loss, hidden)[0] for loss in (actual, expected))) < 1e-10
