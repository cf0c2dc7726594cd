"""Whole residual branches: finding them, closing them with gates, removing them."""
