"""Requests to the Kubernetes API: retries of what changes nothing, and errors without the bodies of answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from include.juicefs_storage.errors import PermanentError, TransientError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient
    from tenacity import RetryCallState

#: One request, and all tries of one that changes nothing and got no useful answer, in seconds.
REQUEST_TIMEOUT_S, _READ_FOR_S = 30, 20
_LONGEST_PAUSE_S = 5.0
_PERMANENT_STATUS = frozenset({400, 401, 403, 404, 422})


class Requests:
    """The requests of one connection. Bodies of answers are left out of errors: they may hold secrets.

    Args:
        api_client: A client of the Kubernetes API.
        namespace: The namespace that remedies name.
        is_away: Asked before a read is tried again: whether it need not be, since others have just waited in vain.
    """

    def __init__(self, api_client: ApiClient, namespace: str, is_away: Callable[[], bool] = lambda: False) -> None:
        from kubernetes import client

        # urllib3 would send a PUT again by itself, and wait for as long as a Retry-After says.
        api_client.configuration.retries = False
        self.namespace = namespace
        self._is_away = is_away
        self.api = client.ApiClient(api_client.configuration)

    @contextmanager
    def explained(self, action: str) -> Iterator[None]:
        """Turn the client's errors into ours.

        Raises:
            PermanentError: The server refused the request.
            TransientError: The server is overloaded or cannot be reached.
        """
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            kind = PermanentError if error.status in _PERMANENT_STATUS else TransientError
            raise kind(
                f"Kubernetes answered {error.status} {error.reason} to: {action}.",
                next_step=f"kubectl -n {self.namespace} get events; see docs/rights.md for 403",
            ) from None
        except HTTPError as error:
            raise TransientError(
                f"The Kubernetes API cannot be reached for: {action} ({type(error).__name__}).",
                next_step="test the Kubernetes connection in Airflow (Admin → Connections)",
            ) from None

    def read(self, action: str, call: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Make a call that changes nothing; tried again for a while where the trouble may pass."""
        from tenacity import Retrying, retry_if_exception, stop_after_delay

        tries = Retrying(
            retry=retry_if_exception(lambda error: _may_pass(error) and not self._is_away()),
            wait=_pause_s,
            stop=stop_after_delay(_READ_FOR_S),
            reraise=True,
        )
        with self.explained(action):
            return tries(call, *args, _request_timeout=REQUEST_TIMEOUT_S, **more)

    def find(self, action: str, call: Callable[..., Any], *args: Any) -> Any:
        """Call `read`; return None where there is no such object."""
        from kubernetes.client import ApiException

        def once(**more: Any) -> Any:
            try:
                return call(*args, **more)
            except ApiException as error:
                if error.status == 404:
                    return None
                raise

        return self.read(action, once)


def _may_pass(error: BaseException) -> bool:
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    if isinstance(error, ApiException):
        return error.status == 429 or (error.status or 0) >= 500
    return isinstance(error, HTTPError)


def _pause_s(state: RetryCallState) -> float:
    """Return the seconds to the next try: what the server asks for, within reason, else twice as long as before."""
    error = state.outcome.exception() if state.outcome else None
    asked = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    return min(float(asked) if asked.isdecimal() else 0.25 * 2 ** (state.attempt_number - 1), _LONGEST_PAUSE_S)
