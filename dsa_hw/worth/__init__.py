"""Stage 3, what channels are worth."""
