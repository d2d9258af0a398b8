"""Every engine, against real stores that misbehave: a complete copy or a clear error, never a silent gap.

The tools `juicefs sync` and `mc mirror` run between two comparisons of ours; what they leave out shows there.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from include.juicefs_storage.adapters.manifests import ManifestReader, ParquetManifest
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.engine import NativeEngine
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.adapters.s3.wire.limits import Limits
from include.juicefs_storage.adapters.tools import mc_mirror
from include.juicefs_storage.adapters.tools.juicefs_sync import JuiceFSSync
from include.juicefs_storage.adapters.tools.mc_mirror import McMirror
from include.juicefs_storage.copy.manifest import ManifestRow
from include.juicefs_storage.copy.run import Options, Transfer
from include.juicefs_storage.errors import PermanentError, StorageSwitchError, TransientError
from include.juicefs_storage.objects.model import KeyRange, ObjectOutcome
from include.juicefs_storage.objects.totals import Totals
from lab.kube.tls import server_context
from lab.seaweed import Store
from tests.support.labs import lacking
from tests.support.s3_memory import MemoryStore
from tests.support.s3_proxy import Fault, S3Proxy

#: Quick to try again, and not for long.
LIMITS = Limits(connect_s=5, idle_s=10, tries=6, first_delay_s=0.02, max_delay_s=1)
HASTY = Limits(connect_s=5, idle_s=1, tries=2, first_delay_s=0.02)
#: An hour ahead of us.
SKEW_S = 3600
HOSTILE = [
    *("sp ace/a b", "per%cent/%2F%00x", "plus+plus", "ünï/日本/é", "a//b", "a/../b", "../up", "../../x", "..", "./dot"),
    *("x/./y", "xml<&>\"'", "q?x=1#f", "dir/", "z" * 1024, "ü" * 512, "tab\tkey", "ctl\x01key", "nl\nkey", "cr\rkey"),
    *(
        "back\\slash",
        "~t*r",
        "eq=;:,@$!'()[]{}",
        "\U0001f600",
        "trail ",
        " lead",
        "-dash",
        "--delete-dst",
        "b",
        "\u00a0",
    ),
]
ENGINES = ["native", "juicefs", "mc"]
#: What mc reads as other keys.
MISREAD = ["/lead", "//two", "e\u0301"]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, Store]]:
    """Two SeaweedFS servers; each test works below a prefix of its own."""
    state = tmp_path_factory.mktemp("stores")
    source = Store.create(state, "source", "source-bucket")
    try:
        target = Store.create(state, "target", "target-bucket")
        yield source, target
        target.stop()
    finally:
        source.stop()


@dataclass
class Job:
    """One partition, from one side to the other by one engine. Each `run` is a new try of the task."""

    engine: str
    source: S3Store
    target: S3Store
    folder: Path
    options: Options = field(default_factory=Options)
    stall_s: float = 60
    limits: Limits = LIMITS
    tries: Iterator[int] = field(default_factory=itertools.count)
    rows: dict[str, ManifestRow] = field(default_factory=dict)
    keys: KeyRange = KeyRange()  # noqa: RUF009 - frozen
    said: str = ""

    def run(self) -> Totals:
        manifest = ParquetManifest(self.folder, f"{next(self.tries)}", {})
        source, target = (S3Bucket(store, self.limits) for store in self._stores)
        source.check()
        target.check()
        native = NativeEngine(*self._stores, limits=self.limits)
        if self.engine == "native":
            totals = Transfer(source, target, native, self.options).copy(self.keys, manifest)
        else:
            tool = (JuiceFSSync if self.engine == "juicefs" else McMirror)(*self._stores, stall_s=self.stall_s)
            totals, self.said = Transfer(source, target, native, self.options).mirror(tool, self.keys, manifest)
        self.rows = {row.key: row for row in ManifestReader(manifest.file).rows(set(ObjectOutcome))}
        assert totals.objects() == len(self.rows)
        return totals

    def run_until_complete(self, tries: int = 6) -> None:
        """As the scheduler does: again after a transient error."""
        for left in reversed(range(tries)):
            try:
                totals = self.run()
            except TransientError:
                if not left:
                    raise
                continue
            if (
                totals.objects() == totals.objects(ObjectOutcome.SAME, ObjectOutcome.COPIED, ObjectOutcome.OVERWRITTEN)
                or not left
            ):
                return

    @property
    def _stores(self) -> tuple[S3Store, S3Store]:
        return self.source, self.target

    @property
    def outcomes(self) -> dict[str, ObjectOutcome]:
        return {key: ObjectOutcome(row.outcome) for key, row in self.rows.items()}

    @property
    def placed(self) -> set[str]:
        """The keys that the manifest says are on both sides and equal."""
        return {key for key, outcome in self.outcomes.items() if outcome in {ObjectOutcome.SAME, ObjectOutcome.COPIED}}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    if request.param == "mc":
        try:
            mc_mirror.find()
        except PermanentError as error:
            lacking(str(error))
    return str(request.param)


def engines_and(*values: str, without: tuple[str, str]) -> list[tuple[str, str]]:
    """Every engine with every value, one pair left out."""
    return [pair for pair in itertools.product(ENGINES, values) if pair != without]


_prefixes = (f"p{number}/" for number in itertools.count())


@pytest.fixture
def job(engine: str, stores: tuple[Store, Store], tmp_path: Path) -> Job:
    """A job below prefixes that nothing else uses."""
    prefix = next(_prefixes)
    source, target = (at(store, prefix) for store in stores)
    return Job(engine, source, target, tmp_path)


def at(store: Store, prefix: str) -> S3Store:
    return S3Store(store.endpoint_url, store.bucket, prefix, store.access_key, store.secret_key)


def seed(store: Store, prefix: str, count: int = 30, size: int = 3000) -> dict[str, bytes]:
    bodies = {f"k{number:04}": f"{number}".encode() * (size // len(f"{number}")) for number in range(count)}
    client = store.client()
    for key, body in bodies.items():
        client.put_object(Bucket=store.bucket, Key=prefix + key, Body=body)
    return bodies


def bodies(store: Store, prefix: str) -> dict[str, bytes]:
    client = store.client()
    return {
        key.removeprefix(prefix): client.get_object(Bucket=store.bucket, Key=key)["Body"].read()
        for key in store.objects(prefix)
    }


def test_any_key_is_copied_unharmed_or_named(engine: str, tmp_path: Path) -> None:
    with MemoryStore("source", "bystander") as source, MemoryStore("target", "bystander") as target:
        for key in (*HOSTILE, *MISREAD):
            source.put("source", key, key.encode())
        # What a cleaned path would reach.
        for store in (source, target):
            for key in ("up", "lead", "x"):
                store.put("bystander", key, b"untouched")
        before = source.bodies("source"), target.bodies("bystander")
        sides = [
            S3Store(store.url, bucket, access_key="any", secret_key="any")
            for store, bucket in ((source, "source"), (target, "target"))
        ]
        job = Job(engine, sides[0], sides[1], tmp_path)
        job.run()
        if engine != "native":
            assert "may take a key such as" in job.said
        copied = target.bodies("target")
        assert copied.items() <= before[0].items(), "another key, or another content"
        assert set(job.rows) == set(before[0])
        assert job.placed == set(copied)
        assert copied == before[0]
        assert (source.bodies("source"), target.bodies("bystander")) == before


@pytest.mark.parametrize("engine", ["native", "juicefs"], indirect=True)
def test_a_range_that_begins_at_the_name_of_a_folder(job: Job, stores: tuple[Store, Store]) -> None:
    """SeaweedFS leaves out the folder behind such a start key, and so does `juicefs sync --start`."""
    source, target = stores
    for key in ("a", "b/1", "b/2", "c"):
        source.client().put_object(Bucket=source.bucket, Key=job.source.prefix + key, Body=b"x")
    job.keys = KeyRange("b")
    job.run()
    assert job.placed == set(bodies(target, job.target.prefix)) == {"b/1", "b/2", "c"}


def test_the_source_is_only_read_and_nothing_is_deleted(job: Job, stores: tuple[Store, Store]) -> None:
    source, target = stores
    wanted = seed(source, job.source.prefix)
    target.client().put_object(Bucket=target.bucket, Key=job.target.prefix + "extra", Body=b"theirs")
    before = source.objects()
    with S3Proxy(source.endpoint_url) as reads, S3Proxy(target.endpoint_url) as writes:
        job.source, job.target = replace(job.source, endpoint=reads.url), replace(job.target, endpoint=writes.url)
        job.run()
        puts = writes.requests["PUT"]
        assert job.outcomes.pop("extra") is ObjectOutcome.EXTRA
        assert job.placed == set(wanted)
        job.run()
        assert writes.requests["PUT"] == puts, "the second run had nothing to do"
        assert set(reads.requests) <= {"GET", "HEAD"}
        assert set(writes.requests) <= {"GET", "HEAD", "PUT"}
    assert source.objects() == before
    assert bodies(target, job.target.prefix) == {**wanted, "extra": b"theirs"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_difference_is_overwritten_only_where_that_is_asked_for(
    job: Job, stores: tuple[Store, Store], overwrite: bool
) -> None:
    source, target = stores
    wanted = seed(source, job.source.prefix, 10)
    other_size, same_size = "k0003", "k0005"
    theirs = {other_size: b"theirs", same_size: wanted[same_size][::-1].replace(b"5", b"x")}
    for key, body in theirs.items():
        target.client().put_object(Bucket=target.bucket, Key=job.target.prefix + key, Body=body)
    job.options = Options(compare="content", overwrite=overwrite)
    job.run()
    found = bodies(target, job.target.prefix)
    # mc looks at sizes only, and the native engine does the rest.
    left = set() if overwrite else set(theirs)
    assert {key for key, outcome in job.outcomes.items() if outcome is ObjectOutcome.DIFFERENT} == left
    assert found == {**wanted, **{key: theirs[key] for key in left}}


def test_metadata_type_and_empty_objects(job: Job, stores: tuple[Store, Store]) -> None:
    source, target = stores
    kept: dict[str, Any] = {"ContentType": "text/x-odd", "Metadata": {"who": "me"}, "CacheControl": "no-store"}
    for key, body in (("empty", b""), ("small", b"x"), ("large", b"y" * 3 * 2**20)):
        source.client().put_object(Bucket=source.bucket, Key=job.source.prefix + key, Body=body, **kept)
    job.run()
    assert job.placed == {"empty", "small", "large"}
    assert bodies(target, job.target.prefix) == bodies(source, job.source.prefix)
    if job.engine != "juicefs":  # it keeps none of it
        for key in job.rows:
            head: Mapping[str, Any] = target.client().head_object(Bucket=target.bucket, Key=job.target.prefix + key)
            assert {name: head[name] for name in kept} == kept


def test_an_object_in_parts(stores: tuple[Store, Store], tmp_path: Path) -> None:
    source, target = stores
    prefix = next(_prefixes)
    body = bytes(range(256)) * 2**16  # 16 MiB
    source.client().put_object(
        Bucket=source.bucket, Key=f"{prefix}big", Body=body, ContentType="text/x-odd", Metadata={"who": "me"}
    )
    stores_ = at(source, prefix), at(target, prefix)
    engine = NativeEngine(*stores_, limits=LIMITS, put_limit_bytes=8 * 2**20, part_bytes=5 * 2**20)
    left, right = (S3Bucket(store, LIMITS) for store in stores_)
    totals = Transfer(left, right, engine).copy(KeyRange(), ParquetManifest(tmp_path, "one", {}))
    assert totals.objects(ObjectOutcome.COPIED) == 1
    assert bodies(target, prefix) == {"big": body}
    head = target.client().head_object(Bucket=target.bucket, Key=f"{prefix}big")
    assert (head["ContentType"], head["Metadata"]) == ("text/x-odd", {"who": "me"})
    assert "Uploads" not in target.client().list_multipart_uploads(Bucket=target.bucket)


def test_tls_with_a_ca_of_its_own(job: Job, stores: tuple[Store, Store], tmp_path: Path) -> None:
    source, target = stores
    wanted = seed(source, job.source.prefix, 5)
    context = server_context(tmp_path)
    with S3Proxy(source.endpoint_url, tls=context) as one, S3Proxy(target.endpoint_url, tls=context) as other:
        job.source, job.target = replace(job.source, endpoint=one.url), replace(job.target, endpoint=other.url)
        with pytest.raises(PermanentError, match=r"certificate.*\n?.*CA"):
            job.run()
        assert bodies(target, job.target.prefix) == {}
        ca = str(tmp_path / "ca.crt")
        job.source, job.target = replace(job.source, verify=ca), replace(job.target, verify=ca)
        job.run()
        assert one.requests["GET"] >= 5
        assert other.requests["PUT"] == 5
    assert job.placed == set(wanted)
    assert bodies(target, job.target.prefix) == wanted


# The buckets are checked before any engine runs: one engine shows it for all.
@pytest.mark.parametrize("engine", ["native"], indirect=True)
@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"secret_key": "wrong/+secret"}, "secret key"),
        ({"access_key": "NOBODY"}, "access key"),
        ({"bucket": "no-such-bucket"}, "no-such-bucket"),
    ],
)
def test_keys_and_buckets_that_are_wrong_are_named(
    job: Job, stores: tuple[Store, Store], side: str, change: dict[str, str], names: str
) -> None:
    seed(stores[0], job.source.prefix, 1)
    setattr(job, side, replace(getattr(job, side), **change))
    with pytest.raises(PermanentError, match=names) as refused:
        job.run()
    assert "wrong/+secret" not in str(refused.value)
    assert bodies(stores[1], job.target.prefix) == {}
    assert "no-such-bucket" not in {item["Name"] for item in stores[1].client().list_buckets()["Buckets"]}


@pytest.mark.parametrize(
    ("engine", "code"),
    # mc retries for half a minute, and then names something else.
    engines_and("ExpiredToken", "AccessDenied", without=("mc", "ExpiredToken")),
    indirect=["engine"],
)
def test_keys_that_end_in_mid_copy(job: Job, stores: tuple[Store, Store], code: str) -> None:
    source, target = stores
    seed(source, job.source.prefix, 8)
    status = 400 if code == "ExpiredToken" else 403
    with S3Proxy(target.endpoint_url) as proxy:
        job.target = replace(job.target, endpoint=proxy.url)

        def end(request: object) -> None:
            if proxy.requests["PUT"] > 2:
                proxy.refusal = (status, code)

        proxy.before = end
        try:
            job.run()
        except StorageSwitchError as error:
            assert code in str(error)  # noqa: PT017 - some engines name the objects instead
        proxy.refusal, proxy.before = None, lambda _: None
        written = bodies(target, job.target.prefix)
        assert len(written) < 8
        if job.rows:
            assert job.placed == set(written)
        job.run_until_complete()
    assert bodies(target, job.target.prefix) == bodies(source, job.source.prefix)


def test_a_clock_that_is_off(job: Job, stores: tuple[Store, Store]) -> None:
    source, target = stores
    wanted = seed(source, job.source.prefix, 5)
    with S3Proxy(target.endpoint_url, keys=(target.access_key, target.secret_key)) as proxy:
        proxy.skew_s = SKEW_S
        job.target = replace(job.target, endpoint=proxy.url)
        if job.engine == "native":
            job.run()
        else:
            try:
                job.run()
            except TransientError as error:
                assert "RequestTimeTooSkewed" in str(error)  # noqa: PT017 - some correct their clock, others say so
                return
    assert job.placed == set(wanted)
    assert bodies(target, job.target.prefix) == wanted


@pytest.mark.parametrize(
    ("engine", "side"),
    # mc takes long over each request, and the other side shows the same.
    engines_and("source", "target", without=("mc", "target")),
    indirect=["engine"],
)
def test_a_store_that_fails_one_request_in_ten(job: Job, stores: tuple[Store, Store], side: str) -> None:
    source, target = stores
    wanted = seed(source, job.source.prefix, 40)
    with S3Proxy((source if side == "source" else target).endpoint_url) as proxy:
        proxy.faults, proxy.every = [Fault.ERROR, Fault.RESET, Fault.CUT, Fault.SLOW_DOWN], 10
        setattr(job, side, replace(getattr(job, side), endpoint=proxy.url))
        job.run_until_complete()
        assert proxy.failed >= 4
    assert job.placed == set(wanted)
    assert bodies(target, job.target.prefix) == wanted


@pytest.mark.parametrize("method", ["GET", "PUT"])
def test_a_store_that_hangs(job: Job, stores: tuple[Store, Store], method: str) -> None:
    source, target = stores
    seed(source, job.source.prefix, 3)
    hanging, side = (source, "source") if method == "GET" else (target, "target")
    job.stall_s, job.limits = 3, HASTY
    with S3Proxy(hanging.endpoint_url) as proxy:
        proxy.faults = [Fault.HANG]
        proxy.fails = lambda request: request.method == method and "/k0" in request.target
        setattr(job, side, replace(getattr(job, side), endpoint=proxy.url))
        start = time.monotonic()
        try:
            job.run()
            assert ObjectOutcome.FAILED in job.outcomes.values()
        except TransientError:
            pass
        assert time.monotonic() - start < 25
        proxy.faults, job.limits = [], LIMITS
        job.run_until_complete()
    assert bodies(target, job.target.prefix) == bodies(source, job.source.prefix)


def test_objects_that_vanish_or_change_meanwhile_are_named(job: Job, stores: tuple[Store, Store]) -> None:
    source, target = stores
    seed(source, job.source.prefix, 10)
    client, prefix = source.client(), job.source.prefix
    done: set[str] = set()

    def meddle(request: object) -> None:
        target_path = request.target.partition("?")[0]  # type: ignore[attr-defined]
        for key, act in (
            ("k0002", lambda name: client.delete_object(Bucket=source.bucket, Key=name)),
            ("k0004", lambda name: client.put_object(Bucket=source.bucket, Key=name, Body=b"newer, and longer" * 300)),
        ):
            if target_path.endswith(key) and key not in done:
                done.add(key)
                act(prefix + key)

    with S3Proxy(source.endpoint_url) as proxy:
        proxy.before = meddle
        job.source = replace(job.source, endpoint=proxy.url)
        try:
            job.run()
        except TransientError:
            assert job.engine in {"juicefs", "mc"}
        else:
            if job.engine == "native":
                assert job.outcomes["k0002"] is ObjectOutcome.VANISHED
                assert job.outcomes["k0004"] is ObjectOutcome.CHANGED
        assert done == {"k0002", "k0004"}
        job.options = Options(overwrite=True)
        job.run_until_complete()
    assert bodies(target, job.target.prefix) == bodies(source, job.source.prefix)
