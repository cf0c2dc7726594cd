"""The stages in a row: what ``prune`` does, and the class for one's own training loop."""
