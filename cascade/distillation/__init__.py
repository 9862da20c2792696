"""The training loop and what it is made of: batches, losses, optimizer, schedule, state.

`trainer.py` is the loop; `options.py` declares every option once.
"""
