"""Files of published weights: found, opened without unpickling, matched name by name."""
