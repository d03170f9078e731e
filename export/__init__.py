"""Checkpoint to bundle. Needs torch, transformers and onnx (``pip install "trio-edge[export]"``)."""
