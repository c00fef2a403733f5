"""The cluster: embedded or outside, its workers, and the jobs on it."""
