"""Videos of the model families that know them, equal to their Hugging Face processors."""
