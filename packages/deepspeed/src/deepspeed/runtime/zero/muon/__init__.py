"""Muon under upstream's names (see `original_muon`)."""

from deepspeed.runtime.zero.muon.original_muon import (
    Muon,
    MuonWithAuxAdam,
    SingleDeviceMuon,
    SingleDeviceMuonWithAuxAdam,
    muon_update,
)

__all__ = ["Muon", "MuonWithAuxAdam", "SingleDeviceMuon", "SingleDeviceMuonWithAuxAdam", "muon_update"]
