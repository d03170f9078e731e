"""Structured answers: one of several texts, or JSON that fits a schema.

llguidance computes the tokens that a schema allows; it is fast, reads Hugging Face's tokenizers and needs no torch. A choice
needs no grammar: the answer follows the token ids of one of the texts, which also works with word-level tokenizers.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.bundle.errors import ShapeError
from trio_edge.serving.requests.errors import RequestError, invalid_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.model.answers.sampling import TokenConstraint
    from trio_edge.runtime.pipeline import Pipeline
    from trio_edge.serving.requests.protocol import ChatRequest

_ANY_OBJECT: dict[str, Any] = {"type": "object"}


@final
class Constraints:
    """Makes the token constraints of a bundle's answers."""

    def __init__(self, pipeline: Pipeline) -> None:
        manifest = pipeline.manifest
        self._tokenizer, self._num_tokens = pipeline.tokenizer, manifest.token_embedding.shape[0]
        self._stop_ids = manifest.text.stop_token_ids
        self._grammar_tokenizer: Any = None

    def make(self, chat: ChatRequest) -> TokenConstraint | None:
        """Return the constraint that ``chat`` asks for, or None for free text.

        Raises:
            RequestError: If the bundle's tokenizer cannot write the form, or llguidance refuses the schema.
        """
        if chat.structured_outputs is not None:
            return self._choice(chat.structured_outputs.choice)
        form = chat.response_format
        if form is None or form.type == "text":
            return None
        return self._json(_ANY_OBJECT if form.json_schema is None else form.json_schema.schema)

    def _choice(self, texts: Sequence[str]) -> ChoiceConstraint:
        sequences = []
        for text in texts:
            ids = self._tokenizer.plain_ids(text).tolist()
            if self._tokenizer.decode(ids) != text:
                problem = f"expected texts that this model's tokenizer can write, got {text[:80]!r}"
                raise invalid_value("structured_outputs", f"{problem}; choose others")
            sequences.append(ids)
        return ChoiceConstraint(sequences, stop_ids=self._stop_ids, num_tokens=self._num_tokens)

    def _json(self, schema: dict[str, Any]) -> GrammarConstraint:
        import llguidance

        # Spaces between the fields would cost a decode step each.
        compact: Any = {"whitespace_flexible": False}
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=compact)
        matcher = llguidance.LLMatcher(self._tokenizer_for_grammars(), grammar, log_level=0)
        if matcher.is_error():
            raise _refused("a schema that llguidance knows", matcher.get_error())
        return GrammarConstraint(matcher, stop_ids=self._stop_ids, num_tokens=self._num_tokens)

    def _tokenizer_for_grammars(self) -> Any:
        """Return llguidance's tokenizer. The first call takes up to seconds."""
        if self._grammar_tokenizer is None:
            import llguidance

            try:
                self._grammar_tokenizer = llguidance.LLTokenizer(
                    self._tokenizer.to_json(), n_vocab=self._num_tokens, eos_token=list(self._stop_ids)
                )
            except ValueError as error:
                raise _refused("a bundle whose tokenizer can spell JSON", str(error)) from None
        return self._grammar_tokenizer


@final
class ChoiceConstraint:
    """Restricts an answer to one of several sequences of token ids, each followed by one of ``stop_ids``.

    ``num_tokens`` is V, the size of the vocabulary.
    """

    def __init__(
        self, sequences: Sequence[Sequence[int]], *, stop_ids: Sequence[int], num_tokens: int
    ) -> None:
        self._left, self._stop_ids, self._num_tokens = list(sequences), list(stop_ids), num_tokens
        self._length = 0

    def allowed(self) -> NDArray[np.bool_]:
        """Return [V], whether each token may come next."""
        ids = [sequence[self._length] for sequence in self._left if len(sequence) > self._length]
        ids += self._stop_ids if len(ids) < len(self._left) else []
        allowed_V = np.zeros(self._num_tokens, np.bool_)
        allowed_V[ids] = True
        return allowed_V

    def add(self, token: int) -> None:
        """Append a token to the answer."""
        place = slice(self._length, self._length + 1)
        self._left = [sequence for sequence in self._left if list(sequence[place]) == [token]]
        self._length += 1


@final
class GrammarConstraint:
    """Restricts an answer to the grammar of llguidance's ``LLMatcher``. ``num_tokens`` is V."""

    def __init__(self, matcher: Any, *, stop_ids: Sequence[int], num_tokens: int) -> None:
        self._matcher, self._stop_ids, self._num_tokens = matcher, list(stop_ids), num_tokens
        self._mask_V: NDArray[np.bool_] | None = None

    def allowed(self) -> NDArray[np.bool_]:
        """Return [V], whether each token may come next.

        Raises:
            ShapeError: If the schema is too complex for llguidance.
        """
        if self._mask_V is None:
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            if self._matcher.is_error():
                reason = self._matcher.get_error()[:200]
                raise ShapeError(f"response_format: expected a simpler schema, got: {reason}; shorten it")
            self._mask_V = np.unpackbits(bits, bitorder="little")[: self._num_tokens].astype(np.bool_)
        return self._mask_V

    def add(self, token: int) -> None:
        """Append a token to the answer."""
        self._mask_V = None
        if token not in self._stop_ids:
            self._matcher.consume_token(token)


def _refused(expected: str, reason: str) -> RequestError:
    return invalid_value("response_format", f"expected {expected}, got: {' '.join(reason[:200].split())}")
