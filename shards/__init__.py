"""The shard format of a teacher's answers: tars of records, what made them, and a table beside them."""
