"""A dataset that a teacher writes, here or behind an endpoint: prompts, answers, filters, conversations."""
