"""Text on disk: documents, and the corpus of token ids that a run reads."""
