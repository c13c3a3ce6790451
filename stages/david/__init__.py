"""David: he judges a student's features block by block, and decides how much each block's loss counts."""
