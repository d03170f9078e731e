"""The model, run on a device: vision, the reduced decoder, and the choice of tokens."""
