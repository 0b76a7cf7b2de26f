"""Conversion between PyTorch checkpoints and our parameters, without torch."""
