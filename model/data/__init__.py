"""Training data: from simulated fields to shards and rows."""
