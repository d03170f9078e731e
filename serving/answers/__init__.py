"""Answers to clients in OpenAI's form, computed by one thread per bundle."""
