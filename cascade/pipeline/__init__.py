"""Making a family: `run.py` is the loop over members, `member.py` the stages of one of them.

What a stage depends on, does and leaves is one file of `stages/`; `runner.py` skips what is done, `publish.py` writes
what users get.
"""
