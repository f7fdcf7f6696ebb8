"""Checkpoints: written whole or not at all, and refused when they do not fit the run."""
