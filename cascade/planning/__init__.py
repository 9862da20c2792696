"""What would be made, before any weight is read: members, shapes, costs, and what would stop the run later.

`cascade plan` and `cascade doctor` print it; a run starts from it.
"""
