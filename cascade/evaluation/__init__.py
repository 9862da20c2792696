"""Numbers about finished checkpoints. The only place that reads the held-out split."""
