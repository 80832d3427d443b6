"""Several workers that are one relay."""
