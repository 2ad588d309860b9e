"""How likely a right label is to be recorded at all, by how often it occurs: the model of Jain et al. (KDD 2016).

    C = (ln N - 1) (B + 1)^A        1/p_l = 1 + C (n_l + B)^-A

N documents are in training, n_l of them have label l. A and B belong to a data set; a propensity-scored number says
little without its A, B and N.
"""

from __future__ import annotations

import re

import numpy as np
from scipy.sparse import csr_matrix

DEFAULT = (0.55, 1.5)
# The first pattern found in a data set's name, in lower case, decides. Others take the default, WikiSeeAlso too.
CONSTANTS = (
    ("amazon", (0.6, 2.6)),
    (r"wikipedia|wikilshtc|wikititles|wiki-?500k", (0.5, 0.4)),
)


def propensity_constants(name: str) -> tuple[float, float]:
    """A and B as they are used for a public data set, by its name, such as `LF-AmazonTitles-131K`."""
    return next((constants for pattern, constants in CONSTANTS if re.search(pattern, name.lower())), DEFAULT)


def inverse_propensity(
    train_labels: csr_matrix,  # (documents, labels)
    constants: tuple[float, float] = DEFAULT,
) -> np.ndarray:
    """1/p_l of each label, from the label matrix of training.

    Args:
        train_labels: entries that are not zero are labels.
        constants: A and B.

    Returns:
        float64 (labels,), the larger the rarer the label.

    Raises:
        ValueError: fewer than three documents, for which C is not positive; A or B out of range.
    """
    documents = train_labels.shape[0]  # pyright: ignore
    a, b = constants
    if not (a > 0 and b > 0):
        raise ValueError(f"A = {a}, B = {b}; propensities need both above 0")
    if documents < 3:
        raise ValueError(f"{documents} training documents; propensities need 3 or more, for which ln N exceeds 1")
    scale = (np.log(documents) - 1) * (b + 1) ** a
    return 1 + scale * (label_counts(train_labels) + b) ** -a


def label_counts(labels: csr_matrix) -> np.ndarray:
    """In how many documents each label occurs: int64 (labels,)."""
    return np.bincount(labels.indices[labels.data != 0], minlength=labels.shape[1])  # pyright: ignore
