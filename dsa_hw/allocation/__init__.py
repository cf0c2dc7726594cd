"""Stage 5, integer widths at the budget, verified by measuring."""
