"""Measures of tokenizers, encoders and language models: arrays in, numbers out; and commands."""
