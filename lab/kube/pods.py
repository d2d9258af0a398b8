"""The kubelet: every pod is a mount, PID and host-name namespace with a root of its own and a real process in it."""

import asyncio
import base64
import contextlib
import datetime as dt
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil

from lab.kube.faults import Faults
from lab.kube.processes import record_process
from lab.kube.store import (
    CONFIG_MAPS,
    EVENTS,
    PODS,
    SECRETS,
    ApiError,
    Change,
    Obj,
    Store,
    now,
    random_suffix,
)

T = TypeVar("T")
log = logging.getLogger(__name__)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
POLL_S = 0.1
START_DEADLINE_S = 20.0
_LINE_LIMIT = 2**24
BACKOFF_S = (0.0, 1.0, 2.0, 4.0, 8.0)

# Runs as PID 1 of the new namespaces. Mounts must not leak to the machine, so every shared one becomes private, except
# the mount directory below, which stays shared: as with the driver's `mountPropagation: Bidirectional`, what a pod
# mounts there appears on the machine and in the other pods. The old root goes (private first, or its unmount would
# spread to the machine), since a mount that a namespace still holds cannot end. The ready file tells when all is done.
_INIT = """set -eu
root=$1 jfs=$2 juicefs=$3 bin=$4 hostname=$5 shares=$6 binds=$7
shift 7
while read -r _ _ _ _ target options; do
  case $target in "$jfs"|"$jfs"/*) continue ;; esac
  case $options in *shared:*) mount --make-private "$target" || : ;; esac
done < /proc/self/mountinfo
echo "$hostname" > /proc/sys/kernel/hostname
mount --bind "$root" "$root"
cd "$root"
mount --rbind /usr "$root/usr"
mount --rbind /etc "$root/etc"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount --bind "$bin" "$root/bin"
mount -t tmpfs -o mode=755 tmpfs "$root/usr/local/bin"
: > "$root/usr/local/bin/juicefs"
mount --bind "$juicefs" "$root/usr/local/bin/juicefs"
mount -o remount,bind,ro "$root/usr"
mount -o remount,bind,ro "$root/etc"
if [ "$shares" = yes ]; then mount --rbind "$jfs" "$root/jfs"; fi
while [ "$binds" -gt 0 ]; do
  mount --rbind "$1" "$root$2"
  shift 2
  binds=$((binds - 1))
done
mkdir -p .old
pivot_root . .old
mount --make-rprivate /.old
umount -l /.old
rmdir /.old
: > /run/.containerenv
exec "$@"
"""
# What `unshare` of util-linux says, and exits with 1, when SIGKILL ended its child: it tries to pass the signal on.
_KILLED = b"unshare: sigprocmask unblock failed"
_KEEPER = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait; done"]
_CRASH = ["sh", "-c", "echo 'panic: ordered to crash' >&2; exit 1"]


class _StoppedError(Exception):
    """The pod is to end."""


@dataclass
class Running:
    """A container that runs: how to enter it."""

    pid: int
    env: Mapping[str, str]
    root: Path


@dataclass
class _Pod:
    uid: str
    namespace: str
    name: str
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    restarts: int = 0
    killed: bool = False
    started: str = ""
    running: Running | None = None
    task: asyncio.Task[None] | None = None


@dataclass(frozen=True)
class Publishing:
    """What the CSI driver gives a pod: host folders by volume name, and how to take them back."""

    publish: Callable[[Obj], Awaitable[dict[str, Path]]]
    unpublish: Callable[[Obj], Awaitable[None]]
    serving: Callable[[Obj], Awaitable[bool]]


