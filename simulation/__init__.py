"""A CSST-like sky and camera that writes Level-1 exposures with truth."""
