"""Classes of pictures with priorities: what belongs to one, its pictures, how often it is sampled, how it is measured.

`specification` and `selection` lie below the training; all else lies above it.
"""
