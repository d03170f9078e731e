"""The bundle on disk: manifest, schedule, graph tensors, embedding table, errors. Every package may import this one."""
