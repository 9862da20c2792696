"""Which sizes: targets, the legal shapes that meet them, and measured decode latency."""
