"""Where the milliseconds, the bytes and the watts of a bundle go on this machine: ``trio-profile``."""
