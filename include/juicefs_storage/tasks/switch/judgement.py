"""What a run proved and where its volume is: what `decide` and `finalize` judge by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.switch.evidence import Evidence, proven_clients, stale_proofs_of_blocks, unproven
from include.juicefs_storage.switch.outcome import Observed, Progress
from include.juicefs_storage.tasks.context import log, pull, task_states
from include.juicefs_storage.tasks.switch import proofs
from include.juicefs_storage.tasks.switch.apply import APPLY
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.clusters import FIRST
from include.juicefs_storage.volume.mount_pods import MountPod

#: The tasks of the way back, see `rollback`.
ROLLBACK = (
    "copy_back", "follow_writes_back", "restore_secret", "restore_setting", "settle_again", "restart_csi_again",
    "wait_for_rollouts_again", "prove_clients_on_old", "copy_back_again", "prove_blocks_on_old", "copy_back_late",
)  # fmt: skip
#: What the rollback begins with. It is no part of ROLLBACK: a rollback without diagnostics is a whole one.
DIAGNOSTICS = "collect_diagnostics"
#: The XCom of decide that says why a run that failed does not go back.
HELD_BECAUSE = "held_because"


def left_evidence(tasks: tuple[str, ...]) -> dict[str, Evidence]:
    """Read what tasks left when they ran to their end."""
    return {task: Evidence.of(timing, pull(task)) for task in tasks if (timing := pull(task, "timing"))}


def missing_proofs(run: SwitchRun, tasks: tuple[str, ...]) -> dict[str, str]:
    """List the tasks of a way that failed or left no valid evidence, each with the reason."""
    failed = [task for task, state in task_states(*tasks).items() if state == "failed"]
    found = unproven(tasks, left_evidence(tasks), run.carried_out.identity)
    return {task: found.get(task, "failed") for task in tasks if task in found or task in failed}


def touched(run: SwitchRun) -> bool:
    """Return whether the setting, a Secret or the write fence differs from the backup, by what is there now.

    Where that cannot be read the answer is yes: the rollback looks again.
    """
    try:
        return bool(differences(run))
    except StorageSwitchError:
        log.exception("What the run touched cannot be read; the rollback looks again.")
        return True


def differences(run: SwitchRun) -> list[str]:
    """List what differs from the backup now, one line each.

    Another cluster than the first that does not answer is among it, unless no write has come so far as its Secrets:
    they are patched after the setting is written.

    Raises:
        StorageSwitchError: It cannot be read.
    """
    setting = run.runtime.setting()
    lines = [] if setting.uses(run.before.config) else [f"the setting names {setting.bucket}"]
    patches, silent = run.restore_secret.look()
    if error := silent.get(FIRST):
        raise error
    lines += [f"Secret {patch.name} holds other values" for patch in patches]
    if run.write_fence and run.write_fence.is_up():
        lines.append("the write fence on the old store is up")
    back = went_back(run)
    if lines or back:
        then = " Once it answers, clear `restore_secret` with Downstream" if back else ""
        lines += [f"what the Secrets hold is not known: {error.problem}{then}" for error in silent.values()]
    return lines


def went_back(run: SwitchRun) -> bool:
    """Return whether the run's rollback was decided on, or had begun before."""
    return pull("decide", "chosen") == DIAGNOSTICS or bool(run.record.ended("rolled-back"))


def progress_without_backup(states: Mapping[str, str], *, may_have_changed: bool) -> Progress:
    """Find out how far a run came that has no backup, or whose backup cannot be read.

    Args:
        states: Of its tasks: they tell who refused or rejected before anything was changed, and no more.
        may_have_changed: The backup cannot be read, and tasks ran that need one.
    """
    params = pull("resolve_params") or {}
    return Progress(
        refused=states["plan"] != "success",
        dry_run=bool(params.get("dry_run")),
        rejected=states["approve"] in {"failed", "upstream_failed"},
        backed_up=may_have_changed,
    )


