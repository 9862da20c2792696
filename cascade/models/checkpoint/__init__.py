"""Hugging Face checkpoints: found, checked, loaded, saved; local, on the hub, GGUF or quantised."""
