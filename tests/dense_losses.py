"""Definitions of the losses on dense logits, straight from their formulas, for tests to compare with.

logits: (n, V), labels: (n,) -> (n,)
"""

import math

import torch
import torch.nn.functional as F


def cross_entropy(logits, labels):
    return -log_p(logits, labels)


def log_p(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def p(logits, labels):
    return logits.softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def one_hot(logits, labels):
    return F.one_hot(labels, logits.shape[-1]).to(logits.dtype)


def squentropy(logits, labels):
    others = logits.square().masked_fill(one_hot(logits, labels).bool(), 0.0)
    return cross_entropy(logits, labels) + others.sum(-1) / (logits.shape[-1] - 1)


def comp_sum(logits, labels, tau):
    odds = (logits - logits.gather(-1, labels[:, None])).exp().sum(-1) - 1
    return (1 + odds).log() if tau == 1 else ((1 + odds) ** (1 - tau) - 1) / (1 - tau)


def ldr_kl(logits, labels, temperature, margin):
    margins = margin * (1 - one_hot(logits, labels))
    exponent = (logits - logits.gather(-1, labels[:, None]) + margins) / temperature
    t = temperature.squeeze(-1) if isinstance(temperature, torch.Tensor) else temperature
    return t * (exponent.logsumexp(-1) - math.log(logits.shape[-1]))


def aldr_kl(logits, labels, temperature=1.0, margin=0.0, alpha=2.0):
    """The largest temperature that solves the equation, by its iteration from above; differentiated as it stands."""
    classes, t = logits.shape[-1], torch.full_like(logits[:, :1], temperature)
    margins = (logits - logits.gather(-1, labels[:, None]) + margin * (1 - one_hot(logits, labels))).detach()
    for _ in range(2000):
        w = (margins / t).softmax(-1)
        divergence = (w * (w * classes).clamp(min=1e-300).log()).sum(-1, keepdim=True)
        t = temperature - temperature * divergence / (alpha * math.log(classes))
    penalty = alpha * math.log(classes) / temperature * (t.squeeze(-1) - temperature) ** 2 / 2
    return ldr_kl(logits, labels, t, margin) - penalty


def zloss(logits, labels, a=1.0, b=0.0):
    z = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, correction=0, keepdim=True)
    return F.softplus(a * (b - z)).gather(-1, labels[:, None]).squeeze(-1) / a


def log_taylor(logits, labels):
    numerator = 1 + logits + logits.square() / 2
    return -(numerator / numerator.sum(-1, keepdim=True)).gather(-1, labels[:, None]).squeeze(-1).log()


def log_spherical(logits, labels, eps=1e-2):
    numerator = logits.square() + eps
    return -(numerator / numerator.sum(-1, keepdim=True)).gather(-1, labels[:, None]).squeeze(-1).log()


def logit_clip(logits, labels, max_norm):
    norm = logits.norm(dim=-1, keepdim=True)
    return cross_entropy(torch.where(norm > max_norm, logits * max_norm / norm, logits), labels)


def nce(logits, labels):
    return log_p(logits, labels) / logits.log_softmax(-1).sum(-1)


def rce(logits, labels, label_floor=1e-4):
    return -(logits.softmax(-1) * one_hot(logits, labels).clamp(min=label_floor).log()).sum(-1)


def mae(logits, labels):
    return (logits.softmax(-1) - one_hot(logits, labels)).abs().sum(-1)


def focal(logits, labels, gamma=2.0):
    return -((1 - p(logits, labels)) ** gamma) * log_p(logits, labels)


def over_all_labels(loss, logits, labels):
    """The loss divided by its sum over every label that a row could have."""
    each = [loss(logits, torch.full_like(labels, label)) for label in range(logits.shape[-1])]
    return loss(logits, labels) / sum(each)


def nfl(logits, labels, gamma=2.0):
    log_p = logits.log_softmax(-1)
    every = -((1 - log_p.exp()) ** gamma) * log_p
    return every.gather(-1, labels[:, None]).squeeze(-1) / every.sum(-1)


def stablemax(logits, labels):
    numerator = torch.where(logits >= 0, logits + 1, 1 / (1 - logits))
    return -(numerator / numerator.sum(-1, keepdim=True)).gather(-1, labels[:, None]).squeeze(-1).log()


