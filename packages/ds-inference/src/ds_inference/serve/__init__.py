"""Serving causal language models: many requests at a time, in one process, with or without a server.

From plan to wire: `request`, `blocks` and `scheduler` (pure, no torch) plan steps; `runner` and `sampler` carry them
out; `core` makes jobs and their text (`text`, `outputs`) of it, without threads; `llm` drives it in one call,
`async_engine` from a thread for asyncio programs; `server` puts HTTP in front (the extra `ds-inference[serve]`). Import
names from the modules, or from `ds_inference` itself.
"""
