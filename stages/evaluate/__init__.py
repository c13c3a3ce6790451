"""Metrics of a student against its teacher: fidelity, paired-noise and velocity errors; `evaluate` and `david`."""
