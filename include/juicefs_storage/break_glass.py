"""Go back to a backup when Airflow is gone: `python -m include.juicefs_storage.break_glass BACKUP`.

Needs the backup's file, its key, the Kubernetes API and the metadata database. Airflow is neither imported nor asked.
docs/break-glass.md says when and how.
"""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from include.juicefs_storage.adapters.vault import Keyring, read_key
from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StorageSwitchError
from include.juicefs_storage.ports import Cluster, SecretObject
from include.juicefs_storage.switch.backup import Backup
from include.juicefs_storage.switch.catch_up import CatchUp
from include.juicefs_storage.switch.lease import VolumeLease, VolumeLeases, lease_name
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.switch.probe_location import find_problem
from include.juicefs_storage.switch.way_back import WayBack, WayBackPlan
from include.juicefs_storage.volume.clusters import FIRST, Clusters, errors_in, name_in
from include.juicefs_storage.volume.difference import missing_blocks
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.secret import addressing, metadata_id, metaurl_of

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
    from include.juicefs_storage.adapters.mysql import MySqlMetadata
    from include.juicefs_storage.adapters.s3.bucket import S3Bucket

_SUFFIX = ".backup"
_COPY_TIMEOUT_S = 6 * 3600


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m include.juicefs_storage.break_glass",
        description="Open a backup, verify it, and print the way back; with --apply carry it out.",
    )
    parser.add_argument("backup", type=Path, help="the file <volume>.<run id>.backup; its name must be kept")
    parser.add_argument("--key-file", type=Path, help="file with the key; without it the key is read from stdin")
    parser.add_argument("--kubeconfig", help="default: $KUBECONFIG, ~/.kube/config, or the pod's service account")
    parser.add_argument("--context", help="context of the kubeconfig")
    for option, value in (("--more-kubeconfig", "FILE"), ("--more-context", "CONTEXT")):
        parser.add_argument(
            option, action="append", default=[], metavar=f"NAME={value}", type=_named, help="of another cluster"
        )
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="leave another cluster as it is")
    parser.add_argument("--namespace", help="of the CSI driver; default: as in the backup")
    parser.add_argument("--secret-name", help="the volume's Secret; default: as in the backup")
    parser.add_argument("--metaurl-file", type=Path, help="file with the metaurl; default: the Secret's")
    parser.add_argument("--offline", action="store_true", help="only open and verify the backup")
    parser.add_argument("--print-secrets", action="store_true", help="print the Secrets as manifests")
    parser.add_argument("--of-cluster", default=FIRST, metavar="NAME", help="those of another cluster")
    parser.add_argument("--apply", action="store_true", help="carry the way back out")
    parser.add_argument("--take-lease", action="store_true", help="take the Lease of a run that is dead")
    parser.add_argument("--anyway", action="store_true", help="go back although the plan names a problem")
    parser.add_argument("--no-copy", action="store_true", help="copy no blocks back before and after")
    parser.add_argument("--no-restart", action="store_true", help="do not restart the CSI components")
    parser.add_argument("--wait-s", type=float, default=180, help="how long the clients may take, in seconds")
    return parser.parse_args(words)


