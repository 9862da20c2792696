"""Numbers about a finished checkpoint: held-out text, lm-eval tasks, speed, the reload gate.

The only room that opens the held-out split.
"""
