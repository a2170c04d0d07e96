"""A model that is asked and not trained: in evaluation mode, without gradients, and afterwards as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def asked(model: nn.Module) -> Iterator[None]:
    """While it lasts the model is in evaluation mode and keeps no gradients; then every layer is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: what a model keeps from here (a table of positions) could never be trained through.
        with torch.no_grad():
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training
