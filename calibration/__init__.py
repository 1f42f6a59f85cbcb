"""What the scales of a quantized model should be. Knows text and torch modules, not this model."""
