"""One module per family of models: which of its classes are replaced, and by what (`FAMILY`)."""
