"""Commands that prepare text before training: train a tokenizer, tokenise a corpus to shards, verify shards."""
