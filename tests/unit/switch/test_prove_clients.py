"""How clients are proven: who has followed, who is stuck, and what is done about it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.ports import ExecResult, PersistentVolume, Pod, SecretObject, Session
from include.juicefs_storage.switch.prove_clients import ClientProof, prove_every_client
from include.juicefs_storage.volume.canary import Move
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.mount_pods import VolumePods
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.bare import BareCluster
from tests.support.fakes import METAURL, NEW, OLD, UUID, FakeStore, setting

#: When the setting was written.
SINCE = datetime(2026, 1, 31, 9, tzinfo=UTC)
RELOADED = (
    '2026/01/31 09:00:03 juicefs[7] <INFO>: found new configuration: storage="minio" bucket="https://new:9000/data2" '
    'ak="NEWKEY" storageClass="" tiers=map[] [mount.go:478]\n'
)
FAILED = """\
2026/01/31 09:00:00 juicefs[7] <INFO>: found new configuration: storage="minio" bucket="https://new:9000/data2"
2026/01/31 09:00:00 juicefs[7] <WARNING>: object storage: failed to load config: unknown RetryMode [mount.go:483]
"""


@dataclass
class Client:
    """A mount pod: which storage it shows, and which it uses."""

    shows: StorageConfig = NEW
    uses: StorageConfig = NEW
    log: str = ""
    options: str = ""
    started_at: datetime = datetime(2026, 1, 30, tzinfo=UTC)
    read_only: bool = False


@dataclass
class Clients(BareCluster):
    """A cluster of mount pods, and the two stores that they write to."""

    clients: dict[str, Client]
    namespace: str = "juicefs"
    new: FakeStore = field(default_factory=FakeStore)
    old: FakeStore = field(default_factory=FakeStore)
    #: One store under two names, or one that replicates to the other.
    same: bool = False
    now_s: float = 0.0

    def stores(self, client: Client) -> list[FakeStore]:
        """Where a client's block lands."""
        return [self.new, self.old] if self.same else [self.new if client.uses is NEW else self.old]

    def pods(self, label_selector: str = "", namespace: str | None = None) -> list[Pod]:
        return [
            Pod(
                "juicefs", name, f"uid-{name}", "node", True, 0, "", {},
                (f"juicefs format x; juicefs mount x /jfs/{name} -o {client.options}",), (),
                started_at=client.started_at,
            )
            for name, client in self.clients.items()
        ]  # fmt: skip

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        client = self.clients[pod]
        if ".config" in command[2]:
            form = {"UUID": UUID, "Storage": "minio", "Bucket": client.shows.bucket}
            form |= {"AccessKey": _key(client.shows)}
            return ExecResult(0, json.dumps({"Format": form, "Meta": {"ReadOnly": client.read_only}}), "")
        if "wc -c" in command[2]:
            found = any(_block(command[5]) in store.objects for store in self.stores(client))
            return ExecResult(0, f"{4 << 20 if found else 0}\n", "" if found else "cat: Input/output error")
        if "dd " in command[2]:
            if client.read_only:
                return ExecResult(1, "", "dd: Read-only file system")
            # Of a file that several clients write, each shows the block that was written last.
            key = _block(command[5])
            for store in self.stores(client):
                store.objects[key] = 4096
            return ExecResult(0, f"objects: {key}", "")
        return ExecResult(0, "", "")

    def log_tail(self, pod: str, lines: int = 20, container: str = "", since_s: float | None = None) -> str:
        return self.clients[pod].log


def _block(name: str) -> str:
    return f"myjfs/chunks/0/0/{int(hashlib.sha256(name.encode()).hexdigest(), 16)}_0_4096"


def _key(config: StorageConfig) -> str:
    return config.access_key.get_secret_value()


def prove(
    clients: Clients,
    unstick: Callable[[], None] | None = None,
    timeout_s: float = 5,
    sessions: Callable[[], Sequence[Session]] = tuple,
    *,
    returning: bool = False,
    on_look: Callable[[Collection[ClientProof], Mapping[str, str]], None] | None = None,
) -> list[ClientProof]:
    def sleep(seconds: float) -> None:
        clients.now_s += seconds

    return prove_every_client(
        VolumePods(Clusters(clients), setting(NEW), "main"),
        Move(NEW, clients.new, clients.old, SINCE, returning), "canary",
        timeout_s=timeout_s, clock=lambda: clients.now_s, sleep=sleep,
        unstick=unstick, sessions=sessions, on_look=on_look,
    )  # fmt: skip


def test_a_client_that_is_stuck_is_made_to_try_again_once() -> None:
    clients = Clients({"well": Client(), "stuck": Client(uses=OLD, log=FAILED)})
    calls = []

    def unstick() -> None:
        calls.append("again")
        clients.clients["stuck"].uses, clients.clients["stuck"].log = NEW, FAILED + RELOADED

    looks: list[tuple[list[str], list[str]]] = []

    def on_look(proven: Collection[ClientProof], waiting: Mapping[str, str]) -> None:
        looks.append(([proof.pod for proof in proven], list(waiting)))

    proofs = prove(clients, unstick, on_look=on_look)
    assert {proof.pod: proof.was_stuck for proof in proofs} == {"well": False, "stuck": True}
    assert calls == ["again"]
    assert looks == [(["well"], ["stuck"]), (["well", "stuck"], [])]


