"""Tasks through lm-eval: which there are, how they run, what their results mean."""
