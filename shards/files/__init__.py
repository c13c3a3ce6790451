"""Files of shards: how they are obtained, and what is known of one that is open."""
