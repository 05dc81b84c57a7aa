"""TF-IDF and truncated SVD: text vectors without a download.

Words weigh by (1 + log count) x inverse document frequency, rows have length 1, and the SVD keeps
the directions of largest singular value. This is latent semantic analysis (Deerwester et al., 1990).
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from llmrec.errors import DataError

logger = logging.getLogger("llmrec")

WORD = r"(?u)\b\w+\b"


class TfidfEncoder:
    """Fitted on the texts it is made with.

    Args:
        texts: all texts, each with at least one letter or digit.
        dim: width D after the SVD; a smaller one results if the texts do not span as many directions.
        seed: of the randomised SVD.
    """

    def __init__(self, texts: list[str], *, dim: int, seed: int) -> None:
        # One-letter words count: catalogues have sizes, grades and titles such as "X".
        self.vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=WORD)
        table = self.vectorizer.fit_transform(texts)
        spread = table.max(axis=0).toarray() - table.min(axis=0).toarray()
        if table.shape[1] < 2 or (len(texts) > 1 and spread.max() < 1e-9):
            raise DataError(
                f"encode_items.text: all {len(texts)} texts hold the same words, such as {texts[0][:40]!r}; "
                "choose other columns, or set encode_items.text.encoder=none"
            )
        self.terms, self.asked = table.shape[1], dim
        keep = min(dim, *table.shape)
        with np.errstate(invalid="ignore"):  # a single text: a variance of 0 to explain
            self.svd = TruncatedSVD(keep, random_state=seed).fit(table)
        sizes = self.svd.singular_values_
        rank = max(1, int((sizes > 1e-6 * sizes[0]).sum()))
        self.components = self.svd.components_[:rank]
        self.directions = directions_of(self.components)
        self.explained = float(np.nan_to_num(self.svd.explained_variance_ratio_[:rank], nan=1.0).sum())
        if rank < dim:
            logger.warning(
                "text: %d texts of %d terms span %d directions; width %d instead of %d",
                len(texts), self.terms, rank, rank, dim,
            )  # fmt: skip

    def prepare(self, inputs: list[str]) -> list[str]:
        return inputs

    def encode(self, batch: list[str]) -> np.ndarray:
        return (self.vectorizer.transform(batch) @ self.directions).astype(np.float32)

    def fitted(self) -> dict[str, np.ndarray]:
        """What `FittedTfidf` needs: terms (UTF-8, one a line), their weights, and directions."""
        terms = "\n".join(self.vectorizer.get_feature_names_out())
        return {
            "terms": np.frombuffer(terms.encode(), np.uint8).copy(),
            "idf": self.vectorizer.idf_,
            "components": self.components,
        }

    def describe(self) -> dict[str, Any]:
        return {
            "num_terms": self.terms,
            "dim_asked": self.asked,
            "explained_variance_rate": round(self.explained, 6),
        }


def directions_of(components: np.ndarray) -> np.ndarray:
    """Components (D, terms) as columns that lie together: scipy would copy them for every batch."""
    return np.ascontiguousarray(components.T)


class FittedTfidf:
    """A `TfidfEncoder` that was fitted before, for texts of new items.

    Args:
        arrays: see `TfidfEncoder.fitted`.
    """

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        terms = arrays["terms"].tobytes().decode().split("\n")
        self.vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=WORD, vocabulary=terms)
        self.vectorizer.idf_ = arrays["idf"]
        self.directions = directions_of(arrays["components"])

    def prepare(self, inputs: list[str]) -> list[str]:
        return inputs

    def encode(self, batch: list[str]) -> np.ndarray:
        """float32 (B, D); a text without a known word gives zeros."""
        return (self.vectorizer.transform(batch) @ self.directions).astype(np.float32)

    def describe(self) -> dict[str, Any]:
        return {"num_terms": len(self.vectorizer.vocabulary)}
