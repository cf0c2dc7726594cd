"""What one layer is to a runtime: its description, and an ONNX model of it."""
