"""Tensor parallelism: what of each weight every rank holds. `split` and `plan` are pure; names come from `plan`."""
