"""Where targets come from besides a live model's logits: text that a model here or behind an endpoint has written."""
