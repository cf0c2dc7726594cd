"""Training of weights: before, during and after the search."""
