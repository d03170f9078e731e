"""How a checkpoint wants its answers to be made: the settings of its ``generation_config.json`` that a bundle carries."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
_Factor: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_Penalty: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-3, le=1e3)]
_Share: TypeAlias = Annotated[float, msgspec.Meta(gt=0, le=1)]

SAMPLING_SETTINGS = ("temperature", "top_k", "top_p")
"""Read only where tokens are drawn."""


class GenerationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hugging Face's settings, by its names and with its defaults. They apply where a user gives none."""

    do_sample: bool = False
    """Whether tokens are drawn; greedy otherwise, and ``SAMPLING_SETTINGS`` say nothing."""
    temperature: _Factor = 1.0
    top_k: _Count = 50
    """0 means all."""
    top_p: _Share = 1.0
    repetition_penalty: _Penalty = 1.0
    """Positive logits of tokens that are in the prompt or the answer are divided by it, negative ones multiplied."""
    no_repeat_ngram_size: _Count = 0
    """No group of so many tokens comes twice in prompt and answer; 0 for no such rule."""
    min_length: _Count = 0
    """Tokens of prompt and answer, visual ones too, before which no stop token comes."""
    min_new_tokens: _Count = 0
    """Tokens of the answer before which no stop token comes; above 0 it counts in place of ``min_length``."""
    suppress_tokens: tuple[_Count, ...] = ()
    """Never chosen."""
    begin_suppress_tokens: tuple[_Count, ...] = ()
    """Not chosen as the first token."""
    forced_eos_token_id: tuple[_Count, ...] = ()
    """What the last token is where the answer is cut at its limit."""

    @property
    def are_rules(self) -> bool:
        """Whether any of them changes logits before a token is chosen."""
        neutral = GenerationSettings()
        rules = set(self.__struct_fields__) - {"do_sample", *SAMPLING_SETTINGS}
        return any(getattr(self, name) != getattr(neutral, name) for name in rules)
