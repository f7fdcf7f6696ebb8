"""Ranks, devices and seeds: what a process knows about itself and its peers."""
