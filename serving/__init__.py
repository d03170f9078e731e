"""A server for bundles with OpenAI's API. docs/serving.md describes it."""