@pytest.mark.parametrize(
    ("log", "reason", "after_s"), [(FAILED, "unknown RetryMode", 5), ("", "is not in", 6)], ids=["logged", "seen twice"]
)
def test_a_client_that_stays_stuck_is_named_with_its_reason(log: str, reason: str, after_s: int) -> None:
    """Where its log does not say that it failed, a second look makes sure."""
    clients = Clients({"well": Client(), "stuck": Client(uses=OLD, log=log)})
    calls = []
    with pytest.raises(PermanentError, match=rf"1 of 2 clients(.|\n)*stuck: .*{reason}") as refused:
        prove(clients, lambda: calls.append("again"))
    assert calls == ["again"]
    assert f"after {after_s} s" in str(refused.value), "they have the whole time again"


@dataclass
class WithAnotherVolumes(Clients):
    """Beside the client, pods of another volume that do not answer, as on a node that is gone."""

    looked_at: threading.Event = field(default_factory=threading.Event)

    def persistent_volumes(self) -> list[PersistentVolume]:
        return []

    def secrets(self, label_selector: str = "") -> list[SecretObject]:
        return [SecretObject("juicefs", "main", "1", {}, data={"name": "myjfs", "metaurl": METAURL})]

    def secret(self, name: str) -> SecretObject:
        return self.secrets()[0]

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        if pod == "another":
            assert self.looked_at.wait(60)
            self.now_s += timeout_s
            self.clients["own"] = Client()  # it follows meanwhile
            raise TransientError("sh in pod juicefs/another did not end in time.")
        found = super().exec(pod, container, command, stdin=stdin, timeout_s=timeout_s)
        self.looked_at.set()
        return found


def test_a_client_is_looked_at_again_though_another_volumes_pods_took_the_whole_time() -> None:
    clients = WithAnotherVolumes({"own": Client(shows=OLD, uses=OLD), "another": Client()})
    assert [proof.pod for proof in prove(clients, timeout_s=20)] == ["own"]


@dataclass
class Away(Clients):
    """A cluster that does not answer until some time."""

    until_s: float = 1e9
    clock: Callable[[], float] = lambda: 0.0

    def pods(self, label_selector: str = "", namespace: str | None = None) -> list[Pod]:
        if self.clock() < self.until_s:
            raise TransientError("The Kubernetes API cannot be reached.")
        return super().pods(label_selector, namespace)


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_cluster_that_is_away_is_waited_for_and_named_while_the_others_are_proven(comes_back: bool) -> None:
    west = Clients({"well": Client(), "late": Client(shows=OLD, uses=OLD)})
    east = Away({"afar": Client()}, new=west.new, old=west.old, clock=lambda: west.now_s)
    east.until_s = 3 if comes_back else 1e9

    def sleep(seconds: float) -> None:
        west.now_s += seconds
        west.clients["late"] = Client()

    def proven() -> list[str]:
        found = prove_every_client(
            VolumePods(Clusters(west, {"east": east}), setting(NEW), "main"),
            Move(NEW, west.new, west.old, SINCE), "canary", timeout_s=5, clock=lambda: west.now_s, sleep=sleep,
        )  # fmt: skip
        return [proof.pod for proof in found]

    if comes_back:
        assert proven() == ["east/afar", "late", "well"]
        return
    with pytest.raises(PermanentError, match="1 of 3 clients do not use") as refused:
        proven()
    assert "- clients in cluster east: Cluster east: The Kubernetes API cannot be reached." in str(refused.value)
    assert "late" not in str(refused.value)


def test_a_remedy_that_cannot_be_applied_is_reported() -> None:
    def refuse() -> None:
        raise PermanentError("not encrypted.", next_step="encrypt it")

    with pytest.raises(PermanentError, match=r"not written once more: not encrypted\. encrypt it"):
        prove(Clients({"stuck": Client(uses=OLD)}), refuse)


@pytest.mark.parametrize(
    "late", [Client(shows=OLD, uses=OLD), Client(shows=OLD, uses=OLD, options="bucket=http://x/y")]
)
def test_a_client_that_has_not_read_the_setting_is_not_stuck(late: Client) -> None:
    calls = []
    with pytest.raises(PermanentError, match=r"its \.config shows bucket") as refused:
        prove(Clients({"late": late}), lambda: calls.append("again"))
    assert calls == []
    assert ("bucket=http://x/y; remove" in str(refused.value)) == bool(late.options)


