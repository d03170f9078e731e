"""Reports of a profile: numbers, advice, tables and a trace."""
