"""Image processing of each model family, equal to its Hugging Face processor."""
