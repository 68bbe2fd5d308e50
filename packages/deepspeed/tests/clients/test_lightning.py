"""lightning's Fabric and Trainer over two CPU ranks: the losses of one process without DeepSpeed, saving, loading.

lightning itself runs its DeepSpeed strategies on CUDA only; train_lightning.py says which two checks are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from client_scripts import require

from ds_comm.testing import run_ranks

require("lightning")


def train(kind: str, out: Path, stage: int | None) -> dict[str, Any]:
    import train_lightning

    return train_lightning.train(kind, out, stage)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["fabric", "trainer"])
def test_two_ranks_train_as_one_process_does(kind: str, stage: int, tmp_path: Path) -> None:
    many = tmp_path / "ranks"
    alone = train(kind, tmp_path / "alone", None)
    found, _ = run_ranks(train, 2, kind, many, stage, timeout=150, env={"TORCHELASTIC_RUN_ID": "lightning"})
    assert len(found["losses"]) == 4
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    if kind == "fabric":
        assert found["again"] == found["losses"][2:] and (many / "half" / "checkpoint").is_dir()
    else:
        assert found["engine"] == "DeepSpeedEngine" and (many / "last.ckpt").is_dir()
