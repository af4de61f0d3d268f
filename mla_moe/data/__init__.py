"""Tokens from text: tokenizers, batches of a stream, packed rows."""
