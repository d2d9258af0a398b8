"""`python -m lab.kube --state DIR`: serve until SIGTERM; the configuration, a JSON object, comes on stdin."""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
from pathlib import Path

import psutil
from aiohttp import web

from lab.kube.api import Api
from lab.kube.csi import CONTROLLERS, Csi
from lab.kube.faults import Faults
from lab.kube.pods import Kubelet, Publishing
from lab.kube.store import PODS, Obj, Store
from lab.kube.tls import server_context, write_kubeconfig, write_private
from lab.kube.upgrade import SmoothUpgrade
from lab.kube.workloads import Workloads

_READY_S = 60.0


async def serve(state: Path, config: dict[str, object]) -> None:
    """Run the server; write `state/server.json` when it answers and the initial pods are ready."""
    store, faults = Store(), Faults()
    kubelet = Kubelet(store, faults, state, Path(str(config["juicefs"])))
    volume = config["volume"]
    csi = Csi(
        store,
        kubelet,
        volume if isinstance(volume, dict) else None,
        int(str(config["heartbeat_s"])),
        keeps_fuse=bool(config["keeps_fuse"]),
        nodes=int(str(config["nodes"])),
    )
    kubelet.publishing = Publishing(csi.publish, csi.unpublish, csi.serving)
    token = secrets.token_urlsafe(24)
    audit = state / "audit.jsonl"
    write_private(audit, b"")
    api = Api(store, kubelet, faults, token, audit, SmoothUpgrade(csi).serve)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    runner = web.AppRunner(api.application(), access_log=None, shutdown_timeout=2)
    workloads = Workloads(store, kubelet, float(str(config["rollout_delay_s"])))
    controllers = asyncio.create_task(workloads.run())
    try:
        await kubelet.prepare()
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server_context(state))
        await site.start()
        port = runner.addresses[0][1]
        url = f"https://127.0.0.1:{port}"
        write_kubeconfig(state, url, token)
        csi.install()
        # On each node a csi-node pod and, with a volume, a business pod and its mount pod.
        expected = CONTROLLERS + len(csi.nodes) * (1 if volume is None else 3)
        try:
            async with asyncio.timeout(_READY_S):
                while not stopped.is_set() and len(_ready_pods(store)) < expected:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise SystemExit(_unready(store, kubelet)) from None
        pid = os.getpid()
        server = {"pid": pid, "create_time": psutil.Process(pid).create_time(), "url": url}
        write_private(state / "server.json.new", json.dumps(server).encode())
        (state / "server.json.new").rename(state / "server.json")
        await stopped.wait()
    finally:
        controllers.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await controllers
        await kubelet.stop()
        api.close()
        await runner.cleanup()


def _ready_pods(store: Store) -> list[Obj]:
    def is_ready(pod: Obj) -> bool:
        conditions = pod.get("status", {}).get("conditions", [])
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    return [pod for pod in store.list(PODS) if is_ready(pod)]


def _unready(store: Store, kubelet: Kubelet) -> str:
    """Say what keeps the pods from being ready: the last lines that each of them wrote."""
    lines = [f"expected the initial pods Ready within {_READY_S:.0f} s, found:"]
    ready = _ready_pods(store)
    for pod in store.list(PODS):
        if pod in ready:
            continue
        meta = pod["metadata"]
        status: Obj = next(iter(pod.get("status", {}).get("containerStatuses", [])), {"restartCount": 0, "state": {}})
        lines.append(
            f"{meta['namespace']}/{meta['name']}: {status['restartCount']} restarts, {json.dumps(status['state'])}"
        )
        logs = [kubelet.log_path(meta["uid"], n) for n in (status["restartCount"] - 1, status["restartCount"])]
        lines += [line for log in logs if log.exists() for line in log.read_text().splitlines()[-5:]]
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m lab.kube", description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="an existing folder, for this server alone")
    state = parser.parse_args().state.resolve()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(state, json.loads(sys.stdin.read())))


if __name__ == "__main__":
    main()
