"""A server for bundles with OpenAI's interface over HTTP. docs/serving.md describes it."""
