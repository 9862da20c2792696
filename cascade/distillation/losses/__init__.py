"""What a batch costs a student: divergences, hidden-state losses, fused with the head."""
