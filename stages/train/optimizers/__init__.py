"""Optimizers of one or of several processes."""
