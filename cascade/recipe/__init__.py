"""The recipe: what a user writes, strictly read, with the place of every mistake. Imports no torch."""
