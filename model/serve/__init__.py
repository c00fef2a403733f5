"""The model as the run uses it: archive, contract, runtime."""
