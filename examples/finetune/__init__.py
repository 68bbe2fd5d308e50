"""Helpers of finetune_smollm2.py: its data, progress display, report, and the driver of `nox -s demo`."""
