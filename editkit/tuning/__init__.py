"""The search for the numbers of an editor or of a restraint on a model."""
