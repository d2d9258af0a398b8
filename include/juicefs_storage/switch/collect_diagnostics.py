"""What explains a failed switch, collected before anything is undone, without a secret in it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import yaml

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.ports import Cluster, DumpKind, JuiceFS, Pod
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.csi import CSI_WORKLOADS
from include.juicefs_storage.volume.mount_pods import MOUNT_POD_SELECTOR

#: Keys of a Secret whose values are no secret, and without which nothing can be read.
_OPEN_KEYS = frozenset({"name", "storage", "bucket", "metaurl", "uniqueId", "isCe"})
#: Shorter values are words such as `true`: masking them would hide what they are not.
_SHORTEST_SECRET = 6
_MASK = "***"
#: The one of libyaml, where it was built: a large cluster is written in seconds, not in half a minute.
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
_LOG_LINES, _MOST_PODS, _MOST_EVENTS = 300, 60, 500
_SECTION_CHARACTERS, _ALL_CHARACTERS = 200_000, 4_000_000
_SENSITIVE = re.compile(r"(?i)pass|secret|token|credential|private|(access|secret|api|encrypt)[-_]?key|^(ak|sk)$")
#: What looks like a secret anywhere in a text: the password of a URL, the value of an option or of a variable.
_PATTERNS = (
    re.compile(r"(?P<kept>://[^\s:/@]*:)[^\s@]+(?=@)"),
    re.compile(
        r"(?i)(?P<kept>\b(?:access|secret|encrypt)[-_]?key[\"']?[ \t]*[=:][ \t]*[\"']?|"
        r"--(?:access-key|secret-key|session-token)[ \t]+)"
        r"[^\s\"',}]+"
    ),
    re.compile(r"(?i)(?P<kept>\b(?:session[-_]?token|password|passwd|ak|sk)[\"']?[=:][ \t]*[\"']?)[^\s\"',}]+"),
)
_NODES: tuple[tuple[str, DumpKind], ...] = (
    ("Pods of the driver's namespace", "pods"),
    ("CSI workloads", "statefulsets"),
    ("CSI workloads", "daemonsets"),
    ("PersistentVolumeClaims", "persistentvolumeclaims"),
    ("PersistentVolumes", "persistentvolumes"),
    ("CSIDrivers", "csidrivers"),
    ("CSINodes", "csinodes"),
)


def secret_values(data: Mapping[str, str]) -> Iterator[str]:
    """Find the secret values of one Secret, also those inside JSON, and the lines of longer texts."""
    for key, value in data.items():
        if key in _OPEN_KEYS:
            continue
        yield value
        yield from (line.strip() for line in value.splitlines())
        try:
            fields = json.loads(value)
        except ValueError:
            continue
        if isinstance(fields, dict):
            yield from secret_values({name: str(field) for name, field in fields.items()})


class Masker:
    """Mask secrets in a text: known values in every form, and what looks like one."""

    def __init__(self, values: Iterable[str]) -> None:
        forms = set()
        for value in values:
            if len(value) >= _SHORTEST_SECRET:
                encoded = base64.b64encode(value.encode()).decode()
                forms |= {value, encoded, encoded.rstrip("="), quote(value, safe=""), json.dumps(value)[1:-1]}
        # The longest first: a value may be a part of another.
        self._forms = sorted(forms, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Mask a text."""
        for form in self._forms:
            text = text.replace(form, _MASK)
        for pattern in _PATTERNS:
            text = pattern.sub(rf"\g<kept>{_MASK}", text)
        return text


@dataclass(frozen=True)
class Diagnostics:
    """What was collected: masked text, and the parts that could not be read."""

    text: str
    sections: int
    problems: tuple[str, ...]


