"""Controlled comparisons of training settings: `sollune ablate` runs the arms of a study and draws its verdicts."""
