"""The recipe: what a user writes, strictly read. Imports no torch."""
