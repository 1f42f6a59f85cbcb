"""The model in export form: equal to the checkpoint's own model, and traceable."""

from mythos_export.model.decoder import Decoder

__all__ = ["Decoder"]
