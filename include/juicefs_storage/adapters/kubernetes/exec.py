"""Commands in pods, each over a WebSocket of its own."""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from include.juicefs_storage.adapters.kubernetes.requests import REQUEST_TIMEOUT_S
from include.juicefs_storage.errors import LostAnswerError, PermanentError, TransientError
from include.juicefs_storage.ports import ExecResult

if TYPE_CHECKING:
    from kubernetes.client import Configuration


class PodExec:
    """Runs commands in the pods of one namespace."""

    def __init__(self, configuration: Configuration, namespace: str) -> None:
        self._configuration = configuration
        self._namespace = namespace

    def run(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        """Run a command in a pod over a WebSocket of its own.

        Args:
            pod: The pod's name.
            container: Its container.
            command: The command and its arguments; no secret, since the API server's audit log shows it.
            stdin: Its standard input.
            timeout_s: How long it may run, in seconds.

        Raises:
            PermanentError: The connection's user may not exec here.
            TransientError: It could not be started, the connection was lost, or it did not end in time; in the
                last two cases it may still be running.
        """
        from websocket import WebSocketException

        where = f"{command[0]} in pod {self._namespace}/{pod}"
        deadline = time.monotonic() + timeout_s
        socket = self._open(pod, container, command, where, stdin=bool(stdin))
        try:
            if stdin:
                socket.write_stdin(stdin.encode())
            while socket.is_open() and time.monotonic() < deadline:
                socket.update(timeout=min(1.0, max(0.0, deadline - time.monotonic())))
            if socket.is_open():
                raise LostAnswerError(
                    f"{where} did not end within {timeout_s:g} s.",
                    state="it may still be running there",
                    next_step="the task tries again; every step observes before it acts",
                )
            stdout, stderr = (read().decode(errors="replace") for read in (socket.read_stdout, socket.read_stderr))
            return ExecResult(_exit_code(socket, where, stderr), stdout, stderr)
        except (WebSocketException, OSError):
            raise _connection_lost(where) from None
        finally:
            with suppress(WebSocketException, OSError):
                socket.close()

    def _open(self, pod: str, container: str, command: Sequence[str], where: str, *, stdin: bool) -> Any:
        """Open the WebSocket of an exec within `REQUEST_TIMEOUT_S`: the client itself would wait forever."""
        from kubernetes import client, stream

        # stream() swaps the request method of its client: one client per call keeps threads apart.
        api = client.CoreV1Api(client.ApiClient(self._configuration))
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        too_late = threading.Event()

        def connect() -> None:
            try:
                socket = stream.stream(
                    api.connect_get_namespaced_pod_exec,
                    pod,
                    self._namespace,
                    container=container,
                    command=list(command),
                    stdin=stdin,
                    stdout=True,
                    stderr=True,
                    tty=False,
                    binary=True,
                    _preload_content=False,
                )
                socket.sock.settimeout(REQUEST_TIMEOUT_S)
                answer.put(socket)
                if too_late.is_set():
                    socket.close()
            except Exception as error:  # noqa: BLE001  the client raises ApiException, WebSocket and socket errors here
                answer.put(error)

        threading.Thread(target=connect, name="exec", daemon=True).start()
        try:
            opened = answer.get(timeout=REQUEST_TIMEOUT_S)
        except queue.Empty:
            too_late.set()
            raise LostAnswerError(
                f"Could not start {where}: no answer within {REQUEST_TIMEOUT_S} s.",
                state="the command may yet be run",
                next_step="the task observes and tries again",
            ) from None
        if isinstance(opened, Exception):
            raise _not_started(opened, where, self._namespace)
        return opened


def _not_started(error: Exception, where: str, namespace: str) -> PermanentError | TransientError:
    """Return the error that a refused handshake stands for.

    The client fails over its own ApiException then, which is left in the context; its text holds the answer's
    headers and body.
    """
    refusal = error if hasattr(error, "reason") else error.__context__
    found = re.search(r"Handshake status (\d+)", str(getattr(refusal, "reason", "")))
    status = found[1] if found else str(getattr(refusal, "status", "") or "")
    kind = PermanentError if status in {"401", "403"} else TransientError
    return kind(
        f"Could not start {where} ({f'Kubernetes answered {status}' if status else type(refusal or error).__name__}).",
        state="the command was not run",
        next_step="apply deploy/rbac.yaml: pods/exec needs get and create"
        if kind is PermanentError
        else f"kubectl -n {namespace} get pods",
    )


def _connection_lost(where: str) -> LostAnswerError:
    return LostAnswerError(
        f"The connection was lost during {where}.",
        state="the command may have done its work, or may still be running",
        next_step="the task observes and tries again",
    )


def _exit_code(socket: Any, where: str, stderr: str) -> int:
    try:
        return int(socket.returncode)
    except (TypeError, KeyError, IndexError, AttributeError):
        raise _connection_lost(where) from None
    except ValueError:
        # A Failure without an exit code: the runtime could not start the command.
        raise TransientError(
            f"Could not start {where}: {stderr[-300:]}", state="the command was not run", next_step="check the image"
        ) from None
