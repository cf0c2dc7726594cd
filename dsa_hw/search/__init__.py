"""Stage 4, DSA: keep ratios learned by gradient under a budget."""
