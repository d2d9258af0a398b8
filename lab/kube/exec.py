"""Pod exec over WebSocket: `v5.channel.k8s.io` and `v4.channel.k8s.io`, the first byte of a frame is the channel."""

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from aiohttp import WSMsgType, web

from lab.kube.pods import PATH, Running, enter
from lab.kube.store import ApiError, Obj

_STDIN, _STDOUT, _STDERR, _STATUS, _CLOSE = 0, 1, 2, 3, 255
_PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
_DRAIN_S = 2.0


async def serve_exec(
    request: web.Request, running: Running, fault: Obj, delete_pod: Callable[[], None]
) -> web.WebSocketResponse:
    """Run `?command=…` in the container and carry its streams; a fault may delete the pod or cut the connection."""
    query = request.query
    command = query.getall("command", [])
    if not command:
        raise ApiError(400, "you must specify at least 1 command for the container")
    if query.get("tty") in ("true", "1"):
        raise ApiError(400, "a terminal (tty) is not served; run the command without one")
    socket = web.WebSocketResponse(protocols=_PROTOCOLS, max_msg_size=0)
    if not socket.can_prepare(request).ok:
        raise ApiError(400, "unable to upgrade: a WebSocket with v5.channel.k8s.io or v4.channel.k8s.io is served")
    await socket.prepare(request)
    if not _found(running, command[0]):
        why = f'exec: "{command[0]}": executable file not found in $PATH'
        if "/" in command[0]:
            why = f'exec: "{command[0]}": stat {command[0]}: no such file or directory'
        message = f"error executing command in container: failed to exec in container: {why}"
        await _finish(socket, ApiError(500, f"Internal error occurred: {message}").body)
        return socket
    pipe = asyncio.subprocess.PIPE
    streams = {name: pipe for name in ("stdin", "stdout", "stderr") if query.get(name) in ("true", "True", "1")}
    process = await enter(running, command, **streams)
    reader = asyncio.create_task(_read_stdin(socket, process))
    outputs = [
        asyncio.create_task(_send(socket, channel, stream))
        for channel, stream in ((_STDOUT, process.stdout), (_STDERR, process.stderr))
        if stream
    ]
    trouble = asyncio.create_task(_trouble(request, fault, delete_pod)) if fault else None
    code = await process.wait()
    # A child in the background may hold the streams open: send what is there, then close.
    await asyncio.wait(outputs, timeout=_DRAIN_S) if outputs else None
    for task in (*outputs, reader, *([trouble] if trouble else [])):
        task.cancel()
    await asyncio.gather(*outputs, reader, return_exceptions=True)
    await _finish(socket, _exit_status(128 - code if code < 0 else code))
    return socket


async def serve_program(request: web.Request, lines: AsyncIterator[str]) -> web.WebSocketResponse:
    """Carry what a program prints that is no process here; it goes on when the client has gone away."""
    socket = web.WebSocketResponse(protocols=_PROTOCOLS, max_msg_size=0)
    await socket.prepare(request)
    async for line in lines:
        with contextlib.suppress(ConnectionError):
            await socket.send_bytes(bytes([_STDOUT]) + f"{line}\n".encode())
    await _finish(socket, _exit_status(0))
    return socket


async def _read_stdin(socket: web.WebSocketResponse, process: asyncio.subprocess.Process) -> None:
    stdin = process.stdin
    async for message in socket:
        if message.type not in (WSMsgType.BINARY, WSMsgType.TEXT):
            break
        data = message.data.encode() if isinstance(message.data, str) else message.data
        if stdin is None or not data:
            continue
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if data[0] == _STDIN:
                stdin.write(data[1:])
                await stdin.drain()
            elif data[:2] == bytes([_CLOSE, _STDIN]):
                stdin.close()
    # The client went away: the command continues, but nobody will write to it.
    if stdin is not None:
        stdin.close()


async def _send(socket: web.WebSocketResponse, channel: int, stream: asyncio.StreamReader) -> None:
    while data := await stream.read(32768):
        with contextlib.suppress(ConnectionError):
            await socket.send_bytes(bytes([channel]) + data)


async def _trouble(request: web.Request, fault: Obj, delete_pod: Callable[[], None]) -> None:
    await asyncio.sleep(fault.get("after_s", 0.2))
    if fault["exec"] == "delete-pod":
        delete_pod()
    elif request.transport:
        request.transport.abort()


async def _finish(socket: web.WebSocketResponse, status: Obj) -> None:
    with contextlib.suppress(ConnectionError):
        await socket.send_bytes(bytes([_STATUS]) + json.dumps(status).encode())
        await socket.close()


def _exit_status(code: int) -> Obj:
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: exit status {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def _found(running: Running, command: str) -> bool:
    root = Path(f"/proc/{running.pid}/root")
    folders = [""] if "/" in command else running.env.get("PATH", PATH).split(":")
    paths = (root / f"{folder}/{command}".lstrip("/") for folder in folders)
    return any(path.is_symlink() or os.access(path, os.X_OK) for path in paths)
