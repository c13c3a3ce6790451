"""Folders in object stores: each is worked on in a folder of this machine, and both sides are kept the same."""
