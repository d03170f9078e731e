"""Checkpoint to bundle. Needs torch, transformers and onnx (the extra ``export``)."""
