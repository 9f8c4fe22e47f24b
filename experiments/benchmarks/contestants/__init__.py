"""One file per contestant, each imported in that contestant's process alone."""
