"""What must never hang or be lost: ranks that differ, ranks that die, files that are damaged, signals."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from engines import make_config, make_engine, make_net, micro_batch, same, train, weights

import ds_comm
import ds_zero
from ds_comm.testing import Died, RankFailure, run_ranks


def text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def failing(action: Callable[[], Any]) -> str:
    """The error that `action` ends with, as text; it must end with one."""
    try:
        action()
    except Exception as error:
        return text_of(error)
    raise AssertionError("no error was raised")


# -- ranks that take different ways -----------------------------------------------------------------------------------


class Skipping(engines.Net):
    """Leaves out its first block on rank 1 once `skips`."""

    skips = False

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        blocks = list(self.blocks)[1:] if self.skips and ds_comm.get_rank() == 1 else self.blocks
        for block in blocks:
            x = block(x)
        return (self.head(x).float() - target.float()).square().mean()


def skip_a_layer(stage: int) -> tuple[str, dict[str, torch.Tensor] | None]:
    torch.manual_seed(7)
    engine = make_engine(make_config(stage), Skipping())
    train(engine, range(1))
    engine.module.skips = True
    if stage == 3:
        return failing(lambda: train(engine, range(3))), None
    train(engine, range(3))
    return "", weights(engine)


def test_a_rank_that_skips_a_layer_at_stage_3_is_named_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (t for t, _ in run_ranks(skip_a_layer, 2, 3, timeout=60)):
        assert "DivergenceError" in text, text
        assert "rank 0" in text and "rank 1" in text and "blocks." in text, text


def test_below_stage_3_a_skipped_layer_contributes_zeros() -> None:
    (_, first), (_, second) = run_ranks(skip_a_layer, 2, 1)
    assert same(first, second)
    (_, third), _ = run_ranks(skip_a_layer, 2, 2)
    assert same(first, third)


def extra_collective() -> str:
    engine = make_engine(make_config(2))
    train(engine, range(1))

    def diverge() -> None:
        if ds_comm.get_rank() == 1:
            ds_comm.all_reduce(torch.ones(3), label="my own metric")
        train(engine, range(1, 4))

    return failing(diverge)


def test_an_extra_collective_on_one_rank_is_named_on_all() -> None:
    for text in run_ranks(extra_collective, 2, timeout=60):
        assert "DivergenceError" in text and "my own metric" in text and "rank 1" in text, text


def save_on_one_rank(folder: Path) -> str:
    engine = make_engine(make_config(2))
    train(engine, range(1))

    def diverge() -> None:
        if ds_comm.get_rank() == 0:
            engine.save_checkpoint(folder)
        train(engine, range(1, 4))

    return failing(diverge)


def test_save_on_one_rank_only_is_named_on_all(tmp_path: Path) -> None:
    begun = time.monotonic()
    for text in run_ranks(save_on_one_rank, 2, tmp_path, timeout=60):
        assert "DivergenceError" in text and "save_checkpoint" in text and "rank 0" in text, text
    assert time.monotonic() - begun < 60  # the watchdog's own limit is ten minutes
    assert not (tmp_path / "latest").exists()


def different_models() -> str:
    return failing(lambda: make_engine(make_config(2), make_net(depth=2 + ds_comm.get_rank())))


def test_ranks_with_different_models_are_told() -> None:
    for text in run_ranks(different_models, 2, timeout=60):
        assert "same model" in text, text


def different_tags(folder: Path) -> str:
    engine = make_engine(make_config(2))
    return failing(lambda: engine.save_checkpoint(folder, tag=f"rank{ds_comm.get_rank()}"))


def test_ranks_with_different_tags_write_nothing(tmp_path: Path) -> None:
    for text in run_ranks(different_tags, 2, tmp_path, timeout=60):
        assert "rank0" in text and "rank1" in text, text
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


# -- ranks that die ---------------------------------------------------------------------------------------------------


def die_in_step(stage: int, folder: Path) -> str:
    engine = make_engine(make_config(stage))
    train(engine, range(2))
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    ds_comm.barrier()
    engine(*micro_batch(2, ds_comm.get_rank()))
    if ds_comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return failing(lambda: train(engine, range(2, 5)))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_killed_mid_step_ends_the_others_and_the_checkpoint_loads(stage: int, tmp_path: Path) -> None:
    text, died = run_ranks(die_in_step, 2, stage, tmp_path, timeout=60, expect_death=[1])
    assert isinstance(died, Died)
    assert "RankMissingError" in text and "rank 1" in text, text
    for state in run_ranks(load_weights, 2, stage, tmp_path):
        assert same(state, run_ranks(weights_after, 2, stage, 2)[0])


def load_weights(stage: int, folder: Path) -> dict[str, torch.Tensor]:
    engine = make_engine(make_config(stage))
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    return weights(engine)


def weights_after(stage: int, steps: int) -> dict[str, torch.Tensor]:
    engine = make_engine(make_config(stage))
    train(engine, range(steps))
    return weights(engine)


def die_in_save(stage: int, folder: Path, moment: str) -> str:
    from ds_zero.checkpoint import commit, shardfile

    engine = make_engine(make_config(stage))
    train(engine, range(1))
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    train(engine, range(1, 2))

    def die(*args: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if ds_comm.get_rank() == 1:
        if moment == "writing":
            shardfile.ShardWriter.write_now = die
        elif moment == "background":
            shardfile.ShardWriter.write_rest = die
        else:
            commit.Commit.run = die

    def save() -> None:
        engine.save_checkpoint(folder)
        engine.wait_for_checkpoint()

    return failing(save)


@pytest.mark.parametrize("moment", ["writing", "background", "committing"])
def test_a_rank_killed_mid_save_loses_that_save_only(moment: str, tmp_path: Path) -> None:
    text, died = run_ranks(die_in_save, 2, 2, tmp_path, moment, timeout=60, expect_death=[1])
    assert isinstance(died, Died) and "rank 1" in text, text
    assert (tmp_path / "latest").read_text() == "global_step1"
    assert same(run_ranks(load_weights, 2, 2, tmp_path)[0], run_ranks(weights_after, 2, 2, 1)[0])


# -- signals ----------------------------------------------------------------------------------------------------------

SCRIPT = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
    sys.path.insert(0, {tests!r})
    from engines import *
    from ds_zero.checkpoint import durable

    engine = make_engine(make_config(2))
    train(engine, range(1))
    engine.save_checkpoint({folder!r})
    engine.wait_for_checkpoint()
    train(engine, range(1, 2))
    real = durable.fsync_path

    def slow(path):
        durable.fsync_path = real
        sys.stderr.write("SAVING\\n")
        sys.stderr.flush()
        time.sleep(2)
        real(path)

    durable.fsync_path = slow
    try:
        engine.save_checkpoint({folder!r})
        while True:  # not signal.pause(): a signal just before it would be waited for again
            time.sleep(0.05)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_during_a_save(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """SIGINT: exit waits for the save. SIGTERM: the process ends at once; what `latest` names is whole either way."""
    script = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if "SAVING" in line:
            break
    else:
        pytest.fail(seen)
    process.send_signal(number)
    process.stderr.read()
    assert process.wait(60) == code, seen
    expected = "global_step2" if number == signal.SIGINT else "global_step1"
    assert (tmp_path / "latest").read_text() == expected
    engine = make_engine(make_config(1))
    assert Path(engine.load_checkpoint(tmp_path)[0]).name == expected


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(save_twice, 2, folder)
    return folder


def save_twice(folder: Path) -> None:
    engine = make_engine(make_config(3, "bf16"))
    for step in range(2):
        train(engine, [step])
        engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()


def truncate(tag: Path) -> str:
    shard = sorted(tag.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 8)
    return shard.name


def flip(tag: Path) -> str:
    shard = sorted(tag.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0x10
    shard.write_bytes(content)
    return shard.name


def remove(tag: Path) -> str:
    shard = sorted(tag.glob("*.safetensors"))[1]
    shard.unlink()
    return shard.name


def remove_manifest(tag: Path) -> str:
    (tag / "manifest.json").unlink()
    return "manifest.json"


def spoil_manifest(tag: Path) -> str:
    text = (tag / "manifest.json").read_text()
    (tag / "manifest.json").write_text(text[: len(text) // 2])
    return "manifest.json"


def load_failing(folder: Path) -> str:
    engine = make_engine(make_config(2, "bf16"))
    return failing(lambda: engine.load_checkpoint(folder))


@pytest.mark.parametrize("damage", [truncate, flip, remove, remove_manifest, spoil_manifest])
def test_damage_is_named_on_all_ranks(damage: Callable[[Path], str], two_checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(two_checkpoints, folder)
    name = damage(folder / "global_step2")
    for text in run_ranks(load_failing, 2, folder, timeout=60):
        assert "CheckpointError" in text and name in text, text
        assert "global_step1" in text, text  # what can be loaded instead
    run_ranks(load_tag, 2, folder, "global_step1")


def load_tag(folder: Path, tag: str) -> None:
    engine = make_engine(make_config(0, "bf16"))
    assert engine.load_checkpoint(folder, tag)[0] is not None
    train(engine, range(1))


def fill_disk(folder: Path) -> str:
    from ds_zero.checkpoint import durable

    engine = make_engine(make_config(2))
    train(engine, range(1))
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    with pytest.MonkeyPatch.context() as patch:  # these ranks run other tests afterwards
        patch.setattr(durable, "free_nbytes", lambda path: 10)
        return failing(lambda: engine.save_checkpoint(folder, "second"))


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    for text in run_ranks(fill_disk, 2, tmp_path, timeout=60):
        assert "CheckpointError" in text and "too full" in text, text
    assert (tmp_path / "latest").read_text() == "global_step1"
    assert not (tmp_path / "second").exists()


# -- the rest of the bad input ----------------------------------------------------------------------------------------


def test_an_upstream_checkpoint_needs_the_opt_in(tmp_path: Path) -> None:
    tag = tmp_path / "global_step1"
    tag.mkdir()
    torch.save({"module": make_net().state_dict()}, tag / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text(tag.name)
    engine = make_engine(make_config(2))
    with pytest.raises(ds_zero.CheckpointError, match="allow_pickle"):
        engine.load_checkpoint(tmp_path)


def explode(module: Any, args: Any, output: Any) -> None:
    if ds_comm.get_rank() == 1:
        raise ArithmeticError("the user's own error")


def test_an_error_in_the_model_on_one_rank_is_shown_and_ends_the_others() -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(raise_and_leave, 2, timeout=60)
    assert re.search(r"the user's own error", str(caught.value))


def raise_and_leave() -> None:
    engine = make_engine(make_config(3))
    engine.module.blocks[1].register_forward_hook(explode)
    train(engine, range(2))