def _named(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {word!r}")
    return name, value


def open_backup(file: Path, key_text: str) -> Backup:
    """Decrypt and verify a backup's file.

    Args:
        file: Its name is part of what is verified.
        key_text: The key, or several: one a line, or with commas between them.

    Raises:
        PermanentError: There is no such file, no key, or the file does not open with it.
    """
    keys = [read_key(word) for word in key_text.replace(",", " ").split()]
    good = [key for key in keys if key]
    if not good or len(good) != len(keys):
        raise PermanentError(
            "Expected base64 of 32 bytes as key.", next_step="give the password of connection juicefs_backup"
        )
    name = file.name.removesuffix(_SUFFIX)
    try:
        sealed = file.read_bytes()
    except OSError as error:
        raise PermanentError(f"{file} cannot be read: {error.strerror}.", next_step="fetch the file first") from None
    backup = Backup.from_bytes(Keyring(good[0], tuple(good[1:])).open(name, sealed), name)
    backup.setting.config  # noqa: B018  raises where the keys in it cannot be decrypted
    return backup.model_copy(update={"backup_id": name})


class Glass:
    """The way back of one backup, by the plain clients.

    Args:
        backup: The backup.
        options: The command's.
    """

    def __init__(self, backup: Backup, options: argparse.Namespace) -> None:
        from include.juicefs_storage.adapters.kubernetes import KubernetesCluster

        self.backup, self.options = backup, options
        params = backup.params
        namespace = options.namespace or backup.namespace or params.get("namespace")
        self.secret_name = options.secret_name or params.get("secret_name") or next(iter(backup.secrets), "")
        if not namespace or not self.secret_name:
            raise PermanentError(
                "The backup does not say where the volume's Secret is.", next_step="give --namespace and --secret-name"
            )
        self.cluster: KubernetesCluster = KubernetesCluster.from_kubeconfig(
            options.kubeconfig, options.context, str(namespace)
        )
        self.clusters = Clusters(self.cluster, self._more_clusters())
        self.metaurl = self._metaurl()
        self.metadata = self._metadata()
        holder = f"break-glass/{getpass.getuser()}@{socket.gethostname()}"
        uuid = lease_name(backup.setting.uuid)
        leases = {
            name: VolumeLease(cluster, uuid, holder, now=lambda: datetime.now(UTC), cluster=name)
            for name, cluster in self.clusters.each.items()
        }
        self.lease = VolumeLeases(leases, needs_all=True)
        confirm = self.lease.confirm if options.apply else self.lease.refuse_if_held
        self.way = WayBack(backup, self.clusters, self.metadata, self.secret_name, confirm)

    def _more_clusters(self) -> dict[str, Cluster]:
        """Return the other clusters of the backup, without those that are left as they are.

        Raises:
            PermanentError: One is not given, or the backup does not know it.
            StorageSwitchError: One does not answer, or its Secret is not the one that was backed up.
        """
        from include.juicefs_storage.adapters.kubernetes import KubernetesCluster

        options, known = self.options, self.backup.more_clusters.keys()
        files, contexts = dict(options.more_kubeconfig), dict(options.more_context)
        given = files.keys() | contexts.keys()
        if unknown := sorted((given | set(options.without)) - known):
            raise PermanentError(
                f"The backup knows no cluster {', '.join(unknown)}; beside the first: {', '.join(known) or 'none'}.",
                next_step="give their names as the backup has them",
            )
        if missing := sorted(known - given - set(options.without)):
            raise PermanentError(
                f"The volume was mounted in more clusters when the backup was made: {', '.join(missing)}.",
                state="nothing was changed",
                next_step="give each with --more-kubeconfig NAME=FILE or --more-context NAME=CONTEXT; or leave it as "
                "it is with --without NAME",
            )
        more: dict[str, Cluster] = {}
        for name in sorted(given):
            file, context = files.get(name, options.kubeconfig), contexts.get(name)
            more[name] = KubernetesCluster.from_kubeconfig(file, context, self.cluster.namespace)
            with errors_in(name):
                self._require_same_secret(name, more[name])
        return more

    def _require_same_secret(self, name: str, cluster: Cluster) -> None:
        now = metadata_id(cluster.secret(self.secret_name), cluster.namespace)
        kept = self.backup.more_clusters[name].secrets.get(self.secret_name, {})
        recorded = metadata_id(SecretObject(cluster.namespace, self.secret_name, "", data=kept), cluster.namespace)
        if now is None or now != recorded:
            raise PermanentError(
                f"Secret {cluster.namespace}/{self.secret_name} names other metadata than in the backup.",
                state="nothing was changed",
                next_step="give the kubeconfig of the backup's cluster, or leave it as it is with --without NAME",
            )

    def _metaurl(self) -> Metaurl:
        if file := self.options.metaurl_file:
            password = os.environ.get("META_PASSWORD", "")
            return Metaurl.parse(file.read_text().strip(), {"META_PASSWORD": password} if password else {})
        return metaurl_of(self._secret())

    def _secret(self) -> SecretObject:
        """Read the volume's Secret, or as it was backed up."""
        try:
            return self.cluster.secret(self.secret_name)
        except StorageSwitchError:
            kept = self.backup.secrets.get(self.secret_name, {})
            if "metaurl" not in kept:
                raise
            return SecretObject(self.cluster.namespace, self.secret_name, "", data=kept)

    @cached_property
    def environment(self) -> dict[str, str]:
        """The variables of the volume's clients that say how a store is addressed; none where they cannot be read."""
        try:
            return addressing(self._secret())
        except StorageSwitchError:
            return {}

    def _metadata(self) -> MySqlMetadata:
        from include.juicefs_storage.adapters.mysql import MySqlMetadata

        return MySqlMetadata.from_metaurl(self.metaurl)

    def buckets(self) -> tuple[S3Bucket, S3Bucket]:
        """Return the bucket where the volume is now, and the backup's, with the clients' own keys."""
        from include.juicefs_storage.adapters.s3.bucket import S3Bucket

        now, recorded = self.way.observe().config, self.backup.setting.config
        old, new = (S3Bucket.from_storage(config, environment=self.environment) for config in (now, recorded))
        return old, new

    def problem(self) -> str:
        """Return why the backup's storage would not serve the clients; empty where it would."""
        from include.juicefs_storage.adapters.juicefs_command import in_controller_pod

        juicefs = in_controller_pod(self.cluster, self.metaurl, self.environment)
        location = Location(self.backup.setting.config, self.buckets()[1])
        pods = [mount.name for mount in self.way.clients()]
        return find_problem(
            self.clusters,
            juicefs,
            self.metadata,
            self.backup.setting,
            location,
            pods,
            write=self.options.apply,
            lost_before=self.backup.lost_before,
        )

    def missing(self) -> str:
        """Return how many blocks that files refer to are missing on the backup's storage; empty where none is."""
        try:
            found = missing_blocks(self.metadata, self.backup.setting, self.buckets()[1], self.backup.lost_before)
        except StorageSwitchError as error:
            return f"not known how many: {error.problem}"
        return f"{found.missing} of {found.expected}" if found.missing else ""

    def copy(self, source: S3Bucket, target: S3Bucket) -> str:
        """Copy blocks that only the source has. Nothing is overwritten or deleted."""
        from include.juicefs_storage.adapters.s3.engine import NativeEngine

        with closing(NativeEngine(source.store, target.store, copy_damaged=True)) as engine:
            work = CatchUp(
                self.metadata,
                self.backup.setting,
                source,
                target,
                engine,
                self.lease.confirm,
                time.monotonic,
                _COPY_TIMEOUT_S,
                self.backup.lost_before,
            )
            work.run()
        return f"copied {work.copied} blocks to {self.backup.setting.bucket}"

    def take_lease(self) -> None:
        """Hold the volume, so that no run moves it meanwhile."""
        for lease in self.lease.leases.values():
            if self.options.take_lease and (other := lease.other_holder()):
                lease.leases.write_lease(replace(other, holder=""))
        self.lease.acquire()


def _refuse(plan: WayBackPlan, problem: str) -> None:
    found = [problem] if problem else []
    if plan.unexpected:
        found.append("the setting names neither the backup's storage nor where its run moved to")
    if found:
        raise NeedsHumanError(
            f"Not gone back: {'; '.join(found)}.",
            state="nothing was changed",
            next_step="repair it; or, if you are sure, add --anyway",
        )


def _go_back(glass: Glass) -> int:
    """Carry the way back out; the exit code."""
    options, bucket = glass.options, glass.backup.setting.bucket
    glass.take_lease()
    try:
        plan = glass.way.plan()
        if plan.setting and not options.anyway:
            _refuse(plan, glass.problem())
        # Read before the setting goes back: it tells where the blocks are that clients have written until then.
        source, target = glass.buckets()
        copies = plan.setting and not options.no_copy
        if copies:
            print(glass.copy(source, target))
        stamp = f"break-glass {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        for line in glass.way.apply(restart=not options.no_restart, stamp=stamp):
            print(line)
        behind = glass.way.await_clients(timeout_s=options.wait_s, clock=time.monotonic, sleep=time.sleep)
        for line in glass.way.plan().clients:
            print(f"client {line}")
        if copies:
            print(glass.copy(source, target))
        missing = glass.missing()
    finally:
        glass.lease.release()
    if missing:
        print(f"Blocks missing on {bucket}: {missing}")
    if behind:
        print(f"Clients that are not back after {options.wait_s:g} s: {', '.join(mount.name for mount in behind)}")
    for name in options.without:
        print(f"Cluster {name} was left as it is: mount pods that start there may write the other values back.")
    if missing or behind or options.without:
        print("Not done: run the command again, or see docs/break-glass.md.")
        return 1
    print(f"Done: every client names {bucket}, and no block is missing there.")
    return 0


def _print_secrets(backup: Backup, cluster: str) -> int:
    """Print the Secrets of a cluster in a backup as manifests: for a pipe, not for eyes."""
    if sys.stdout.isatty():
        print("The manifests hold keys: pipe them to `kubectl apply -f -`.", file=sys.stderr)
        return 2
    manifests = [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, **({"namespace": backup.namespace} if backup.namespace else {})},
            "stringData": values,
        }
        for name, values in backup.secrets_by_cluster[cluster].items()
    ]
    yaml.safe_dump_all(manifests, sys.stdout)
    return 0


