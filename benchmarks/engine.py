"""Our side of the race: one partition copied or verified without Airflow, with its Parquet manifest.

`python -m benchmarks.engine copy|verify --source URL --target URL --manifests FOLDER`, the URLs as
`http://host:port/bucket/prefix`, the keys in SOURCE_KEYS and TARGET_KEYS (`access:secret`). Prints the totals as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from include.juicefs_storage.adapters.manifests import ParquetManifest
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.engine import NativeEngine
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.copy.run import Options, Transfer
from include.juicefs_storage.objects.model import KeyRange

# The plot of the benchmark brings numpy along, and pyarrow would load it: in requirements.txt there is none.
sys.modules["numpy"] = None  # type: ignore[assignment]


def _store(url: str, keys: str) -> S3Store:
    parts = urlsplit(url)
    bucket, _, prefix = parts.path.lstrip("/").partition("/")
    access_key, _, secret_key = keys.partition(":")
    return S3Store(f"{parts.scheme}://{parts.netloc}", bucket, prefix, access_key, secret_key)


def main() -> None:
    """Do it and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["copy", "verify"])
    parser.add_argument("--source", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--manifests", type=Path, required=True)
    parser.add_argument("--compare", choices=["size", "etag", "content"], default="etag")
    parser.add_argument("--concurrency", type=int, help="the most objects at once; default: finds itself")
    parser.add_argument("--name", default="00000", help="of the manifest")
    parser.add_argument("--after", help="only keys after this one")
    parser.add_argument("--until", help="only keys up to this one")
    given = parser.parse_args()
    source = _store(given.source, os.environ["SOURCE_KEYS"])
    target = _store(given.target, os.environ["TARGET_KEYS"])
    engine = NativeEngine(source, target, given.concurrency)
    transfer = Transfer(S3Bucket(source), S3Bucket(target), engine, Options(given.compare))
    work = transfer.copy if given.mode == "copy" else transfer.verify
    manifest = ParquetManifest(given.manifests, given.name, {"run": "benchmark"})
    totals = work(KeyRange(given.after, given.until), manifest)
    print(json.dumps(totals.as_json()))


if __name__ == "__main__":
    main()
