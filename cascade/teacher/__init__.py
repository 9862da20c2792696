"""What a teacher gives besides live logits: text that it writes, and targets that are computed once and kept."""
