"""The model in torch, run on samples with token reduction."""
