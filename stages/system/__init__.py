"""The lowest layer: what the program needs of the operating system. It imports nothing else of sollune."""
