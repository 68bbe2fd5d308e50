"""decode: one new token of each sequence through a whole decoder."""