class Kubelet:
    """Run the pods of all nodes. Set `publishing` before the first pod is created."""

    publishing: Publishing

    def __init__(self, store: Store, faults: Faults, state: Path, juicefs: Path) -> None:
        self.store, self.faults, self.state, self.juicefs = store, faults, state, juicefs
        self.jfs = state / "jfs"
        self.ip = _address()
        self._pods: dict[str, _Pod] = {}
        store.listeners.append(self._on_change)

    async def prepare(self) -> None:
        """Make the shared mount directory and the images' /bin; `unmount_below` undoes both."""
        self.jfs.mkdir()
        await _run("mount", "--bind", str(self.jfs), str(self.jfs))
        # Private first: on a machine whose root is shared, the bind would else be one with the folder beneath it.
        await _run("mount", "--make-private", str(self.jfs))
        await _run("mount", "--make-shared", str(self.jfs))
        bin_dir = self.state / "bin"
        bin_dir.mkdir()
        for path in Path("/usr/bin").iterdir():
            (bin_dir / path.name).symlink_to(path)
        # As in the images: the helper through which the driver's mount command starts the client.
        (bin_dir / "mount.juicefs").unlink(missing_ok=True)
        (bin_dir / "mount.juicefs").symlink_to("/usr/local/bin/juicefs")

    def running(self, uid: str) -> Running | None:
        """Return the running container of a pod."""
        pod = self._pods.get(uid)
        return pod.running if pod else None

    def log_path(self, uid: str, restart: int) -> Path:
        """Return the log of a container's n-th run: lines of `time stream F text`."""
        return self.state / "pods" / uid / f"{restart}.log"

    def kill(self, uid: str) -> None:
        """Kill the main process of a pod, as the out-of-memory killer would."""
        running = self.running(uid)
        if running:
            os.kill(running.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """End all pods, mount pods last: the users of a mount go first."""
        is_mount = {p.uid: p.name for p in self._pods.values() if self._is_mount(p)}
        for pods in (
            [p for p in self._pods.values() if p.uid not in is_mount],
            [p for p in self._pods.values() if p.uid in is_mount],
        ):
            for pod in pods:
                pod.stop.set()
            await asyncio.gather(*(p.task for p in pods if p.task), return_exceptions=True)

    def event(self, obj: Obj, reason: str, message: str, *, kind: str = "Normal", component: str = "kubelet") -> None:
        """Record an Event about an object."""
        meta = obj["metadata"]
        namespace = meta.get("namespace", "default")
        event = {
            "metadata": {"name": f"{meta['name']}.{random_suffix(16)}", "namespace": namespace},
            "involvedObject": {
                "apiVersion": obj["apiVersion"],
                "kind": obj["kind"],
                "name": meta["name"],
                "namespace": namespace,
                "uid": meta["uid"],
                "resourceVersion": meta["resourceVersion"],
            },
            "reason": reason,
            "message": message,
            "type": kind,
            "source": {"component": component},
            "reportingComponent": component,
            "firstTimestamp": now(),
            "lastTimestamp": now(),
            "eventTime": None,
            "count": 1,
        }
        self.store.create(EVENTS, event)

    def _is_mount(self, pod: _Pod) -> bool:
        obj = self.store.find(PODS, pod.namespace, pod.name)
        return bool(obj) and (obj or {})["metadata"].get("labels", {}).get("app.kubernetes.io/name") == "juicefs-mount"

    def _on_change(self, change: Change) -> None:
        if change.resource != PODS:
            return
        meta = change.obj["metadata"]
        if change.type == "ADDED":
            pod = self._pods[meta["uid"]] = _Pod(meta["uid"], meta["namespace"], meta["name"])
            pod.task = asyncio.create_task(self._life(pod, change.obj))
        elif (change.type == "DELETED" or "deletionTimestamp" in meta) and meta["uid"] in self._pods:
            self._pods[meta["uid"]].stop.set()
            if change.type == "DELETED":
                self.kill(meta["uid"])

    async def _life(self, pod: _Pod, obj: Obj) -> None:
        try:
            if not obj["spec"].get("nodeName"):
                obj = self.store.amend(PODS, obj, lambda o: o["spec"].update(nodeName="node-1")) or obj
            where = f"{pod.namespace}/{pod.name} to {obj['spec']['nodeName']}"
            self.event(obj, "Scheduled", f"Successfully assigned {where}", component="default-scheduler")
            self._set_status(pod, obj, {"waiting": {"reason": "ContainerCreating"}})
            binds = await self._unless_stopped(pod, self.publishing.publish(obj))
            while await self._run_once(pod, obj, binds):
                delay = BACKOFF_S[min(pod.restarts, len(BACKOFF_S) - 1)]
                pod.restarts += 1
                if delay:
                    last = f"back-off {int(delay)}s restarting failed container"
                    self._set_status(pod, obj, {"waiting": {"reason": "CrashLoopBackOff", "message": last}})
                    self.event(obj, "BackOff", last, kind="Warning")
                await self._unless_stopped(pod, asyncio.sleep(delay))
            await pod.stop.wait()
        except _StoppedError:
            pass
        except Exception:
            log.exception("pod %s/%s failed in the stand-in itself", pod.namespace, pod.name)
            raise
        finally:
            await self.publishing.unpublish(obj)
            self.store.remove(PODS, obj)
            self._pods.pop(pod.uid, None)

    async def _run_once(self, pod: _Pod, obj: Obj, binds: dict[str, Path]) -> bool:
        """Run the container once; return whether it is to be started again."""
        container = obj["spec"]["containers"][0]
        workload = next((o["name"] for o in obj["metadata"].get("ownerReferences", [])), "")
        try:
            env = self._environment(obj, container)
        except ApiError as e:
            self._set_status(pod, obj, {"waiting": {"reason": "CreateContainerConfigError", "message": str(e)}})
            await self._unless_stopped(pod, asyncio.sleep(1))
            return True
        command = [*container.get("command", []), *container.get("args", [])] if container.get("command") else _KEEPER
        if self.faults.rollout(workload) == "crash-loop":
            command = _CRASH
        process = await self._start(pod, obj, env, command, binds)
        pumps = self._pump_logs(pod, process)
        pod.started = now()
        try:
            pod.running = await self._unless_stopped(pod, self._entered(process, env, self._root(pod)))
            if pod.running:
                self._set_status(pod, obj, {"running": {"startedAt": pod.started}})
                self.event(obj, "Started", f"Started container {container['name']}")
                while process.returncode is None and not await self._serves(obj, workload):
                    await self._unless_stopped(pod, asyncio.sleep(POLL_S))
            if process.returncode is None:
                self._set_status(pod, obj, {"running": {"startedAt": pod.started}}, ready=True)
            await self._unless_stopped(pod, process.wait())
        except _StoppedError:
            await self._terminate(pod, obj, container, process)
            raise
        finally:
            pod.running = None
            await asyncio.gather(*pumps)
        code = 137 if pod.killed else _exit_code(process.returncode or 0)
        pod.killed = False
        terminated = {"exitCode": code, "reason": "Completed" if code == 0 else "Error", "startedAt": pod.started}
        policy = obj["spec"]["restartPolicy"]
        again = policy == "Always" or (policy == "OnFailure" and code != 0)
        phase = "" if again else ("Succeeded" if code == 0 else "Failed")
        self._set_status(pod, obj, {"terminated": terminated | {"finishedAt": now()}}, phase=phase)
        return again

    async def _start(
        self, pod: _Pod, obj: Obj, env: dict[str, str], command: list[str], binds: dict[str, Path]
    ) -> asyncio.subprocess.Process:
        root = self._root(pod)
        folders = ["usr", "etc", "dev", "proc", "bin", "tmp", "root", "var/log", "var/tmp", "run", "mnt", "jfs"]
        mounts = [(m["name"], m["mountPath"]) for m in obj["spec"]["containers"][0].get("volumeMounts", [])]
        args = [arg for name, path in mounts if name in binds for arg in (str(binds[name]), path)]
        for folder in [*folders, *(path.lstrip("/") for name, path in mounts if name in binds)]:
            (root / folder).mkdir(parents=True, exist_ok=True)
        for link in ("lib", "lib64", "sbin"):
            if not (root / link).is_symlink() and Path("/", link).exists():
                (root / link).symlink_to(f"usr/{link}")
        (root / "run/.containerenv").unlink(missing_ok=True)
        flags = ("--mount", "--uts", "--pid", "--fork", "--kill-child", "--propagation", "unchanged")
        # Business pods see volumes only; the driver's own share the mount directory, as by a hostPath.
        shares = "yes" if any(path == "/jfs" for _, path in mounts) else "no"
        paths = (root, self.jfs, self.juicefs, self.state / "bin")
        init = (*map(str, paths), env["HOSTNAME"], shares, str(len(args) // 2))
        process = await asyncio.create_subprocess_exec(
            *("unshare", *flags, "--", "/bin/sh", "-c", _INIT, "init", *init, *args, *command),
            env=env,
            cwd="/",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
            start_new_session=True,
        )
        record_process(self.state, process.pid)
        return process

    async def _entered(self, process: asyncio.subprocess.Process, env: dict[str, str], root: Path) -> Running | None:
        """Wait for PID 1 of the container; return None when it ended before."""
        deadline = asyncio.get_running_loop().time() + START_DEADLINE_S
        while process.returncode is None and asyncio.get_running_loop().time() < deadline:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            with contextlib.suppress(OSError):
                pids = children.read_text().split()
                if pids and (root / "run/.containerenv").exists():
                    return Running(int(pids[0]), env, root)
            await asyncio.sleep(0.02)
        return None

    async def _serves(self, obj: Obj, workload: str) -> bool:
        return self.faults.rollout(workload) != "never-ready" and await self.publishing.serving(obj)

    async def _terminate(self, pod: _Pod, obj: Obj, container: Obj, process: asyncio.subprocess.Process) -> None:
        newest = self.store.find(PODS, pod.namespace, pod.name) or obj
        spec_s = obj["spec"]["terminationGracePeriodSeconds"]
        grace_s = float(newest["metadata"].get("deletionGracePeriodSeconds", spec_s))
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                if hook and pod.running:
                    await (await enter(pod.running, hook)).wait()
                if pod.running and process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pod.running.pid, signal.SIGTERM)
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()

    def _pump_logs(self, pod: _Pod, process: asyncio.subprocess.Process) -> list[asyncio.Task[None]]:
        path = self.log_path(pod.uid, pod.restarts)

        async def pump(name: str, stream: asyncio.StreamReader | None) -> None:
            with path.open("a") as file:
                while stream and (line := await stream.readline()):
                    if line.startswith(_KILLED):
                        pod.killed = True
                        continue
                    stamp = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
                    file.write(f"{stamp} {name} F {line.decode(errors='replace').rstrip(chr(10))}\n")
                    file.flush()

        streams = {"stdout": process.stdout, "stderr": process.stderr}
        return [asyncio.create_task(pump(name, stream)) for name, stream in streams.items()]

    def _environment(self, obj: Obj, container: Obj) -> dict[str, str]:
        meta, spec = obj["metadata"], obj["spec"]
        namespace = meta["namespace"]
        env = {"PATH": PATH, "HOME": "/root", "HOSTNAME": spec.get("hostname") or meta["name"]}
        fields = {
            "metadata.name": meta["name"],
            "metadata.namespace": namespace,
            "metadata.uid": meta["uid"],
            "spec.nodeName": spec.get("nodeName", ""),
            "status.hostIP": self.ip,
            "status.podIP": self.ip,
        }
        for item in container.get("env", []):
            source = item.get("valueFrom", {})
            if "fieldRef" in source:
                value = fields[source["fieldRef"]["fieldPath"]]
            elif "secretKeyRef" in source:
                ref = source["secretKeyRef"]
                data = self.store.get(SECRETS, namespace, ref["name"])["data"]
                if ref["key"] not in data:
                    raise ApiError(404, f"couldn't find key {ref['key']} in Secret {namespace}/{ref['name']}")
                value = base64.b64decode(data[ref["key"]]).decode()
            elif "configMapKeyRef" in source:
                ref = source["configMapKeyRef"]
                value = self.store.get(CONFIG_MAPS, namespace, ref["name"]).get("data", {}).get(ref["key"], "")
            else:
                value = item.get("value", "")
            env[item["name"]] = value
        return env

    def _set_status(self, pod: _Pod, obj: Obj, state: Obj, *, ready: bool = False, phase: str = "") -> None:
        running = "running" in state
        container = obj["spec"]["containers"][0]

        def change(new: Obj) -> None:
            old = new.get("status", {})
            before: Obj = next(iter(old.get("containerStatuses", [])), {})
            last = before.get("lastState", {})
            if "terminated" in before.get("state", {}):
                last = before["state"]
            conditions = {c["type"]: c for c in old.get("conditions", [])}
            good = {"PodScheduled": True, "Initialized": True, "ContainersReady": ready, "Ready": ready}
            new["status"] = {
                "phase": phase or ("Running" if running or pod.restarts or pod.started else "Pending"),
                "hostIP": self.ip,
                "podIP": self.ip,
                "podIPs": [{"ip": self.ip}],
                "qosClass": "BestEffort",
                "startTime": old.get("startTime") or now(),
                "conditions": [_condition(conditions.get(kind, {}), kind, value) for kind, value in good.items()],
                "containerStatuses": [
                    {
                        "name": container["name"],
                        "image": container.get("image", ""),
                        "imageID": "",
                        "containerID": f"lab://{pod.uid}/{pod.restarts}",
                        "ready": ready,
                        "started": running,
                        "restartCount": pod.restarts,
                        "state": state,
                        "lastState": last,
                    }
                ],
            }

        self.store.amend(PODS, obj, change, status=True)

    def _root(self, pod: _Pod) -> Path:
        return self.state / "pods" / pod.uid / "rootfs"

    async def _unless_stopped(self, pod: _Pod, work: Awaitable[T]) -> T:
        """Return the result of `work`; raise _StoppedError as soon as the pod is to end."""
        task = asyncio.ensure_future(work)
        stop = asyncio.create_task(pod.stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                raise _StoppedError
            return task.result()
        finally:
            for each in (task, stop):
                each.cancel()
            await asyncio.gather(task, stop, return_exceptions=True)


async def enter(
    running: Running,
    command: list[str],
    *,
    stdin: int = asyncio.subprocess.DEVNULL,
    stdout: int = asyncio.subprocess.DEVNULL,
    stderr: int = asyncio.subprocess.DEVNULL,
) -> asyncio.subprocess.Process:
    """Start a command inside a running container, in its environment, with its view of files and processes."""
    return await asyncio.create_subprocess_exec(
        *("nsenter", "-t", str(running.pid), "-m", "-u", "-p", "-r", "-w", "--", *command),
        env=dict(running.env),
        start_new_session=True,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
    )


def _address() -> str:
    """Return what hostNetwork pods show as their IP: the machine's own address, else loopback."""
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family.name == "AF_INET" and not address.address.startswith("127."):
                return address.address
    return "127.0.0.1"


def _condition(old: Obj, kind: str, value: bool) -> Obj:
    text = "True" if value else "False"
    since = old.get("lastTransitionTime") if old.get("status") == text else None
    return {"type": kind, "status": text, "lastProbeTime": None, "lastTransitionTime": since or now()}


def _exit_code(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


async def _run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, err = await process.communicate()
    if process.returncode:
        raise RuntimeError(f"{command[0]} failed with {process.returncode}: {err.decode().strip()}")
