"""lightning's Fabric and Trainer over two CPU ranks: the losses of one process without DeepSpeed, saving, loading.

lightning itself runs its DeepSpeed strategies on CUDA only; train_lightning.py says which two checks are left out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from client_scripts import require, run_script

require("lightning")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", ["fabric", "trainer"])
def test_two_ranks_train_as_one_process_does(kind: str, stage: int, tmp_path: Path) -> None:
    many, one = tmp_path / "ranks", tmp_path / "alone"
    many.mkdir()
    one.mkdir()
    found = run_script("train_lightning.py", many, kind, many, "--stage", stage, ranks=2)
    alone = run_script("train_lightning.py", one, kind, one)
    assert len(found["losses"]) == 4
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    if kind == "fabric":
        assert found["again"] == found["losses"][2:] and (many / "half" / "checkpoint").is_dir()
    else:
        assert found["engine"] == "DeepSpeedEngine" and (many / "last.ckpt").is_dir()
