"""From a network to the file that is served: targets, ONNX, parity, the bundle."""
