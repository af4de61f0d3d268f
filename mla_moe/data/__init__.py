"""Tokens from text: documents, tokenizers, corpora, batches."""
