"""Writing: atomic files and the two products."""
