"""The tokens of an answer: how they are chosen and drafted, and which answers decode together."""
