"""Engines: who owns the device, the precision, the gradients and, later, the sharding."""
