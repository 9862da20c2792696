"""Repair in closed form after a cut: weights refitted by ridge regression."""
