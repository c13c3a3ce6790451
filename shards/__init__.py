"""The shard format of a teacher's cache: tars of records, the manifest of what made them, and a table beside them."""
