"""Upstream's path of Muon with its auxiliary Adam."""

from deepspeed.runtime.zero.muon.original_muon import MuonWithAuxAdam

__all__ = ["MuonWithAuxAdam"]
