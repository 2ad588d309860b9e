"""Prediction over all classes without N x V numbers: the best classes, ranks, and a temperature for scores."""

from xhead.retrieval.approximate import MaximumInnerProduct
from xhead.retrieval.temperature import fit_inverse_temperature
from xhead.retrieval.topk import TopK, ranks, topk

__all__ = ["MaximumInnerProduct", "TopK", "fit_inverse_temperature", "ranks", "topk"]
