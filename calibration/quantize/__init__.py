"""Scales of quantized weights from real pictures and prompts, collected with token reduction on."""