@dataclass
class Judgement:
    """Look at a run that may have changed something, and at its volume.

    Proofs that are true but out of date are made once more: of clients that appeared since, and of blocks where the
    clients were proven later. Each costs a small file through each mount, or a listing.

    Attributes:
        run: The run, with its backup.
        evidence: Task -> what it left.
        made_again: What was proven once more, one line each.
    """

    run: SwitchRun
    evidence: Mapping[str, Evidence]
    made_again: list[str] = field(default_factory=list)
    _missing: dict[str, str] = field(default_factory=dict)

    def look(self) -> tuple[Observed, Progress]:
        """Read the volume, and what the run proved of it."""
        run = self.run
        superseded = run.record.superseded().backup_id
        back = went_back(run)
        forward_missing, back_missing = missing_proofs(run, APPLY), missing_proofs(run, ROLLBACK)
        observed, proven = Observed(), proven_clients(self.evidence)
        try:
            differs = tuple(differences(run))
            if superseded:
                observed = Observed(differs=differs)
            elif back:
                if not back_missing and stale_proofs_of_blocks(ROLLBACK, self.evidence):
                    self._prove_blocks_again(forward=False)
                on_new = run.runtime.setting().uses(run.new.config)
                patches, silent = run.patch_secret.look()
                secrets = *(f"Secret {patch.name} holds other values" for patch in patches), *silent
                observed = Observed(on_new=on_new, differs=differs, not_on_new=secrets)
            else:
                observed, proven = self._forward(differs, proven, complete=not forward_missing)
        except StorageSwitchError as error:
            observed = Observed(unreadable=error.problem)
        return observed, Progress(
            backed_up=True,
            superseded_by=superseded,
            went_back=back,
            unproven=forward_missing if back else {**forward_missing, **self._missing},
            unproven_back={**back_missing, **self._missing} if back else back_missing,
            proven_clients=proven,
            returns=bool(run.carried_out.backup_id),
        )

    def _forward(
        self, differs: tuple[str, ...], proven: frozenset[str], *, complete: bool
    ) -> tuple[Observed, frozenset[str]]:
        run = self.run
        setting = run.runtime.setting()
        on_new = setting.uses(run.new.config)
        if not complete and not differs:
            # Nothing was changed. Whether every client and every cluster answers now makes no difference.
            return Observed(on_new=on_new), proven
        mounts = run.runtime.volume_pods(setting).mounts()
        if complete and on_new:
            proven = self._prove_again(mounts, proven)
        bucket = run.new.config.bucket
        not_on_new = [f"client {mount.name} shows {mount.bucket}" for mount in mounts if mount.bucket != bucket]
        not_on_new += [f"Secret {patch.name} holds other values" for patch in run.patch_secret.plan()]
        clients = {mount.uid: mount.name for mount in mounts}
        # Once more: the clients may have taken long, and a mount pod that restarts writes the setting.
        on_new = on_new and run.runtime.setting().uses(run.new.config)
        return Observed(on_new=on_new, differs=differs, not_on_new=tuple(not_on_new), clients=clients), proven

    def _prove_again(self, mounts: list[MountPod], proven: frozenset[str]) -> frozenset[str]:
        appeared = [mount.name for mount in mounts if mount.uid not in proven]
        if appeared:
            try:
                found = proofs.prove_clients(self.run, self.run.new)["clients"]
            except StorageSwitchError as error:
                self._missing["prove_clients"] = f"did not see clients that appeared since: {error.problem}"
                return proven
            proven |= {row["uid"] for row in found}
            self.made_again.append(f"clients that appeared after the proof were proven as well: {', '.join(appeared)}")
        if appeared or stale_proofs_of_blocks(APPLY, self.evidence):
            self._prove_blocks_again(forward=True)
        return proven

    def _prove_blocks_again(self, *, forward: bool) -> None:
        location = self.run.new if forward else self.run.old
        try:
            found = proofs.prove_blocks(self.run, location)
        except StorageSwitchError as error:
            self._missing["prove_blocks" if forward else "prove_blocks_on_old"] = f"is out of date: {error.problem}"
            return
        self.made_again.append(
            f"the blocks were proven once more, after the last proof of the clients: {found['blocks']}"
        )
