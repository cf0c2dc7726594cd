"""What measures speed and quality; each module says what; figures lie in ``results/``."""
