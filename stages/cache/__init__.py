"""Filling a cache: records of teacher states, the shards as tasks, several workers, cost estimates and audits."""
