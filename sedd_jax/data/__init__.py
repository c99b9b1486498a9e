"""Data: corpora of documents, tokenizers, prepared text and batches."""
