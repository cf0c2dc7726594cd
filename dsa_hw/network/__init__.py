"""Stage 1, what the network is: layers, coupled groups of channels, the exported graph."""
