"""Losses per token and the loop that trains a student on them."""
