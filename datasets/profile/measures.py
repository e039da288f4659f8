"""What two columns of a sample say of each other: AUC of one column alone, dependence on a key, correlation.

Shapes: N rows of the sample, in random order.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

NULL = np.int64(-(2**63) + 1)
"""Code of a null."""
_FOLDS, _PRIOR_ROWS = 5, 10.0
_BINS = 100


def values_of(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int64 [N], equal for equal values, nulls a value of their own; and numbers float64 [N], NaN for null."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    known = array.is_valid().to_numpy(zero_copy_only=False)
    filled = array.fill_null(0).to_numpy(zero_copy_only=False)
    number_N = np.where(known, filled.astype(np.float64), np.nan)
    code_N = filled.view(np.int64) if filled.dtype == np.float64 else filled.astype(np.int64)
    return np.where(known, code_N, NULL), number_N


def categories(value_N: np.ndarray) -> np.ndarray:
    """Values as 0, 1, 2 ... in ascending order; NaN comes last."""
    return np.unique(value_N, return_inverse=True)[1]


def _auc_of_groups(positive_G: np.ndarray, negative_G: np.ndarray) -> float:
    """Chance that a positive comes after a negative, ties half; groups in ascending order of the score."""
    pairs = positive_G.sum() * negative_G.sum()
    return float((positive_G * (np.cumsum(negative_G) - negative_G / 2)).sum() / pairs) if pairs else 0.5


def rank_auc(category_N: np.ndarray, label_N: np.ndarray) -> float:
    """AUC of a number, or of its negative, whichever is larger. The number comes as `categories`."""
    ones = np.bincount(category_N, label_N)
    found = _auc_of_groups(ones, np.bincount(category_N) - ones)
    return max(found, 1 - found)


def out_of_fold_auc(category_N: np.ndarray, label_N: np.ndarray) -> float:
    """AUC of a category: the score of a row is the label's mean over the rows of its category in the other four of five folds.

    Shrunk towards the overall mean, so that a category seen once, like a unique id, tells nothing.
    """
    num_cells = (int(category_N.max()) + 1) * _FOLDS
    cell_N = category_N * _FOLDS + np.arange(len(label_N)) % _FOLDS
    rows = np.bincount(cell_N, minlength=num_cells).reshape(-1, _FOLDS)
    ones = np.bincount(cell_N, label_N, minlength=num_cells).reshape(-1, _FOLDS)
    other_rows, other_ones = rows.sum(1, keepdims=True) - rows, ones.sum(1, keepdims=True) - ones
    score = (other_ones + _PRIOR_ROWS * label_N.mean()) / (other_rows + _PRIOR_ROWS)
    taken = rows > 0
    tied = categories(score[taken])
    return _auc_of_groups(np.bincount(tied, ones[taken]), np.bincount(tied, (rows - ones)[taken]))


def quantile_bins(number_N: np.ndarray) -> np.ndarray:
    """Categories of about equally full bins; NaN is a bin of its own."""
    known = number_N[~np.isnan(number_N)]
    if len(known) == 0:
        return np.zeros(len(number_N), np.int64)
    edges = np.unique(np.quantile(known, np.linspace(0, 1, _BINS + 1)[1:-1]))
    return np.where(np.isnan(number_N), len(edges) + 1, np.searchsorted(edges, number_N, side="right"))


class Key:
    """A column that others may depend on, such as the user: do rows with the same key agree?"""

    def __init__(self, code_N: np.ndarray) -> None:
        self.order = np.argsort(code_N, kind="stable")
        code_N = code_N[self.order]
        self.same = (code_N[1:] == code_N[:-1]) & (code_N[1:] != NULL)

    def disagreement(self, code_N: np.ndarray) -> float | None:
        """How often two rows of one key differ, as a share of how often any two rows differ: 0 for an attribute of the key, about 1 for
        what has nothing to do with it. None where the sample has too few such pairs to tell."""
        by_chance = float((code_N[1:] != code_N[:-1]).mean()) if len(code_N) > 1 else 0.0
        if by_chance * self.same.sum() < 20:
            return None
        sorted_N = code_N[self.order]
        return float((sorted_N[1:] != sorted_N[:-1])[self.same].mean()) / by_chance


def rank_correlation(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Spearman's correlation over rows where both are known; 0 where one is constant."""
    known = ~(np.isnan(a_N) | np.isnan(b_N))
    return correlation(_ranks(a_N[known]), _ranks(b_N[known]))


def _ranks(number_N: np.ndarray) -> np.ndarray:
    """Ranks, ties at their mean."""
    _, inverse, counts = np.unique(number_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def correlation(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Pearson's correlation; 0 where one is constant."""
    if len(a_N) < 2 or a_N.std() == 0 or b_N.std() == 0:
        return 0.0
    return float(np.corrcoef(a_N, b_N)[0, 1])


def is_relabelled(a_N: np.ndarray, b_N: np.ndarray) -> bool:
    """Whether each value of one column goes with one value of the other, both ways."""
    a_N, b_N = categories(a_N), categories(b_N)
    pairs = len(np.unique(a_N * (int(b_N.max()) + 1) + b_N))
    return pairs == int(a_N.max()) + 1 == int(b_N.max()) + 1
