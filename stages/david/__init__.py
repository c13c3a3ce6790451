"""David: an assessor of features, fitted to the teacher's own; it reads features, never a network."""
