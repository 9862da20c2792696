"""What a model's size is made of: dimensions, the axis of every weight (found by probing), behaviour, head."""
