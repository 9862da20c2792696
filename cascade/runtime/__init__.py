"""What surrounds one process: errors, signals, secrets, ranks, memory, progress, durable files, failpoints."""
