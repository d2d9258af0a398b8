"""How long a move will take: what is left to copy before it, and how long clients may be on two stores in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.objects.progress import duration, estimate_kept, ratio
from include.juicefs_storage.ports import MetadataStore
from include.juicefs_storage.volume.layout import block_objects
from include.juicefs_storage.volume.needed import ID_BATCH
from include.juicefs_storage.volume.setting import Setting

#: How many blocks are read at most, and for how long.
_SAMPLE_BLOCKS, _SAMPLE_S = 64, 2.0
_AT_ONCE = 8
#: Clients look for a new setting every heartbeat, give or take 5 % (pkg/meta/base.go of JuiceFS 1.4).
_JITTER = 1.05


def reading_rate(metadata: MetadataStore, setting: Setting, store: Bucket, clock: Callable[[], float]) -> float | None:
    """Measure blocks a second: read some of the volume's newest blocks from a store, several at once, for two seconds.

    A copy has to read them too, so it is hardly faster. None where there is nothing to read.

    Args:
        metadata: Tells the newest slices.
        setting: The volume's.
        store: Read only.
        clock: A monotonic clock.
    """
    newest = list(metadata.slices(max(0, metadata.next_slice() - ID_BATCH)))[-_SAMPLE_BLOCKS:]
    keys = [key for row in newest for key, _ in block_objects(setting, *row)][-_SAMPLE_BLOCKS:]
    start, read = clock(), 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while keys and clock() - start < _SAMPLE_S:
            taken, keys = keys[:_AT_ONCE], keys[_AT_ONCE:]
            read += sum(digest is not None for digest in pool.map(store.digest, taken))
    took_s = clock() - start
    return read / took_s if read and took_s else None


def forecast_lines(blocks_left: int | None, blocks_s: float | None, heartbeats_s: Sequence[float]) -> list[str]:
    """Say what is left and how long it takes, a sentence each.

    Args:
        blocks_left: Blocks that the new store lacks; None: nobody has counted.
        blocks_s: How many Airflow reads a second; None: not measured.
        heartbeats_s: Of the clients.
    """
    if blocks_left is None:
        lines = ["what is left to copy was not counted: `consistency` is `off` or `sample`"]
    elif not blocks_left:
        lines = ["no block is left to copy now"]
    elif blocks_s:
        took = f"about {duration(blocks_left / blocks_s)} at the {blocks_s:.0f} a second that Airflow just read"
        lines = [f"{blocks_left} blocks are left to copy before the setting is written: {took}"]
    else:
        lines = [f"{blocks_left} blocks are left to copy before the setting is written"]
    if heartbeats_s:
        longest = duration(_window_s(heartbeats_s))
        lines.append(f"the window, from the setting's write until the last client has moved: up to {longest}")
    return lines


def _window_s(heartbeats_s: Sequence[float]) -> float:
    return max(heartbeats_s) * _JITTER


def kept_lines(
    blocks_left: int | None,
    blocks_s: float | None,
    heartbeats_s: Sequence[float],
    copied_s: float | None,
    window_s: float | None,
    proof_s: Sequence[float] | None = None,
) -> list[str]:
    """Hold the plan's forecast against what came, a sentence each.

    Args:
        blocks_left: See forecast_lines.
        blocks_s: See forecast_lines.
        heartbeats_s: See forecast_lines.
        copied_s: What the copy before the setting was written took, its comparisons included; None: there was none.
        window_s: From the setting's write until the last client was proven; None: none was.
        proof_s: Of the proof of the blocks: what its first ETA said that it takes, and what it took. None: it had none.
    """
    lines = []
    if blocks_left and blocks_s and copied_s is not None:
        lines.append(f"the copy before the setting was written: {estimate_kept(blocks_left / blocks_s, copied_s)}")
    if proof_s:
        lines.append(f"the proof of the blocks: {estimate_kept(*proof_s)}")
    if window_s is not None:
        line = f"the last client was proven {window_s:.0f} s after the setting was written"
        if heartbeats_s:
            longest_s = _window_s(heartbeats_s)
            line += f"; the plan had estimated up to {duration(longest_s)} ({ratio(longest_s, window_s)})"
        lines.append(line)
    return lines
