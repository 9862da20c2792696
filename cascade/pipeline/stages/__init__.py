"""One file per kind of stage: what it depends on, what it does, what it leaves in its folder."""