def asymmetric(logits, labels, gamma_positive=1.0, gamma_negative=4.0, margin=0.05):
    right, x = one_hot(logits, labels), logits.sigmoid()
    z = (x - margin).clamp(min=0)
    wrong = -(z**gamma_negative) * (1 - z).log()
    return (right * -((1 - x) ** gamma_positive) * x.log() + (1 - right) * wrong).sum(-1)


SETTLED = {"steps": 2000, "tolerance": 1e-14}

DEFINITIONS = [
    ("cce", {}, cross_entropy),
    ("cce", {"lse_penalty": 0.1}, lambda o, y: cross_entropy(o, y) + 0.1 * o.logsumexp(-1) ** 2),
    ("lse_penalty", {"coefficient": 0.3}, lambda o, y: 0.3 * o.logsumexp(-1) ** 2),
    ("focal", {}, focal),
    ("focal", {"gamma": 0.5}, lambda o, y: focal(o, y, 0.5)),
    ("focal", {"gamma": 0.0}, cross_entropy),
    ("poly1", {"epsilon": 1.5}, lambda o, y: cross_entropy(o, y) + 1.5 * (1 - p(o, y))),
    ("gce", {}, lambda o, y: (1 - p(o, y) ** 0.7) / 0.7),
    ("mae", {}, mae),
    *[("comp_sum", {"tau": t}, lambda o, y, t=t: comp_sum(o, y, t)) for t in (1.4, 0.0, 0.5, 1.0, 2.0)],
    ("squentropy", {}, squentropy),
    ("maxsup", {"alpha": 0.2}, lambda o, y: cross_entropy(o, y) + 0.2 * (o.amax(-1) - o.mean(-1))),
    ("nce", {}, nce),
    ("rce", {"label_floor": 1e-3}, lambda o, y: rce(o, y, 1e-3)),
    ("apl", {}, lambda o, y: nce(o, y) + rce(o, y)),
    (
        "apl",
        {"alpha": 2.0, "beta": 0.5, "active": "focal", "gamma": 1.5, "passive": "mae"},
        lambda o, y: 2 * focal(o, y, 1.5) + 0.5 * mae(o, y),
    ),
    ("apl", {"active": "ce", "beta": 0.1}, lambda o, y: cross_entropy(o, y) + 0.1 * rce(o, y)),
    (
        "apl",
        {"active": "nfl", "gamma": 0.5, "passive": "nmae", "beta": 900.0},
        lambda o, y: nfl(o, y, 0.5) + 900 * (1 - p(o, y)) / (o.shape[-1] - 1),
    ),
    (
        "apl",
        {"alpha": 0.3, "active": "nfl", "passive": "nrce", "beta": 2.0},
        lambda o, y: 0.3 * nfl(o, y) + 2 * (1 - p(o, y)) / (o.shape[-1] - 1),
    ),
    ("logit_clip", {"max_norm": 40.0}, lambda o, y: logit_clip(o, y, 40.0)),
    ("ldr_kl", {}, lambda o, y: ldr_kl(o, y, 1.0, 0.0)),
    ("ldr_kl", {"temperature": 0.4, "margin": 1.5}, lambda o, y: ldr_kl(o, y, 0.4, 1.5)),
    ("aldr_kl", SETTLED, aldr_kl),
    (
        "aldr_kl",
        SETTLED | {"temperature": 0.7, "margin": 0.8, "alpha": 1.3},
        lambda o, y: aldr_kl(o, y, 0.7, 0.8, 1.3),
    ),
    ("zloss", {}, zloss),
    ("zloss", {"a": 0.1, "b": 10.0}, lambda o, y: zloss(o, y, 0.1, 10.0)),
    ("log_taylor", {}, log_taylor),
    ("log_spherical", {}, log_spherical),
    ("log_spherical", {"eps": 0.5}, lambda o, y: log_spherical(o, y, 0.5)),
    ("mse", {}, lambda o, y: (o - one_hot(o, y)).square().sum(-1)),
    ("stablemax", {}, stablemax),
    ("sigmoid", {}, lambda o, y: F.binary_cross_entropy_with_logits(o, one_hot(o, y), reduction="none").sum(-1)),
    ("asymmetric", {}, asymmetric),
    (
        "asymmetric",
        {"gamma_positive": 0.0, "gamma_negative": 2.0, "margin": 0.0},
        lambda o, y: asymmetric(o, y, 0.0, 2.0, 0.0),
    ),
]
"""(name, options, definition with those options)."""
