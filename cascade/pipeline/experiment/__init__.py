"""`cascade experiment`: arms x seeds x token budgets, each cell a run, and how their results compare."""
