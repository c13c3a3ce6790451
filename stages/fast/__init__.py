"""Students of few steps: the second phase of `sollune distill`, on the landings of the cache."""
