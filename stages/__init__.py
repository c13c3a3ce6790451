"""The three stories of sollune and the rooms that they share."""
