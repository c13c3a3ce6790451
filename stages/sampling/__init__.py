"""Pictures of any model: velocity fields, solvers, grids of pictures, and the command `sollune sample`."""
