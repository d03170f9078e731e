"""Makes ONNX graphs: traces modules, repeats layers, joins pieces."""
