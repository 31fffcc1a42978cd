"""Checkpoints on the disk: complete or absent, and any change is seen."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dpo_cli.commands.session import unexpected
from dpo_cli.storage.atomic import way_out, writing
from dpo_cli.storage.checkpoints import PART, SUMS, Checkpoint, Checkpoints

FILES = {"adapter_model.safetensors": b"\x00\x01weights", "progress.json": b'{"a": 1}', "inner/empty": b""}


def filled(content: dict[str, bytes] = FILES) -> Callable[[Path], Path]:
    def fill(part: Path) -> Path:
        assert not list(part.iterdir())
        for name, data in content.items():
            (part / "made" / name).parent.mkdir(parents=True, exist_ok=True)
            (part / "made" / name).write_bytes(data)
        return part / "made"

    return fill


def verified(place: Path) -> tuple[list[int], dict[int, str]]:
    """The steps that verify, and the others with the reason."""
    skipped: dict[int, str] = {}

    def skip(checkpoint: Checkpoint, damage: str) -> None:
        skipped[checkpoint.step] = damage

    return [checkpoint.step for checkpoint in Checkpoints(place).verified(skip)], skipped


def test_two_are_kept_and_nothing_beside_them(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (9, 10, 11):
        checkpoints.write(step, filled())
        assert checkpoints.all()[0].step == step
    assert sorted(path.name for path in checkpoints.place.iterdir()) == ["step-10", "step-11"]
    assert verified(checkpoints.place) == ([11, 10], {})


def test_sha256sum_agrees(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path).write(1, filled()).folder
    assert hashlib.sha256(FILES["progress.json"]).hexdigest() in (folder / SUMS).read_text(encoding="utf-8")
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count(": OK") == len(FILES)


def test_every_bit_and_every_length_counts(tmp_path: Path) -> None:
    """All bits of all files, the sums among them; all shorter lengths; a file gone, and one too many."""
    checkpoint = Checkpoints(tmp_path).write(3, filled())
    tried = 0
    for path in [path for path in checkpoint.folder.rglob("*") if path.is_file()]:
        data = path.read_bytes()
        name = str(path.relative_to(checkpoint.folder))
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            damage = checkpoint.damage()
            assert damage is not None
            assert name == SUMS or damage == f"{name} has changed"
            tried += 1
        for length in range(len(data)):
            path.write_bytes(data[:length])
            assert checkpoint.damage() is not None
        path.unlink()
        assert (checkpoint.damage() or "").startswith(name)
        path.write_bytes(data)
        assert checkpoint.damage() is None
    assert tried > 8 * sum(map(len, FILES.values()))
    (checkpoint.folder / "more").write_bytes(b"")
    assert checkpoint.damage() == "more was not there"


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / SUMS).write_bytes(b"")
    assert verified(tmp_path) == ([], {2: f"{SUMS} is damaged", 1: f"{SUMS}: No such file or directory"})


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4):
        checkpoints.write(step, filled())
    (tmp_path / "step-4" / "progress.json").write_bytes(b'{"a": 2}')
    assert verified(tmp_path) == ([2], {4: "progress.json has changed"})
    checkpoints.write(3, filled())  # of the training that went on from step 2
    assert verified(tmp_path) == ([3, 2], {})


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of a file")
def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    """What safetensors writes within such a limit, and what is said of it."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught, writing(tmp_path):
            save_file({"a": torch.zeros(1000)}, tmp_path / "a.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert "ulimit -f" in (way_out(caught.value, tmp_path) or "") and "ulimit -f" in (unexpected(caught.value).fix or "")
    assert (
        "free space" in (way_out(OSError(errno.ENOSPC, "full"), tmp_path) or "") and way_out(OSError(5, ""), tmp_path) is None
    )


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), SafetensorError("I/O error: No space left on device (os error 28)"), KeyboardInterrupt()],
)
def test_what_fails_on_the_way_leaves_the_others(tmp_path: Path, error: BaseException) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(1, filled())

    def fail(part: Path) -> Path:
        filled()(part)
        raise error

    with pytest.raises(OSError if isinstance(error, SafetensorError) else type(error)):
        checkpoints.write(2, fail)
    assert verified(tmp_path) == ([1], {})
    assert not (tmp_path / PART).exists()  # its room is free again
    (tmp_path / PART / "made").mkdir(parents=True)  # of a process that was killed
    assert checkpoints.write(2, filled()).damage() is None
    assert verified(tmp_path) == ([2, 1], {})
