"""Stage 2, what widths cost: milliseconds, FLOPs, parameters, memory."""
