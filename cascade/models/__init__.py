"""Models without their training: what their shapes mean, and their checkpoints on disk."""
