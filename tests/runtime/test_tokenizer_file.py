"""Patterns of tokenizers: those of released ones are matched, those that could take very long are refused."""

import base64
import json

import pytest

from trio_edge.runtime.bundle.errors import BundleError
from trio_edge.runtime.prompts.tokenizer import check_pattern, tokenizer_from

RELEASED = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "clip": r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "digits in threes": r"\d{1,3}(?=(?:\d{3})*\b)",
    "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "one character of a class": "[?.,!]",
    "runs of spaces": " {2,}",
}
SLOW = [
    "(a+)+$", "(a*)*b", "a*a*b", "(a|b|ab)*c", "(?:a|a)*b", "(a?){50}a{50}", "a?" * 30 + "a" * 30, "(a|a)" * 30 + "b",
    "a{1,900}a{1,900}a{1,900}b", "(?=a*b)a*c",
]  # fmt: skip
UNSUPPORTED = [
    r"(a)\1",
    r"(?<x>a\g<x>?)",
    r"\k<x>",
    "((a{1000}){1000}){1000}",
    "(?(1)a|b)",
    "(?~abc)",
    "x" * 5000,
    "a{100000}",
]
BROKEN = ["(", "[", "a)", "*a", "\\", "a**", "[]", "(?"]


@pytest.mark.parametrize("pattern", RELEASED.values(), ids=RELEASED.keys())
def test_patterns_of_released_tokenizers_are_allowed(pattern):
    check_pattern(pattern)


@pytest.mark.parametrize("pattern", [*SLOW, *UNSUPPORTED, *BROKEN])
def test_patterns_that_could_take_very_long_or_are_broken_are_refused(pattern):
    with pytest.raises(ValueError, match=r"^a pattern "):
        check_pattern(pattern)


@pytest.mark.parametrize("size", [9, 1 << 20, (1 << 31) - 1, (1 << 32) - 1])
def test_a_table_of_characters_larger_than_its_text_is_refused_before_it_is_allocated(size):
    table = base64.b64encode(size.to_bytes(4, "little") + bytes(8)).decode()
    file = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": table}, "model": {"type": "BPE"}}
    with pytest.raises(
        BundleError, match=f"a table of characters that is cut short: {size} bytes of a trie in 12"
    ):
        tokenizer_from(json.dumps(file).encode(), where="tokenizer")
