"""The bundle's graphs as torch modules, each wrapping Hugging Face's own layers. One graph, one file."""
