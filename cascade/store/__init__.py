"""The run directory: stage keys, outputs that appear whole or not at all, the lock, events."""
