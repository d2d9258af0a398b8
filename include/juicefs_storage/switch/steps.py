"""What a run will do, in order, for the person who approves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from include.juicefs_storage.switch.change import Change
from include.juicefs_storage.switch.params import SwitchParams


def planned_steps(
    params: SwitchParams, change: Change, write: str, workloads: Sequence[str], secrets: Sequence[str]
) -> tuple[str, ...]:
    """Write down the steps of a run, a line each.

    Args:
        params: Of the run.
        change: How the storage changes.
        write: What the setting's write will do.
        workloads: What is restarted.
        secrets: The names of the Secrets that are patched.
    """
    return (*_before_the_write(params, change), write, *_after_the_write(params, change, workloads, secrets))


def _before_the_write(params: SwitchParams, change: Change) -> Iterator[str]:
    yield "back up the setting, the Secrets, the workloads' templates and the pods' identities, encrypted"
    if params.catch_up and change.copies:
        yield "copy what the new store still lacks"
        yield "from here until every client has moved, copy within 2 s what clients still write to the old store"
    if params.wait_for_quiet_s:
        yield f"wait up to {params.wait_for_quiet_s} s until no client uploads, then go ahead in either case"
    if params.catch_up and change.copies and params.fence_conn_id:
        yield "have the old store refuse the clients' writes until no mount pod carries its values"


def _after_the_write(
    params: SwitchParams, change: Change, workloads: Sequence[str], secrets: Sequence[str]
) -> Iterator[str]:
    copies = params.catch_up and change.copies
    yield f"patch Secrets {', '.join(secrets)}" if secrets else "no Secret needs a patch"
    yield f"watch the setting for {params.settle_s} s and put it right if a starting pod writes old values back"
    if workloads:
        yield (
            f"restart {', '.join(workloads)} and wait up to {params.rollout_timeout_s} s: the driver's own processes "
            "read the Secret again. It moves no client, and the driver's author sees no need of it; restart_csi=false "
            "leaves it out"
        )
    what = "values" if change.one_store else "store"
    who = "mount pod" if params.accept_clients else "client"
    yield f"prove that every {who} uses the new {what}, for up to {params.client_timeout_s} s"
    if params.fence_conn_id and change.kind == "keys":
        yield "have the store refuse the old key for a few seconds, and prove once more that every client can write"
    if copies:
        yield "copy what is left of what clients wrote to the old store while they moved"
    yield "prove by the metadata that no block is missing"
    yield "prove a fresh mount with an empty cache, and that no pod restarted"
    if params.late_commit_s and not change.one_store:
        again = "copy and prove" if copies else "prove"
        yield (
            f"{params.late_commit_s} s after the last client moved: {again} the blocks once more, for slices that are "
            "committed late"
        )
    yield _after_a_failure(params, change)


def _after_a_failure(params: SwitchParams, change: Change) -> str:
    if params.on_failure == "hold":
        return "if a step fails: hold, for a human"
    if change.kind == "moved":
        return "if a step fails: hold, for a human, since the old store does not serve"
    return "if a step fails: roll back"
