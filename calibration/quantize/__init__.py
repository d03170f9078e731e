"""Scales of quantized weights from real images and prompts, collected with token reduction on."""
