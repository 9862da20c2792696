"""A teacher's targets on disk, by content: labelled once, read by every training that needs them."""
