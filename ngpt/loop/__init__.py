"""The training loop: micro-batches in, results out; no disk, no logging."""
