"""Programs of a bundle: what runs in which order on which memory, and the checks that it fits."""
