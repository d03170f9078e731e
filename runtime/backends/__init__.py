"""Backends that run a bundle's graphs: ONNX Runtime, TensorRT and TensorRT-RTX."""
