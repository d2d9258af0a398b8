"""Whether a pod reaches an endpoint."""

from __future__ import annotations

from urllib.parse import urlsplit

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.ports import Cluster

_REACH_TIMEOUT_S = 30
#: What the images hold: curl, which also proves that the pod trusts the certificate; bash, which only connects.
_REACH = """\
if command -v curl >/dev/null 2>&1; then
  exec curl --silent --show-error --output /dev/null --max-time 10 "$1/"
elif command -v bash >/dev/null 2>&1 && command -v timeout >/dev/null 2>&1; then
  exec timeout 10 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$2" "$3"
fi
exit 69
"""
_CANNOT_ASK = 69


def cannot_reach(cluster: Cluster, pod: str, container: str, endpoint: str) -> str | None:
    """Connect from a pod to an endpoint, without keys: any answer will do.

    Args:
        cluster: Where the pod is.
        pod: Its name.
        container: Its container.
        endpoint: `http(s)://host[:port]`.

    Returns:
        The empty string where it can be reached, what is wrong where it cannot, None where the pod could not be asked.
    """
    url = urlsplit(endpoint)
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    command = ["sh", "-c", _REACH, "sh", endpoint, url.hostname or "", str(port)]
    try:
        result = cluster.exec(pod, container, command, timeout_s=_REACH_TIMEOUT_S)
    except TransientError:
        return None
    if result.returncode in {_CANNOT_ASK, 126, 127}:
        return None
    if result.returncode == 0:
        return ""
    return next(iter(result.stderr.splitlines()), f"exit code {result.returncode}")[:200]
