"""Checkpoint families: one file each maps a family's names and config onto ModelConfig and the Decoder's tensors."""
