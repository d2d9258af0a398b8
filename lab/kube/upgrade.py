"""`juicefs-csi-driver upgrade POD --recreate` in a csi-node pod: a mount pod is replaced, and its mount goes on.

Written after `pkg/fuse/grace/grace.go` of driver 0.32. What its image has and no process here needs is left out: the
canary Job, which pulls the new image.
"""

import asyncio
import datetime as dt
import json
from collections.abc import AsyncIterator, Callable

from lab.kube.csi import NAMESPACE, Csi
from lab.kube.mount_pods import HASH_LABEL, UPGRADE_LABEL, is_mount_pod
from lab.kube.pods import enter
from lab.kube.store import PODS, Obj

PROGRAM = "juicefs-csi-driver"
#: What is run in a pod without a process of its own: the pod and the command, to lines of its output.
Program = Callable[[Obj, list[str]], AsyncIterator[str]]
_DEADLINE_S, _POLL_S = 60.0, 0.1
_IN_PROCESS = "juicefs-upgrade-process"


class SmoothUpgrade:
    """The command, as csi-node serves it."""

    def __init__(self, csi: Csi) -> None:
        self._csi = csi

    async def serve(self, csi_node: Obj, command: list[str]) -> AsyncIterator[str]:
        """Run the command in a csi-node pod; yield what it prints. Its exit code is 0 whatever becomes of the pod."""
        if command[1:2] != ["upgrade"] or command[3:] != ["--recreate"]:
            yield f"POD-FAIL only `upgrade <mount pod> --recreate` is served here, found {' '.join(command[1:])}"
            return
        async for message in self._upgrade(csi_node, command[2]):
            yield f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M:%S} {message}"

    async def _upgrade(self, csi_node: Obj, name: str) -> AsyncIterator[str]:
        yield f"POD-START [{name}] start to upgrade"
        pod = self._csi.store.find(PODS, NAMESPACE, name)
        if pod is None:
            yield f"POD-FAIL [{name}] can not get pod."
            return
        if pod["spec"]["nodeName"] != csi_node["spec"]["nodeName"]:
            yield f"POD-FAIL [{name}] pod is not on node."
            return
        if why := self._cannot(pod):
            yield f"POD-FAIL [{name}] can not upgrade: {why}."
            return
        if pod["metadata"]["annotations"].get(_IN_PROCESS):
            yield f"POD-SKIP [{name}] pod is already in upgrade process."
            return
        try:
            pid = await self._take_over(pod)
        except (OSError, ValueError) as error:
            yield f"POD-FAIL [{name}] {error}."
            return
        yield f"send SIGHUP to mount pod {name}"
        await self._signal(pod, pid)
        yield f"Upgrade pod [{name}] with recreating"
        key = pod["metadata"]["labels"][UPGRADE_LABEL]
        try:
            async with asyncio.timeout(_DEADLINE_S):
                while (new := self._successor(pod, key)) is None:
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            yield f"POD-FAIL [{name}] node may be busy, upgrade mount pod timeout, please check it later manually."
            return
        yield f"POD-SUCCESS [{name}] Upgrade mount pod and recreate one: {new} !"

    def _cannot(self, pod: Obj) -> str:
        """Say why a mount pod cannot be upgraded without a pause; empty where it can (`CanUpgrade`)."""
        container = pod["spec"]["containers"][0]
        if not is_mount_pod(pod) or HASH_LABEL not in pod["metadata"]["labels"]:
            return "pod has no hash label"
        if self._csi.fuse is None:
            return f"image {container['image']} do not support recreate smooth upgrade"
        if not _is_ready(pod):
            return "mount pod is not ready yet"
        return ""

    async def _take_over(self, pod: Obj) -> int:
        """Take the mount's FUSE descriptor from its client; return the client's PID in its pod.

        Raises:
            OSError: The mount does not answer, or the client gives nothing up.
        """
        fuse, key = self._csi.fuse, pod["metadata"]["labels"][UPGRADE_LABEL]
        if fuse is None:
            raise OSError("no FUSE descriptors are kept")
        mount = self._csi.mount_path(pod)
        async with asyncio.timeout(2):
            text = await asyncio.to_thread((mount / ".config").read_bytes)
        config = json.loads(text)
        now = f"{dt.datetime.now(dt.UTC):%Y-%m-%d %H:%M:%S}"
        self._csi.store.amend(PODS, pod, lambda new: new["metadata"]["annotations"].update({_IN_PROCESS: now}))
        fuse.remember(key, int(config["Meta"].get("Sid", 0)), str(config.get("StatePath", "")))
        if not await asyncio.to_thread(fuse.close_in_client, key, int(config.get("PPid") or 1)):
            raise OSError("fail to recv FUSE fd")
        return int(config["Pid"])

    async def _signal(self, pod: Obj, pid: int) -> None:
        if running := self._csi.kubelet.running(pod["metadata"]["uid"]):
            await (await enter(running, ["kill", "-s", "HUP", str(pid)])).wait()

    def _successor(self, pod: Obj, key: str) -> str | None:
        for other in self._csi.store.list(PODS, NAMESPACE):
            meta = other["metadata"]
            same = is_mount_pod(other) and meta["labels"].get(UPGRADE_LABEL) == key
            if same and meta["uid"] != pod["metadata"]["uid"] and "deletionTimestamp" not in meta and _is_ready(other):
                return str(meta["name"])
        return None


def _is_ready(pod: Obj) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", []))
