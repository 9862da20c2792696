"""What a teacher says of windows of text, kept on disk by content: labelled once, read by every member and rerun."""
