"""The model in export form: equal to the checkpoint's own model, and traceable."""

import mythos_export.ops  # noqa: F401 (defines the torch ops that the layers call)
from mythos_export.model.decoder import Decoder

__all__ = ["Decoder"]
