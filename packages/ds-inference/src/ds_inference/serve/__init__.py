"""Serving causal language models: requests, paged cache and continuous batching as plain data, and sampling.

`request`, `blocks` and `scheduler` know no torch. Import names from the modules, or from `ds_inference` itself.
"""
