"""The plan of finishing a move, and the report on it."""

from __future__ import annotations

from collections.abc import Sequence

from include.juicefs_storage.finish.params import FinishParams
from include.juicefs_storage.finish.refresh import Refreshed
from include.juicefs_storage.markdown import bullets, counted
from include.juicefs_storage.records import Record
from include.juicefs_storage.switch.findings import Finding, findings_markdown
from include.juicefs_storage.volume.mount_pods import MountPod

#: What this DAG leaves to a person, in its plan and in every report.
BY_HAND = (
    "Secrets, workloads and options that are named above: correct them where they are made (Helm, GitOps).",
    "Withdraw the old key on the old store, or run this with `close_door`: `old key` says whether it is still taken.",
    "Then run this with `watch` and `certify`: it looks for a day at what still comes to the old store.",
    "This DAG deletes nothing, on no store and in no cluster.",
)


class FinishPlan(Record):
    """What carries other values, and which mount pods a run will replace.

    Attributes:
        volume: The volume's name.
        uuid: Its UUID.
        bucket: Where it is.
        carriers: What carries other values, one line each.
        mount_pods: Those that carry them, in the order in which they are replaced.
        refresh: Whether they are.
        most_pods: How many of them at most; 0: all.
        then: What the run does after that, one line each.
        findings: Of the checks.
    """

    volume: str
    uuid: str
    bucket: str
    carriers: tuple[str, ...]
    mount_pods: tuple[MountPod, ...]
    refresh: bool
    most_pods: int
    findings: tuple[Finding, ...]
    then: tuple[str, ...] = ()

    @property
    def chosen(self) -> tuple[MountPod, ...]:
        """The mount pods that a run replaces."""
        if not self.refresh:
            return ()
        return self.mount_pods[: self.most_pods] if self.most_pods else self.mount_pods

    @property
    def title(self) -> str:
        """What is planned, in a line."""
        steps = [f"replace {counted(len(self.chosen), 'mount pod')}"] if self.chosen else []
        steps += [line.partition(":")[0] for line in self.then]
        return f"Finish the move of {self.volume}: {', '.join(steps) or 'nothing to do'}"

    def to_markdown(self) -> str:
        """Render the plan for the person who approves it."""
        steps = [f"`{pod.name}` on {pod.node}, {pod.load}" for pod in self.chosen]
        left = [f"`{pod.name}` on {pod.node}" for pod in self.mount_pods[len(self.chosen) :]]
        lines = [
            f"## Finish the move of volume `{self.volume}`",
            f"UUID `{self.uuid}`, on `{self.bucket}`",
            "",
            "### Findings",
            *findings_markdown(self.findings),
            "",
            "### What carries other values",
            *bullets(list(self.carriers)),
            "",
            "### Mount pods that are replaced, one after the other, the first as the canary",
            *bullets(steps),
            "",
            "Each by `juicefs-csi-driver upgrade <pod> --recreate` in the csi-node pod of its node. Its users go on.",
            "The run stops at the first one that is not as before.",
            "",
            "### Mount pods that are left as they are",
            *bullets(left),
            "",
            "### What the run does then",
            *bullets(list(self.then)),
            "",
            "### Left to you",
            *bullets(BY_HAND),
        ]
        return "\n".join(lines)


class FinishReport(Record):
    """What a run has done, and what still carries other values.

    Attributes:
        outcome: `planned`, `nothing to do`, `named` (mount pods carry other values and were left), `refreshed`,
            `closed`, `rehearsed`, `watched`, `certified`, or `failed`.
        problem: Why it failed; empty where it did not.
        replaced: The mount pods that were replaced.
        carriers: What still carries other values, one line each.
        door: What that means.
        closed: What was proven of the closed door; empty where it was not asked for.
        rehearsed: How the rehearsal of switching off went; likewise.
        watched: How the watch went; empty where there was none.
        found: What it has found, one line each.
        public_key: Verifies the certificate, where the run has made one.
    """

    outcome: str
    run_id: str
    volume: str | None
    problem: str = ""
    replaced: tuple[Refreshed, ...] = ()
    carriers: tuple[str, ...] = ()
    door: tuple[Finding, ...] = ()
    closed: str = ""
    rehearsed: str = ""
    watched: str = ""
    found: tuple[str, ...] = ()
    public_key: str = ""

    def to_note(self) -> str:
        """Say how the run ended, in a line."""
        what = f"{self.outcome}, volume `{self.volume or '?'}`"
        left = len(self.carriers)
        return f"{what}. Mount pods replaced: {len(self.replaced)}. Still with other values: {left}."

    def to_markdown(self) -> str:
        """Render the report for a person."""
        lines = [f"## {self.outcome.capitalize()}: volume `{self.volume or '?'}`"]
        lines += [self.problem, ""] if self.problem else []
        lines += ["### Mount pods that were replaced", *bullets([_replaced(row) for row in self.replaced]), ""]
        lines += ["### What still carries other values", *bullets(list(self.carriers)), ""]
        lines += ["### The door", *findings_markdown(self.door), ""]
        lines += [self.closed, ""] if self.closed else []
        lines += ["### The rehearsal of switching off", self.rehearsed, ""] if self.rehearsed else []
        if self.watched:
            lines += ["### The watch", self.watched, "", *bullets(list(self.found)), ""]
        if self.public_key:
            lines += ["### Certificate", "XCom `certificate` of task `certify`, signed by the private half of", ""]
            lines += [f"`{self.public_key}`", ""]
        lines += ["### Left to you", *bullets(BY_HAND)]
        return "\n".join(lines)


def _replaced(row: Refreshed) -> str:
    return f"`{row.old}` by `{row.new}` on {row.node} in {row.took_s:g} s: {row.proven}"


def later_steps(params: FinishParams) -> tuple[str, ...]:
    """Say what a run does after the mount pods, one line each: `<what>: <how>`."""
    watch = (
        f"watch: what comes to the old store, who has a session, what fails; until nothing was found for "
        f"{params.idle_s:,} s, a look every {params.watch_every_s:,} s. Missing blocks are copied to the volume's store"
    )
    by = "the fence is put up, and stays up" if params.fence_conn_id else "you have closed it; this proves it"
    door = f"close the door: the old store refuses the old key's writes; {by}"
    off = (
        f"rehearse switching off: the old store denies the old key everything for {params.rehearse_off_s:,} s; undone "
        "at the first request of a client that fails"
    )
    certify = "certify: prove that the move is finished, and sign what was proven"
    asked = (
        (door, params.close_door),
        (off, params.rehearse_off_s),
        (watch, params.watch),
        (certify, params.certify),
    )
    return tuple(line for line, wanted in asked if wanted)


def in_order(mounts: Sequence[MountPod]) -> tuple[MountPod, ...]:
    """Return the mount pods with the least under way first: the first one is the canary."""
    return tuple(sorted(mounts, key=lambda pod: (pod.uploading, pod.buffered_bytes, pod.name)))
