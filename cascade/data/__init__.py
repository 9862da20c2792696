"""Text to documents, documents to four disjoint splits, splits to token blocks, read in a resumable order."""
