"""Text to batches: sources, tokenizer, packing, shuffling and the loader, with one exact and small resumable state."""
