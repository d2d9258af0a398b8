"""What the lab's writers and their peers record, and what the checker makes of it, in plain folders."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from lab.writer import OTHER_CONTENT, Check, check_manifest, records, summarize

PROJECT = Path(__file__).resolve().parents[3]
OLD, SEED, NEW_BYTES = b"what was acknowledged", 7, 5000
NEW = random.Random(SEED).randbytes(NEW_BYTES)  # noqa: S311


def write(folder: Path, *options: str) -> None:
    script = ["-m", "lab.writer", f"--dir={folder}", "--rate=0", *options]
    subprocess.run([sys.executable, *script], cwd=PROJECT, check=True)


def ack(content: bytes) -> dict[str, object]:
    return {"op": "ack", "size": len(content), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def begin(kind: str) -> dict[str, object]:
    return {"op": "begin", "kind": kind, "seed": SEED, "bytes": NEW_BYTES}


def check(folder: Path, found: bytes | None, *history: dict[str, object]) -> Check:
    """The check of one file with this history, of which this is found; None: nothing."""
    manifest, file = folder / "manifest", folder / "data" / "file"
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    if found is not None:
        file.write_bytes(found)
    manifest.write_text(
        "".join(json.dumps({"at": 1.0, "path": "file"} | record) + "\n" for record in history) + '{"half'
    )
    return check_manifest(manifest, file.parent)


HOLE = NEW[:100] + bytes(200) + NEW[300:1000]
BEFORE = (begin("create"), ack(OLD))


@pytest.mark.parametrize(
    ("history", "allowed", "corrupt"),
    [
        ([*BEFORE], [OLD], [OLD[:-1], OLD + b"x", OLD[:-1] + b"x", b""]),
        ([*BEFORE, begin("append")], [OLD, OLD + NEW[:77], OLD + NEW, OLD + HOLE], [OLD[:-1], OLD + b"x", NEW]),
        ([*BEFORE, begin("overwrite")], [OLD, b"", NEW[:77], NEW, HOLE], [OLD[:-1], OLD + NEW, NEW + b"x", b"x"]),
        ([*BEFORE, begin("delete")], [None, OLD], [OLD[:-1], b""]),
        ([begin("create")], [None, b"", NEW[:77], NEW, HOLE], [OLD, NEW + b"x", bytes([NEW[0] ^ 1])]),
        ([begin("create"), {"op": "failed"}], [None, NEW], [OLD]),
    ],
)
def test_a_change_that_was_not_acknowledged_may_have_happened_or_not(
    tmp_path: Path, history: list[dict[str, object]], allowed: list[bytes | None], corrupt: list[bytes]
) -> None:
    for found in allowed:
        assert check(tmp_path, found, *history).lost == 0, found
    for found in corrupt:
        assert check(tmp_path, found, *history).corrupt == [f"file: {OTHER_CONTENT}"], found
    gone = check(tmp_path, None, *history)
    assert gone.missing == ([] if None in allowed else ["file"])


def test_only_what_was_promised_counts_as_a_file(tmp_path: Path) -> None:
    assert (check(tmp_path, OLD, *BEFORE).files, check(tmp_path, OLD, *BEFORE).unacknowledged) == (1, 0)
    assert (check(tmp_path, NEW, begin("create")).files, check(tmp_path, NEW, begin("create")).unacknowledged) == (0, 1)


def test_what_was_deleted_or_written_by_nobody_is_not_expected(tmp_path: Path) -> None:
    deleted: list[dict[str, object]] = [*BEFORE, begin("delete"), {"op": "deleted"}]
    assert check(tmp_path, None, *deleted).unexpected == []
    again = check(tmp_path, OLD, *deleted)
    assert (again.unexpected, again.lost, again.files) == (["file"], 0, 0)
    (tmp_path / "data" / "stranger").touch()
    assert check(tmp_path, OLD, *BEFORE).unexpected == ["stranger"]


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    assert check(tmp_path, None, *BEFORE).corrupt == []
    (tmp_path / "data" / "file").mkdir()
    found = check_manifest(tmp_path / "manifest", tmp_path / "data")
    assert (found.missing, found.corrupt, found.lost) == ([], ["file: Is a directory"], 1)


def test_a_lost_or_changed_file_is_found(tmp_path: Path) -> None:
    manifest, folder = tmp_path / "manifest", tmp_path / "data"
    write(folder, f"--manifest={manifest}", "--files=60")
    assert check_manifest(manifest, folder).lost == 0
    first, second = sorted(path for path in folder.rglob("*.bin") if path.stat().st_size)[:2]
    first.unlink()
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    found = check_manifest(manifest, folder)
    assert found.missing == [str(first.relative_to(folder))]
    assert found.corrupt == [f"{second.relative_to(folder)}: {OTHER_CONTENT}"]


def test_a_peer_reads_what_is_handed_over_and_deletes_a_part_of_it(tmp_path: Path) -> None:
    folder, writers, peer = tmp_path / "data", [tmp_path / "a", tmp_path / "b"], tmp_path / "peer"
    for writer in writers:
        write(folder, f"--manifest={writer}", f"--subfolder={writer.name}", "--keep=5", "--files=60")
    handed = [record["path"] for writer in writers for record in records(writer) if record["op"] == "handed over"]
    assert len(handed) == len(set(handed)) > 20
    changed, gone = handed[0], handed[-1]
    (folder / changed).write_bytes(b"other")
    (folder / gone).unlink()
    write(folder, f"--manifest={peer}", *(f"--follow={writer}" for writer in writers), f"--files={len(handed)}")

    seen = summarize(peer)
    assert seen.read == len(handed) - 2
    assert {error["path"]: error["error"] for error in seen.read_errors} == {
        changed: OTHER_CONTENT,
        gone: "No such file or directory",
    }
    assert 0 < seen.deleted < seen.read
    found = check_manifest(writers[0], folder, writers[1], peer)
    deleted = {record["path"] for record in records(peer) if record["op"] == "deleted"}
    assert found.missing == ([] if gone in deleted else [gone])
    assert found.corrupt == ([] if changed in deleted else [f"{changed}: {OTHER_CONTENT}"])
    assert (found.unexpected, found.unacknowledged) == ([], sum(e["path"] == gone for e in seen.write_errors))
