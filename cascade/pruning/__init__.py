"""Target -> plan -> cut -> proof."""
