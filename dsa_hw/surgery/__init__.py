"""Stage 6, which channels go, and the small network's files."""
