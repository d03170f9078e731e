"""SCOPE: saliency times newly covered similarity, greedily.

Source: arXiv 2510.24214.

    gain_i = a_i Σ_j max(0, cos(x_i, x_j) − max over taken t of cos(x_t, x_j))

x are the vision encoder's features before the projector, a is the class row's attention (mean over heads; the original's
sum differs by a factor, which changes no order). The cover starts at 0. Unlike EADP, SCOPE weights the candidate and takes
the cosine as it is.

Differences from the original: the whole image is one pool; the original gives every crop of LLaVA-NeXT the same share.
Newlines neither cover nor are covered, and are kept only if the image has fewer than K tokens; the original drops them.
The K steps read N² numbers each.
"""

from __future__ import annotations

from trio_edge.trio.selectors.interface import KeepingModule, Selection, TokenInputs
from trio_edge.trio.selectors.tokens.candidates import given, masked, real_tokens, shown_tokens, unit_rows
from trio_edge.trio.selectors.tokens.greedy import cover


class Scope(KeepingModule):
    """SCOPE; no parameters."""

    def forward(self, inputs: TokenInputs) -> Selection:
        """Return the selection; scores give the order of choice, K for the first token."""
        real_N = real_tokens(inputs, num_keep=self.num_keep)
        shown_N = shown_tokens(inputs, num_keep=self.num_keep)
        unit_NF = unit_rows(given(inputs.features_NF, "features_NF"), shown_N)
        attention_N = masked(given(inputs.attention_N, "attention_N"), shown_N).clamp(min=0.0)
        weight_N = attention_N.to(unit_NF.dtype)
        return cover(unit_NF @ unit_NF.T, weight_N, shown_N, real_N, num_keep=self.num_keep)
