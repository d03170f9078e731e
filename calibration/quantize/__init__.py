"""Scales of quantized weights, from samples with token reduction."""
