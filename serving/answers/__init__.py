"""Answers to clients: one thread for each bundle, in OpenAI's form."""
