"""Commands of the runtime: ``trio-run``, ``trio-inspect`` and ``trio-build``."""
