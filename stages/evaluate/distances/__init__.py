"""Distances of sets of pictures in the space of some features, columns of any model, and the COCO protocol."""
