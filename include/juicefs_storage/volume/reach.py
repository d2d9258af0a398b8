"""Whether a pod reaches an endpoint."""

from __future__ import annotations

from urllib.parse import urlsplit

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.ports import PodAccess
from include.juicefs_storage.volume.bucket_url import BucketUrl

_REACH_TIMEOUT_S = 30
#: What the images hold: curl, which also proves that the pod trusts the certificate; bash, which only connects.
_REACH = """\
if command -v curl >/dev/null 2>&1; then
  exec curl --globoff --silent --show-error --output /dev/null --max-time 10 ${4:+"$4"} "$1/"
elif command -v bash >/dev/null 2>&1 && command -v timeout >/dev/null 2>&1; then
  timeout 10 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$2" "$3" || exit
  case $1 in https:*) [ -n "$4" ] || exit 69 ;; esac
  exit 0
fi
exit 69
"""
_CANNOT_ASK = 69


def is_about_certificate(problem: str) -> bool:
    """Whether a message of curl, juicefs or Airflow says that a certificate is not trusted."""
    return "certificate" in problem or "x509" in problem


def cannot_reach(cluster: PodAccess, pod: str, container: str, url: BucketUrl) -> str | None:
    """Connect from a pod to an endpoint, without keys: any answer will do.

    Args:
        cluster: Where the pod is.
        pod: Its name.
        container: Its container.
        url: Where the clients find the store, and whether they check its certificate.

    Returns:
        The empty string where it can be reached, what is wrong where it cannot, None where the pod could not be asked,
        be it for its certificate alone.
    """
    parts = urlsplit(url.endpoint)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    insecure = "" if url.verify else "--insecure"
    command = ["sh", "-c", _REACH, "sh", url.endpoint, parts.hostname or "", str(port), insecure]
    try:
        result = cluster.exec(pod, container, command, timeout_s=_REACH_TIMEOUT_S)
    except TransientError:
        return None
    if result.returncode in {_CANNOT_ASK, 126, 127}:
        return None
    if result.returncode == 0:
        return ""
    return next(iter(result.stderr.splitlines()), f"exit code {result.returncode}")[:200]
