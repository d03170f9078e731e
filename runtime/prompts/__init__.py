"""Prompts: chat template, tokenizer, question ids and positions."""
