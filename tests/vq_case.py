"""Heads of vector-quantised logits for tests, and their dense definition."""

import torch
from torch import nn

import xhead
from tests.tiny import tiny
from xhead.heads.vq import VQHead
from xhead.heads.vq_config import VQConfig

V, K, D, N = 23, 6, 5, 17


def make(config=None, dtype=torch.float64, tokens=V, width=D, **options):
    """A head with random parameters, and a mapping that starts at random."""
    config = config or VQConfig(**{"codebook_size": K, "start": "random", **options})
    projection = nn.Linear(width, tokens, bias=config.token_bias == "learned", dtype=dtype)
    head = VQHead(width, tokens, config).to(dtype)
    head.start_from(projection, token_counts=torch.randint(0, 50, (tokens,)))
    with torch.no_grad():
        head.codebook.normal_()
        if config.residual_size:
            head.residual_codebook.normal_()
        if config.token_bias == "learned":
            head.token_bias.normal_()
    return head


def dense(head, hidden):
    """The logits by the definition: the rows of each token's codes, and the token's bias."""
    logits = hidden @ head.codebook[head.token_code].T
    if head.config.residual_size:
        logits = logits + hidden @ head.residual_codebook[head.residual_code].T
    if head.config.token_bias == "frequency":
        logits = logits + head.token_weight.to(hidden.dtype).log()
    if head.config.token_bias == "learned":
        logits = logits + head.token_bias
    return logits


def rows_and_labels(dtype=torch.float64, rows=N, scale=1.0):
    return scale * torch.randn(rows, D, dtype=dtype), torch.randint(V, (rows,))


def gradients(value, head, hidden):
    """The gradients for `hidden` and for the head's parameters, but for those that no logit reads."""
    leaves = [hidden, *(p for name, p in head.named_parameters() if name != "token_rows")]
    return torch.autograd.grad(value, leaves, retain_graph=True)


def model_with(name="LlamaForCausalLM", **options):
    """A tiny model with the head of 12 codes for its 96 tokens."""
    options = {"codebook_size": 12, "start": "random", "token_counts": torch.arange(96), **options}
    return xhead.patch(tiny(name).eval(), head="vq", **options)
