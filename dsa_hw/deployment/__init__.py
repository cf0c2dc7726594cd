"""Stage 7, export, agreement with PyTorch, and timing."""
