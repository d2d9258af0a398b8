"""On which JuiceFS volume, or on which store, a folder lies that this project or Airflow writes to."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from include.juicefs_storage.adapters.connections import missing_connections_explained
from include.juicefs_storage.ports import Place

_MOUNTS = Path("/proc/self/mountinfo")
#: How JuiceFS names the source of its mounts, in version 1.4: `JuiceFS:<volume>`.
_SOURCE = "JuiceFS:"


def find_place(what: str, url: str) -> Place:
    """Find out where a folder lies, as far as it can be seen from this process.

    Args:
        what: What the folder is for, in words.
        url: `file:///…`, a path, or `s3://<connection id>@<bucket>/<prefix>`.
    """
    parts = urlsplit(url)
    if parts.scheme in {"", "file"}:
        return Place(what, url, volume=_volume_of(Path(unquote(parts.path)), _MOUNTS.read_text()))
    if parts.scheme.startswith("s3") and parts.username:
        return Place(what, url, store=_store_of(unquote(parts.username)))
    return Place(what, url)


def _volume_of(path: Path, mounts: str) -> str:
    """Return the JuiceFS volume on whose mount a path lies; empty where it lies on none.

    Args:
        path: Of this process's file system; it need not exist.
        mounts: As in /proc/self/mountinfo.
    """
    path, volume, deepest = path.resolve(), "", -1
    for line in mounts.splitlines():
        place, _, kind = line.partition(" - ")
        # Spaces and the like are written in octal digits.
        point = Path(re.sub(r"\\([0-7]{3})", lambda digits: chr(int(digits[1], 8)), place.split()[4]))
        # Of several mounts on one point the last one is seen.
        if path.is_relative_to(point) and len(point.parts) >= deepest:
            source = kind.split()[1]
            volume, deepest = source.removeprefix(_SOURCE) if source.startswith(_SOURCE) else "", len(point.parts)
    return volume


def _store_of(conn_id: str) -> str:
    """Return the host and port of a connection's endpoint; empty where it names none."""
    from airflow.sdk import BaseHook

    with missing_connections_explained():
        extra = BaseHook.get_connection(conn_id).extra_dejson
    return urlsplit(str(extra.get("endpoint_url") or "")).netloc
