"""Rows of single tokens, gathered on the host from the bundle's tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.bundle.errors import BundleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.manifest import StoredTensor
    from trio_edge.runtime.bundle.reader import Bundle


@final
class TokenTable:
    """Rows by token id, read from the mapped file on access: the embeddings, or the head's rows."""

    def __init__(self, bundle: Bundle, rows: StoredTensor, scales: StoredTensor | None) -> None:
        """Map ``rows`` [V, D] and the ``scales`` [V] of INT8 rows."""
        self._dtype = bundle.manifest.dtype
        self._rows = bundle.map_tensor(rows)
        self._scales = None if scales is None else bundle.map_tensor(scales)

    def __getitem__(self, token_ids: NDArray[Any] | int) -> NDArray[Any]:
        """Return the rows of ``token_ids``, [..., D], in the graphs' dtype.

        Raises:
            BundleError: If there is no such row, because the tokenizer belongs to another model.
        """
        largest = int(np.max(token_ids, initial=0))
        if largest >= len(self._rows) or np.min(token_ids, initial=0) < 0:
            raise BundleError(
                f"tokenizer: expected token ids below {len(self._rows)} (rows of the table), got {largest};"
                " export the bundle again"
            )
        rows: NDArray[Any] = self._rows[token_ids]
        if self._scales is None:
            return rows
        scaled: NDArray[Any] = rows.astype(self._dtype) * self._scales[token_ids][..., None]
        return scaled