def collect(
    clusters: Clusters, juicefs: JuiceFS, masker: Masker, *, clock: Callable[[], float], timeout_s: float
) -> Diagnostics:
    """Collect what the runbook asks for. A part that cannot be read is named and left out.

    Args:
        clusters: Pods, events, claims, volumes, drivers, workloads and logs come from there.
        juicefs: For `juicefs status`.
        masker: Masks every part before it is kept.
        clock: A monotonic clock.
        timeout_s: No part is started after so many seconds; each has a time limit of its own.
    """
    deadline = clock() + timeout_s
    parts: list[str] = []
    problems: list[str] = []
    size = 0
    for title, read in _sections(clusters, juicefs, problems):
        if clock() >= deadline or size >= _ALL_CHARACTERS:
            problems.append(f"{title} and what follows: {'no time' if clock() >= deadline else 'no room'} was left")
            break
        try:
            text = masker(read())
        except StorageSwitchError as error:
            problems.append(f"{title}: {error.problem}")
            continue
        if len(text) > _SECTION_CHARACTERS:
            left_out = len(text) - _SECTION_CHARACTERS
            text = f"({left_out} characters before this were left out)\n…{text[left_out:]}"
        parts.append(f"===== {title}\n{text.strip() or '(none)'}\n")
        size += len(parts[-1])
    problems = [masker(problem) for problem in problems]
    if problems:
        parts.append("===== Not collected\n" + "\n".join(problems) + "\n")
    return Diagnostics("\n".join(parts), len(parts), tuple(problems))


def _sections(clusters: Clusters, juicefs: JuiceFS, problems: list[str]) -> Iterator[tuple[str, Callable[[], str]]]:
    """Yield title and reader of each part, the most useful first."""
    yield "juicefs status", lambda: json.dumps(juicefs.status(), indent=1)
    for name, cluster in clusters.each.items():
        where = f"Cluster {name}: " if name else ""
        for title, read in _in_cluster(cluster, problems):
            yield f"{where}{title}", read


def _in_cluster(cluster: Cluster, problems: list[str]) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "Events of the driver's namespace", lambda: _events(cluster)
    for title, kind in _NODES:
        yield f"{title} ({kind})", lambda kind=kind: _described(cluster, kind)  # type: ignore[misc]
    selectors = [*(f"app={name}" for _, name in CSI_WORKLOADS), MOUNT_POD_SELECTOR]
    pods: list[Pod] = []
    for selector in selectors:
        try:
            pods += cluster.pods(selector)
        except StorageSwitchError as error:
            problems.append(f"Pods {selector}: {error.problem}")
    if len(pods) > _MOST_PODS:
        problems.append(f"logs of {len(pods) - _MOST_PODS} more pods")
    for pod in pods[:_MOST_PODS]:
        container = "" if len(pod.commands) == 1 else "juicefs-plugin"
        yield (
            f"Log of pod {pod.name}, the last {_LOG_LINES} lines",
            lambda pod=pod, container=container: cluster.log_tail(pod.name, _LOG_LINES, container),  # type: ignore[misc]
        )


def _described(cluster: Cluster, kind: DumpKind) -> str:
    objects = [_without_noise(item) for item in cluster.dump(kind)]
    return yaml.dump_all(objects, Dumper=_DUMPER, sort_keys=False, width=200) if objects else ""


def _events(cluster: Cluster) -> str:
    rows = sorted(
        (
            str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp", "")),
            _event(event),
        )
        for event in cluster.dump("events")
    )
    return "\n".join(" ".join(row) for row in rows[-_MOST_EVENTS:])


def _event(event: Mapping[str, Any]) -> str:
    what, times = event.get("involvedObject", {}), event.get("count") or 1
    about = f"{what.get('kind')}/{what.get('name')}"
    return f"{event.get('type')} {event.get('reason')} ({times} times) {about}: {event.get('message')}"


def _without_noise(value: Any) -> Any:
    """Drop what no person reads, and the values of variables that are named like secrets."""
    if isinstance(value, list):
        return [_without_noise(item) for item in value]
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("name"), str) and isinstance(value.get("value"), str) and _SENSITIVE.search(value["name"]):
        return {**value, "value": _MASK}
    dropped = {"managedFields", "kubectl.kubernetes.io/last-applied-configuration"}
    return {key: _without_noise(item) for key, item in value.items() if key not in dropped}
