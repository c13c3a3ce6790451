"""Pictures and numbers: sampling, grids, the paired error, what a scorer says; the commands `sample` and `evaluate`."""
