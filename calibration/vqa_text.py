"""The normalisation of answers that the VQA challenge defines, so that "The Dogs." and "dogs" are one answer.

Lower case; numbers as digits; no articles; apostrophes put back into contractions; every punctuation mark but the
apostrophe and the colon (times: "2:50") becomes a blank. A period stays as a decimal point, and a comma between
digits vanishes ("100,978" is "100978").

Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015, and the challenge's page on evaluation. The
challenge's code skips all this where the ten annotators agree; we never do.
"""

from __future__ import annotations

import re

_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_DIGITS.split())} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_NOT = "ain are can could did does do had has have is might must need should was were wo would"  # …n't
_STEMS = {  # without those that make words of their own: its, were, ill, id, shed
    "ve": "could i might must should they we would you",
    "ll": "it that they who you",
    "re": "they you",
    "s": "he here how she that there what when where who why",
    "d": "he it they who you",
    "m": "i",
}
_CONTRACTIONS = (
    {f"{stem}nt": f"{stem}n't" for stem in _NOT.split() if stem not in ("ain", "can", "wo")}
    | {"aint": "ain't", "cant": "can't", "wont": "won't"}
    | {f"{stem}{end}": f"{stem}'{end}" for end, stems in _STEMS.items() for stem in stems.split()}
    | {"yall": "y'all", "oclock": "o'clock", "maam": "ma'am", "lets": "let's"}
)


def vqa_normal(text: str) -> str:
    """Return the answer as the VQA challenge compares it."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"\.(?!\d)", "", text)
    text = re.sub(r"[^\w\s':.]|_", " ", text)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
