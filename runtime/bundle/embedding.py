"""Token embeddings, gathered on the host from the bundle's table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.bundle.errors import BundleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from trio_edge.runtime.bundle.reader import Bundle


@final
class EmbeddingTable:
    """Embeddings by token id, read from the mapped file on access."""

    def __init__(self, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self._dtype = manifest.dtype
        self._rows = bundle.map_tensor(manifest.token_embedding)
        scales = manifest.token_embedding_scales
        self._scales = None if scales is None else bundle.map_tensor(scales)

    def __getitem__(self, token_ids: NDArray[Any] | int) -> NDArray[Any]:
        """Return the rows of ``token_ids``, [..., D], in the graphs' dtype.

        Raises:
            BundleError: If there is no such row, because the tokenizer belongs to another model.
        """
        largest = int(np.max(token_ids, initial=0))
        if largest >= len(self._rows) or np.min(token_ids, initial=0) < 0:
            raise BundleError(
                f"tokenizer: expected token ids below {len(self._rows)} (rows of the embedding table), got {largest};"
                " export the bundle again"
            )
        rows: NDArray[Any] = self._rows[token_ids]
        if self._scales is None:
            return rows
        scaled: NDArray[Any] = rows.astype(self._dtype) * self._scales[token_ids][..., None]
        return scaled
