"""What clients get: one thread for each bundle, and its answers in OpenAI's form."""
