"""A name for a module that stands for all its graph depends on, so that a graph can be kept under it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from transformers import PretrainedConfig

if TYPE_CHECKING:
    from torch import nn


def module_digest(module: nn.Module) -> str:
    """Return a digest of the classes, plain attributes, configurations and weights of ``module`` and its parts."""
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        digest.update(f"{name} {type(part).__qualname__} ".encode())
        for key, value in sorted(vars(part).items()):
            if isinstance(value, PretrainedConfig):
                digest.update(f"{key} {value.to_json_string(use_diff=False)} ".encode())
            elif isinstance(value, (bool, int, float, str, tuple, type(None))):
                digest.update(f"{key} {value} ".encode())
    for name, tensor in module.state_dict(keep_vars=False).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:16]
