"""The settings of a checkpoint's ``generation_config.json`` that a bundle carries."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
_Limit: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_Factor: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_Penalty: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-3, le=1e3)]
_Share: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1)]

SAMPLING_SETTINGS = ("temperature", "top_k", "top_p")
"""Settings that only sampling reads."""
LIMIT_SETTINGS = ("max_new_tokens", "max_length")
"""Settings that only say where an answer ends."""


class GenerationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hugging Face's settings with its names and defaults. They apply where the user sets nothing else."""

    do_sample: bool = False
    """Sample tokens. Without it, decoding is greedy and ignores ``SAMPLING_SETTINGS``."""
    temperature: _Factor = 1.0
    top_k: _Count = 50
    """0 means all tokens."""
    top_p: _Share = 1.0
    repetition_penalty: _Penalty = 1.0
    """Divides positive logits of tokens in the prompt or the answer, and multiplies negative ones; 1 means none."""
    no_repeat_ngram_size: _Count = 0
    """Length of token sequences that may not occur twice in prompt and answer; 0 means no limit."""
    min_length: _Count = 0
    """Shortest prompt and answer together, visual tokens included; no stop token comes before."""
    min_new_tokens: _Count = 0
    """Shortest answer in tokens; above 0 it replaces ``min_length``."""
    max_new_tokens: _Limit | None = None
    """Longest answer in tokens, if the user asks for none and the bundle has room; None means the bundle's limit."""
    max_length: _Limit | None = None
    """Longest prompt and answer together, visual tokens included; ``max_new_tokens`` replaces it."""
    suppress_tokens: tuple[_Count, ...] = ()
    """Tokens that are never chosen."""
    begin_suppress_tokens: tuple[_Count, ...] = ()
    """Tokens that are never chosen first."""
    forced_eos_token_id: tuple[_Count, ...] = ()
    """Last token of an answer that reaches its limit."""
