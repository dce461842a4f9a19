"""From posed frames to closed modules: the mapper is the only mutable state of a map."""