def _key_text(file: Path | None) -> str:
    if file:
        return file.read_text()
    return getpass.getpass("Key of the backups: ") if sys.stdin.isatty() else sys.stdin.read()


def _run(options: argparse.Namespace) -> int:
    backup = open_backup(options.backup, _key_text(options.key_file))
    if options.print_secrets:
        if options.of_cluster not in backup.secrets_by_cluster:
            raise PermanentError(f"The backup knows no cluster {options.of_cluster}.", next_step="see --offline")
        return _print_secrets(backup, options.of_cluster)
    setting = backup.setting
    print(f"Backup {backup.backup_id}, format {backup.format}, made {backup.created_at:%Y-%m-%d %H:%M} UTC: it opens.")
    print(f"It holds the setting of volume {setting.name} ({setting.uuid}) on {setting.bucket}")
    names = [
        name_in(cluster, name) for cluster, secrets in backup.secrets_by_cluster.items() for name in sorted(secrets)
    ]
    print(f"and the values of Secrets {', '.join(names) or '(none)'}.")
    if options.offline:
        return 0
    glass = Glass(backup, options)
    if options.apply:
        return _go_back(glass)
    plan = glass.way.plan()
    print("\n".join(plan.lines))
    for lease in glass.lease.leases.values():
        if other := lease.other_holder():
            print(f"The volume is held by {other.holder}. If that run is dead: --take-lease.")
    problem = glass.problem() if plan.setting else ""
    print(f"The backup's storage: {f'does not serve the clients: {problem}' if problem else 'serves the clients'}")
    missing = glass.missing()
    print(f"Blocks missing there: {missing or 'none'}{'; --apply copies them first' if missing else ''}")
    print("Nothing was changed. To go back: the same command with --apply.")
    return 0


def main(words: Sequence[str]) -> int:
    """Run the command; 0: all is well, 1: it is not, 2: the command is wrong."""
    options = _arguments(words)
    try:
        return _run(options)
    except StorageSwitchError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename or 'A file'} cannot be read: {error.strerror}.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
