"""Measures of what a tokenizer or an encoder is worth."""
