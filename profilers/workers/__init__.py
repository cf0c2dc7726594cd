"""Processes that measure: the server, and what asks it."""
