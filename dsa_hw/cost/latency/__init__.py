"""The latency model: a table of measured layers, calibrated on whole networks."""
