"""The spherical losses from their formulas, on all scores, in float64."""

import torch
import torch.nn.functional as F


def z_loss(scores, y, sharpness=1.0, margin=0.0, eps=1e-12):
    z = (scores - scores.mean(-1, keepdim=True)) / (scores.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return (y * F.softplus(sharpness * (margin - z)) / sharpness).sum(-1)


def log_taylor(scores, y):
    numerator = 1 + scores + scores.square() / 2
    return -(y * (numerator / numerator.sum(-1, keepdim=True)).log()).sum(-1)


def log_spherical(scores, y, eps=1e-2):
    numerator = scores.square() + eps
    return -(y * (numerator / numerator.sum(-1, keepdim=True)).log()).sum(-1)


def squared_error(scores, y):
    return (scores - y).square().sum(-1)


MEMBERS = [
    ("mse", {}, squared_error),
    ("zloss", {}, z_loss),
    ("zloss", {"sharpness": 0.1, "margin": 10.0, "eps": 1e-3}, z_loss),
    ("log_taylor", {}, log_taylor),
    ("log_spherical", {}, log_spherical),
    ("log_spherical", {"eps": 0.5}, log_spherical),
]


def target_matrix(classes, count, values=None, dtype=torch.float64):
    """y (n, V): the values of each row's targets, added up where they are the same class; -100 is none."""
    values = torch.ones_like(classes, dtype=dtype) if values is None else values.to(dtype)
    values = values.masked_fill(classes == -100, 0.0)
    return torch.zeros(len(classes), count, dtype=dtype).scatter_add(1, classes.clamp(min=0), values)
