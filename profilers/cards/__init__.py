"""NVIDIA cards: clocks, events, memory that is kept."""
