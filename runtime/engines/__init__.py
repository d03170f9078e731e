"""TensorRT engines: building, keeping and describing them."""
