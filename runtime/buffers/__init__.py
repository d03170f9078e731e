"""Device memory of a bundle: laid out before anything is loaded, at addresses that never change."""
