"""Objects moved by obstore (Rust's object_store): slower than the native engine, and the base that it rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from include.juicefs_storage.adapters.s3.client import PUT_LIMIT_BYTES, is_md5
from include.juicefs_storage.objects.model import Compared, Comparison, Copied, Engine, Listed, ObjectOutcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from obstore.store import ClientConfig
    from obstore.store import S3Store as ObstoreStore

    from include.juicefs_storage.adapters.s3.store import S3Store

_CHUNK_BYTES = 8 * 2**20


class ObstoreEngine(Engine):
    """`model.Engine` on obstore, with threads."""

    def __init__(self, source: S3Store, target: S3Store, concurrency: int = 8) -> None:
        self._source, self._target = _opened(source), _opened(target)
        self._source_prefix, self._target_prefix = source.prefix, target.prefix
        self._concurrency = concurrency

    def copy(self, objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        """Copy whole objects; a body is in memory while it moves."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(lambda item: _contained(self._copy, Copied, item, overwrite), objects))

    def compare(self, objects: Sequence[Listed]) -> list[Compared]:
        """Read both sides and compare."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(self._concurrency) as pool:
            return list(pool.map(lambda item: _contained(self._compare, Compared, item), objects))

    def _copy(self, item: Listed, overwrite: bool) -> Copied:
        from obstore.exceptions import AlreadyExistsError

        key, size, etag = item
        if size > PUT_LIMIT_BYTES:
            return Copied(ObjectOutcome.FAILED, detail="larger than 5 GiB")
        try:
            found = self._source.get(self._source_prefix + key)
        except FileNotFoundError:
            return Copied(ObjectOutcome.VANISHED)
        if (etag and (found.meta["e_tag"] or "").strip('"') != etag) or found.meta["size"] != size:
            return Copied(ObjectOutcome.CHANGED)
        try:
            put = self._target.put(
                self._target_prefix + key,
                found.buffer(),
                attributes=found.attributes,
                use_multipart=False,
                mode="overwrite" if overwrite else "create",
            )
        except AlreadyExistsError:
            compared = self._compare(item)
            return Copied(compared.outcome, comparison=Comparison.CONTENT, checksum=compared.checksum)
        return self._proven(item, (put["e_tag"] or "").strip('"'), overwrite=overwrite)

    def _proven(self, item: Listed, written: str, *, overwrite: bool) -> Copied:
        done = ObjectOutcome.OVERWRITTEN if overwrite else ObjectOutcome.COPIED
        if written == item[2] and is_md5(written):
            return Copied(done, written, Comparison.ETAG)
        compared = self._compare(item)
        if compared.outcome is ObjectOutcome.SAME:
            return Copied(done, written, Comparison.CONTENT, compared.checksum)
        return Copied(ObjectOutcome.FAILED, written, Comparison.CONTENT, detail=f"read back: {compared.outcome}")

    def _compare(self, item: Listed) -> Compared:
        checksums = []
        for store, key, absent in (
            (self._source, self._source_prefix + item[0], ObjectOutcome.VANISHED),
            (self._target, self._target_prefix + item[0], ObjectOutcome.MISSING),
        ):
            checksum = _checksum(store, key)
            if checksum is None:
                return Compared(absent)
            checksums.append(checksum)
        return Compared(ObjectOutcome.SAME if checksums[0] == checksums[1] else ObjectOutcome.DIFFERENT, checksums[0])


def _contained(function: Callable[..., Any], result: Callable[..., Any], *arguments: object) -> Any:
    """One object that cannot be treated is an outcome. obstore's own messages hold URLs and answers, no keys."""
    from obstore.exceptions import BaseError

    try:
        return function(*arguments)
    except (BaseError, OSError, ValueError) as error:
        return result(ObjectOutcome.FAILED, detail=f"obstore: {type(error).__name__}")


def _checksum(store: ObstoreStore, key: str) -> str | None:
    from xxhash import xxh3_64

    try:
        found = store.get(key)
    except FileNotFoundError:
        return None
    digest = xxh3_64()
    for chunk in found.stream(min_chunk_size=_CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def _opened(store: S3Store) -> ObstoreStore:
    from pathlib import Path

    from obstore.store import S3Store as ObstoreStore

    options: ClientConfig = {"allow_http": True, "timeout": "120s", "connect_timeout": "10s"}
    if isinstance(store.verify, str):
        options["root_certificate"] = Path(store.verify).read_bytes()
    elif not store.verify:
        options["allow_invalid_certificates"] = True
    token: dict[str, Any] = {"session_token": store.session_token} if store.session_token else {}
    return ObstoreStore(
        store.bucket,
        endpoint=store.endpoint,
        region=store.region,
        access_key_id=store.access_key,
        secret_access_key=store.secret_key,
        virtual_hosted_style_request=store.virtual_host,
        unsigned_payload=True,
        client_options=options,
        **token,
    )
