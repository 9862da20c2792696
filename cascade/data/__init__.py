"""Text sources -> documents -> four disjoint splits -> token blocks, in a resumable order."""
