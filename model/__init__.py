"""How the fusion network is made, trained, calibrated, exported and loaded."""
