"""Tokenizers: changed files, and rules of every type with hostile contents."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

from tests.fuzz.subject import Outcome, Subject, judged
from tests.fuzz.values import damaged, hostile, mutated
from trio_edge.runtime.prompts.tokenizer import DetokenizeStream, Tokenizer

if TYPE_CHECKING:
    import random

_PATTERNS = (
    "(a+)+$", "a*a*b", "(a|a)*b", "(?=a*b)a*c", "a{1000}{1000}", "(((a{99}){99}){99})", "\\s+(?!\\S)|\\s+", "[", "(", "\\", "",
    "(?<x>a\\g<x>?)", "(a)\\1", "\\p{L}+", "[^\\r\\n]*", "(?i:'s)", "x{2,1}", "*", "a**", "(?:)", "\\b", "^", "$", ".*",
)  # fmt: skip
_TEXTS = ("", "a", " ", "aa" * 50, "\0", "é", "▁", "\ud800", "\x1b[31m", "\u202e", "what")
_PROMPTS = (
    "what is this?", "", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "   \n\n\t  x", "𝔘𝔫𝔦 é ﬃ \u0301\u0301", "<image>" * 3,
    "a" * 3000, "word " * 600, "\0\x1b[2J",
)  # fmt: skip


def tokenizer(rng: random.Random, subject: Subject) -> Outcome:
    """A file that is opened, encodes texts and decodes all small ids."""
    path = subject.folder / "tokenizer.json"
    path.write_bytes(_content(rng, subject))

    def use() -> str:
        found = Tokenizer.from_file(path)
        for text in rng.sample(_PROMPTS, 3):
            ids = found.plain_ids(text)
            found.decode(ids.tolist()[:50])
        stream = DetokenizeStream(found)
        for token in (5, 9, 100, 4, 2**31 - 1):
            stream.push(token)
        stream.finish()
        return "ok"

    return judged(use)


def _content(rng: random.Random, subject: Subject) -> bytes:
    if rng.random() < 0.1:
        return damaged(rng, json.dumps(subject.tokenizer).encode())
    changed: Any = dict(subject.tokenizer)
    if rng.random() < 0.5:
        changed = mutated(rng, subject.tokenizer, subject.tokenizer_places)
    for name, make in (("normalizer", _normalizer), ("pre_tokenizer", _pre_tokenizer), ("decoder", _decoder),
                       ("post_processor", _post_processor), ("model", _model)):  # fmt: skip
        if isinstance(changed, dict) and rng.random() < 0.3:
            changed[name] = make(rng, 0)
    return json.dumps(changed).encode("utf-8", "surrogatepass")


def _pattern(rng: random.Random) -> Any:
    return rng.choice(({"String": rng.choice(_TEXTS)}, {"Regex": rng.choice(_PATTERNS)}, hostile(rng)))


def _repeats(rng: random.Random, depth: int) -> int:
    """Return how often a rule comes in a sequence: nested sequences stay below the size of a file that is read at all."""
    return rng.choice((1, 2, 10, 40, 100) if depth == 0 else (1, 2, 10))


def _normalizer(rng: random.Random, depth: int) -> Any:
    if depth < 3 and rng.random() < 0.3:
        rule = _normalizer(rng, depth + 1)
        return {"type": "Sequence", "normalizers": [rule] * _repeats(rng, depth)}
    return rng.choice((
        {"type": "Replace", "pattern": _pattern(rng), "content": rng.choice((*_TEXTS, "z" * 1000))},
        {"type": "Prepend", "prepend": rng.choice((*_TEXTS, "p" * 5000))},
        {"type": "Precompiled", "precompiled_charsmap": _charsmap(rng)},
        {"type": rng.choice(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel", "Nothing"))},
        {"type": "Strip", "strip_left": True, "strip_right": hostile(rng)},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
        hostile(rng),
    ))  # fmt: skip


def _charsmap(rng: random.Random) -> Any:
    size = rng.choice((0, 4, 8, 64, 2**31, 2**32 - 1)).to_bytes(4, "little")
    return rng.choice(
        (base64.b64encode(size + rng.randbytes(rng.choice((0, 3, 64, 2000)))).decode(), "!", hostile(rng))
    )


def _pre_tokenizer(rng: random.Random, depth: int) -> Any:
    if depth < 3 and rng.random() < 0.3:
        rule = _pre_tokenizer(rng, depth + 1)
        return {"type": "Sequence", "pretokenizers": [rule] * _repeats(rng, depth)}
    return rng.choice((
        {"type": "Split", "pattern": _pattern(rng), "behavior": rng.choice(("Isolated", "Removed", "MergedWithNext", "Contiguous")),
         "invert": rng.random() < 0.3},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": rng.random() < 0.5},
        {"type": "Metaspace", "replacement": rng.choice(("▁", "", "ab", "\0")), "prepend_scheme": "always", "split": True},
        {"type": rng.choice(("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts", "Nothing"))},
        {"type": "Digits", "individual_digits": hostile(rng)},
        {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "CharDelimiterSplit", "delimiter": rng.choice(("a", "", "ab"))},
        {"type": "FixedLength", "length": rng.choice((0, 1, 5, 2**63))},
        hostile(rng),
    ))  # fmt: skip


def _decoder(rng: random.Random, depth: int) -> Any:
    if depth < 3 and rng.random() < 0.3:
        return {"type": "Sequence", "decoders": [_decoder(rng, depth + 1)] * rng.choice((1, 2, 10, 40))}
    return rng.choice((
        {"type": "Replace", "pattern": _pattern(rng), "content": rng.choice((*_TEXTS, "z" * 1000))},
        {"type": rng.choice(("ByteFallback", "Fuse", "Nothing"))},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Strip", "content": rng.choice((" ", "", "ab")), "start": rng.choice((0, 1, 2**40)), "stop": rng.choice((0, 9))},
        {"type": "WordPiece", "prefix": rng.choice(_TEXTS), "cleanup": True},
        {"type": "BPEDecoder", "suffix": rng.choice(_TEXTS)},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "a", "cleanup": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        hostile(rng),
    ))  # fmt: skip


def _post_processor(rng: random.Random, _depth: int) -> Any:
    piece = {"SpecialToken": {"id": rng.choice(("<s>", "nothing", "")), "type_id": 0}}
    text = {"Sequence": {"id": rng.choice(("A", "B", "C")), "type_id": rng.choice((0, 2**31))}}
    number = rng.choice((2, 999_999, 2**31, 2**32 - 1, -1))
    return rng.choice((
        {"type": "TemplateProcessing", "single": [piece, text] * rng.choice((1, 3)), "pair": [text, text],
         "special_tokens": {"<s>": {"id": "<s>", "ids": [number] * rng.choice((0, 1, 2)), "tokens": ["<s>"]}}},
        {"type": "RobertaProcessing", "sep": ["</s>", number], "cls": ["<s>", 2], "trim_offsets": True, "add_prefix_space": True},
        {"type": "BertProcessing", "sep": ["x", number], "cls": ["<s>", number]},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Sequence", "processors": [{"type": "ByteLevel"}] * 3},
        hostile(rng),
    ))  # fmt: skip


def _model(rng: random.Random, _depth: int) -> Any:
    vocab = {
        text: index * rng.choice((1, 1, 1, 40_000_000))
        for index, text in enumerate(("a", "b", "ab", "w", "##b", "<image>"))
    }
    scores: Any = [
        [text, rng.choice((-1.0, 0.0, float("nan"), float("inf"), -1e308))]
        for text in ("<unk>", "a", "b", "▁", "aa")
    ]
    return rng.choice((
        {"type": "BPE", "vocab": vocab, "merges": rng.choice((["a b"], [["a", "b"]], ["a z"], ["a"], [])),
         "unk_token": rng.choice((None, "a", "zz")), "dropout": rng.choice((None, 0.5, 1.0, 7.0)), "fuse_unk": True,
         "byte_fallback": rng.random() < 0.5, "continuing_subword_prefix": rng.choice((None, "", "##")),
         "end_of_word_suffix": None},
        {"type": "WordPiece", "vocab": vocab, "unk_token": rng.choice(("[UNK]", "a", "")), "continuing_subword_prefix": "##",
         "max_input_chars_per_word": rng.choice((0, 100, 2**63 - 1))},
        {"type": "WordLevel", "vocab": vocab, "unk_token": rng.choice(("[UNK]", "a", ""))},
        {"type": "Unigram", "vocab": scores, "unk_id": rng.choice((None, 0, 4, 5, 2**40)), "byte_fallback": rng.random() < 0.5},
        {"type": "Nothing"},
        hostile(rng),
    ))  # fmt: skip
