"""What makes a model's size, which axis of which weight is what, and checkpoints on disk."""