def test_a_client_that_came_since_the_checks_and_is_no_mount_pod_is_named() -> None:
    clients = Clients({"well": Client()})
    own, stranger = (
        Session(sid, "1.4.2", "host", at, datetime.now(UTC)) for sid, at in ((1, "/jfs/well"), (2, "/mnt"))
    )
    with pytest.raises(PermanentError, match=r"1 of 2 clients(.|\n)*session 2 on host at /mnt: no mount pod"):
        prove(clients, sessions=lambda: [own, stranger])
    looks = iter([[own, stranger], [own]])
    assert [proof.pod for proof in prove(clients, sessions=lambda: next(looks))] == ["well"]


def test_a_block_that_others_copied_proves_no_client() -> None:
    """The follower copies what a stuck client writes: its block is on both stores then."""
    clients = Clients({"well": Client(log=RELOADED), "stuck": Client(uses=OLD, log=FAILED)}, same=True)
    with pytest.raises(PermanentError, match=r"1 of 2 clients(.|\n)*stuck: .*unknown RetryMode"):
        prove(clients)


@pytest.mark.parametrize(
    ("client", "by"),
    [
        (Client(log=RELOADED), "log"),
        (Client(started_at=datetime(2026, 1, 31, 10, tzinfo=UTC)), "start"),
    ],
)
def test_where_both_sides_show_the_block_the_log_or_the_start_decides(client: Client, by: str) -> None:
    assert [proof.by for proof in prove(Clients({"well": client}, same=True))] == [by]


@pytest.mark.parametrize("log", ["", FAILED, RELOADED.replace("NEWKEY", "OLDKEY"), RELOADED.replace("new:", "old:")])
def test_where_both_sides_show_the_block_a_log_without_the_reload_proves_nothing(log: str) -> None:
    calls = []
    with pytest.raises(PermanentError, match="1 of 1 clients"):
        prove(Clients({"unknown": Client(log=log)}, same=True), lambda: calls.append("again"))
    assert calls == ["again"], "a stuck client is made to retry"


def test_a_failed_reload_is_no_proof_even_with_the_block_in_place() -> None:
    """It keeps what it had before that reload, and not what the setting says."""
    with pytest.raises(PermanentError, match="could not use the setting"):
        prove(Clients({"stuck": Client(log=RELOADED + FAILED)}))


def test_on_the_way_back_a_client_that_never_left_is_proven_by_its_block() -> None:
    """Its reload failed on the way out and fails on the way back: it has kept the storage that it must have."""
    clients = Clients({"stayed": Client(log=FAILED)})
    assert [proof.by for proof in prove(clients, returning=True)] == ["block"]
    for elsewhere in (
        Clients({"stuck": Client(uses=OLD, log=FAILED)}),
        Clients({"stuck": Client(log=FAILED)}, same=True),
    ):
        with pytest.raises(PermanentError, match="could not use the setting"):
            prove(elsewhere, returning=True)


def test_an_old_store_that_is_gone_hinders_no_proof() -> None:
    clients = Clients({"well": Client()})

    class Gone(FakeStore):
        def exists(self, key: str) -> bool:
            raise TransientError("no answer")

    clients.old = Gone()
    assert [proof.by for proof in prove(clients)] == ["block"]


def test_a_client_that_is_mounted_read_only_is_proven_by_reading_what_another_writes() -> None:
    clients = Clients({"reads": Client(read_only=True), "writes": Client()})
    assert {proof.pod: proof.by for proof in prove(clients)} == {"reads": "read", "writes": "block"}


def test_a_client_that_is_mounted_read_only_and_reads_from_the_old_store_is_not_proven() -> None:
    """Its `.config` and its log show the new one."""
    clients = Clients({"reads": Client(read_only=True, uses=OLD, log=RELOADED), "writes": Client()})
    with pytest.raises(PermanentError, match=r"1 of 2 clients(.|\n)*reads: a block that another client wrote"):
        prove(clients)


def test_a_client_that_is_mounted_read_only_waits_for_one_that_writes() -> None:
    clients = Clients({"reads": Client(read_only=True), "writes": Client(uses=OLD)})
    with pytest.raises(PermanentError, match=r"2 of 2 clients(.|\n)*no client is proven yet that writes"):
        prove(clients)


@pytest.mark.parametrize(
    ("client", "by"),
    [
        (Client(read_only=True, log=RELOADED), "log"),
        (Client(read_only=True, started_at=datetime(2026, 2, 1, tzinfo=UTC)), "start"),
        (Client(read_only=True), ""),
        (Client(read_only=True, log=FAILED), ""),
    ],
)
def test_where_nobody_writes_the_log_of_a_client_must_show_the_reload(client: Client, by: str) -> None:
    clients = Clients({"reads": client})
    if by:
        assert [proof.by for proof in prove(clients)] == [by]
    else:
        with pytest.raises(PermanentError, match="no client can write a block for it to read"):
            prove(clients)


def test_a_block_that_both_stores_show_does_not_prove_who_reads_it() -> None:
    clients = Clients({"reads": Client(read_only=True), "writes": Client(log=RELOADED)}, same=True)
    with pytest.raises(PermanentError, match="the block that it read does not tell which store"):
        prove(clients)
    clients.clients["reads"].log = RELOADED
    assert {proof.by for proof in prove(clients)} == {"log"}
