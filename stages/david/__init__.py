"""David: an assessor of features, fitted to the teacher's own; he sees features, never a network."""
