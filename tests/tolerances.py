"""The one table of tolerances: each rung of the ladder, its element type, and why.

float64 reference = torch eager = exported graph on ONNX Runtime = TensorRT engine.
"""

from __future__ import annotations

SALIENCY_FLOAT64 = {"rtol": 1e-6, "atol": 0.0}
"""Closed form against autograd, both float64: only the order of sums differs."""

SALIENCY_FLOAT32 = {"rtol": 1e-4, "atol": 0.0}
"""Exported graph in float32 against the reference code's scores in float32."""

LOGITS_FLOAT32 = {"rtol": 1e-3, "atol": 1e-3}
"""Whole model in float32, ONNX Runtime against torch: tens of layers of reordered sums."""

LOGITS_FLOAT16 = {"rtol": 5e-2, "atol": 5e-2}
"""Whole model with float16 weights and activations against float32."""
