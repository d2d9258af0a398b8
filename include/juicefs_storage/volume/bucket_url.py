"""The URL that JuiceFS calls `Bucket`, read as JuiceFS reads it.

After `createStorage` of cmd/format.go, `newMinio` and `newS3` of pkg/object/{minio,s3}.go of JuiceFS 1.4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import parse_qsl, urlencode, urlsplit

from include.juicefs_storage.errors import PermanentError

#: The parameter of the URL that makes the clients take any certificate.
SKIP_VERIFY = "tls-insecure-skip-verify"
#: That JuiceFS signs for where nothing names another.
DEFAULT_REGION = "us-east-1"
#: What JuiceFS reads from its environment where the URL says nothing: the region, and where the bucket's name goes.
ENVIRONMENT = ("AWS_REGION", "AWS_DEFAULT_REGION", "MINIO_REGION", "JFS_S3_VHOST_STYLE")
#: As Go's strconv.ParseBool.
_TRUE, _FALSE = {"1", "t", "T", "TRUE", "true", "True"}, {"0", "f", "F", "FALSE", "false", "False"}
_AMAZON = re.compile(r"(?<!\.vpce)\.amazonaws\.com")
_VPC_ENDPOINT = re.compile(r"^.*\.(.*)\.vpce\.amazonaws\.com")
#: Endpoints of other vendors that name their region: Oracle's, OVH's.
_NAMES_REGION = (
    re.compile(
        r"^(?:.*\.)?(?P<style>compat|vhcompat)\.objectstorage\.(?P<region>[^.]+)\.(?:oraclecloud\.com|oci\.customer-oci\.com)$"
    ),
    re.compile(r"^s3\.(?P<region>\w*)(\.\w*)?\.cloud\.ovh\.net$"),
)


@dataclass(frozen=True, slots=True)
class BucketUrl:
    """What a volume's clients take from `Storage` and `Bucket`.

    Attributes:
        endpoint: `http(s)://host[:port]`.
        bucket: The bucket's name.
        region: That requests are signed for.
        virtual_host: The bucket is part of the host's name instead of the path.
        verify: Whether a certificate is checked.
    """

    endpoint: str
    bucket: str
    region: str = DEFAULT_REGION
    virtual_host: bool = False
    verify: bool = True


def parse_bucket_url(storage: str, url: str, environment: Mapping[str, str] | None = None) -> BucketUrl:
    """Read `Bucket` as a client of this kind of storage reads it.

    Args:
        storage: The store's kind, in any case. What is not `minio` is read as `s3` is.
        url: `http(s)://host[:port]/bucket` or `http(s)://bucket.host`, with or without scheme and parameters.
        environment: The clients', of which the variables of `ENVIRONMENT` count.

    Raises:
        PermanentError: The clients find no bucket in it, or would ask Amazon for its region.
    """
    address, _, query = url.partition("?")
    params = dict(parse_qsl(query))
    verify = _verify(url, params.pop(SKIP_VERIFY, ""))
    if "://" not in address:
        address = f"{_scheme(storage, address, params)}://{address}"
    parts = urlsplit(address)
    base = f"{parts.scheme.lower()}://"
    minio = storage.lower() == "minio"
    if minio:
        path = parts.path[1:]
        bucket = (path.removeprefix("minio/") if "/" in path else path).split("/")[0]
        found = BucketUrl(f"{base}{parts.netloc}", bucket, params.get("region", ""), verify=verify)
    elif path := parts.path.strip("/"):
        found = _in_path(base, parts.netloc, path.split("/")[0], verify=verify)
    else:
        found = _in_host(base, parts.netloc, verify=verify)
    if not found.bucket or not parts.netloc:
        raise PermanentError(
            f"Bucket URL {url!r} of storage {storage!r}: expected http(s)://host[:port]/bucket.",
            next_step="correct the bucket or the endpoint",
        )
    return _completed(found, environment or {}, ENVIRONMENT[2:3] if minio else ENVIRONMENT[:2])


def _completed(found: BucketUrl, environment: Mapping[str, str], regions: tuple[str, ...]) -> BucketUrl:
    """Fill in what a URL leaves to the environment; where Amazon's own bucket goes, it does not."""
    region = found.region or next(filter(None, map(environment.get, regions)), None) or DEFAULT_REGION
    style = environment.get("JFS_S3_VHOST_STYLE", "") not in {"", "0", "false"} and not _AMAZON.search(found.endpoint)
    return replace(found, region=region, virtual_host=found.virtual_host or style)


