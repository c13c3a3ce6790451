"""A second world: digits that people wrote, in coloured ink, with sentences measured from them."""