def with_parameters(url: str, **params: str) -> str:
    """Append parameters to a bucket's URL; those without a value are left out. `_` in a name stands for `-`."""
    given = {name.replace("_", "-"): value for name, value in params.items() if value}
    return f"{url}?{urlencode(given)}" if given else url


def _verify(url: str, value: str) -> bool:
    if value and value not in _TRUE | _FALSE:
        raise PermanentError(
            f"Bucket URL {url!r}: expected true or false in {SKIP_VERIFY}, found {value!r}; no client can use it.",
            next_step="correct the bucket in the setting: juicefs config METAURL --bucket …",
        )
    return value not in _TRUE


def _scheme(storage: str, address: str, params: dict[str, str]) -> str:
    """The scheme of a URL that has none."""
    amazon = address.endswith(".amazonaws.com") and not params
    return "http" if storage.lower() == "minio" or ("." in address and not amazon) else "https"


def _in_path(base: str, host: str, bucket: str, *, verify: bool) -> BucketUrl:
    """`host/bucket`."""
    if ".amazonaws.com" in host:
        return _amazon(base, bucket, _region(host), verify=verify)
    region, virtual = _vendor(host)
    return BucketUrl(f"{base}{host}", bucket, region, virtual, verify)


def _in_host(base: str, host: str, *, verify: bool) -> BucketUrl:
    """`bucket.host`: outside of Amazon's the bucket goes into the path of every request all the same."""
    bucket, _, rest = host.partition(".")
    if not rest:
        raise PermanentError(
            f"Bucket URL {base}{host}: JuiceFS asks Amazon for the region of bucket {host!r}; "
            "expected http(s)://host[:port]/bucket.",
            next_step="give the region in the setting: juicefs config METAURL --bucket "
            f"https://{host}.s3.REGION.amazonaws.com",
        )
    if ".amazonaws.com" in host:
        if endpoint := _VPC_ENDPOINT.match(host):
            return BucketUrl(f"{base}{rest}", bucket, endpoint[1], verify=verify)
        bucket, _, rest = host.partition(".s3")
        return _amazon(base, bucket, _region(f"s3{rest}"), verify=verify)
    region, virtual = _vendor(rest)
    return BucketUrl(f"{base}{rest}", bucket, region, virtual, verify)


def _vendor(host: str) -> tuple[str, bool]:
    """The region that an endpoint names, and whether it takes the bucket in the host's name."""
    name = host.rpartition(":")[0] or host
    for pattern in _NAMES_REGION:
        if found := pattern.match(name):
            return found["region"], found.groupdict().get("style") == "vhcompat"
    return "", False


def _amazon(base: str, bucket: str, region: str, *, verify: bool) -> BucketUrl:
    """The region's own endpoint: the SDK finds it by the region alone. TLS knows no bucket with a dot in a host."""
    region = region or DEFAULT_REGION
    endpoint = f"{base}s3.{region}.amazonaws.com{'.cn' if region.startswith('cn-') else ''}"
    return BucketUrl(endpoint, bucket, region, "." not in bucket, verify)


def _region(host: str) -> str:
    """The region in `s3[.-]REGION.amazonaws.com[.cn]` (parseRegion)."""
    if host.startswith(("s3-", "s3.")):
        host = host[3:]
    host = host.removeprefix("dualstack.")
    region = "" if host == "amazonaws.com" else host.split(".")[0]
    return "" if region == "external-1" else region
