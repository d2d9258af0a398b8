"""The clusters that have a volume mounted: one, or several that share its metadata and its store.

A mount pod of another cluster than the first is named `connection/pod` in plans, results and commands. No pod's name
has a slash in it, and pods, Secrets and workloads of two clusters may have the same names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.ports import Cluster, ExecResult, Pod

#: The name of the first cluster, which is left out of the names of what is in it.
FIRST = ""

T = TypeVar("T")
log = logging.getLogger(__name__)


def name_in(cluster: str, name: str) -> str:
    """Name something that is in a cluster."""
    return f"{cluster}/{name}" if cluster else name


def cluster_of(name: str) -> str:
    """Return the cluster of what `name_in` has named."""
    return name.rpartition("/")[0]


def kubectl(namespace: str, verb: str, name: str, more: str = "") -> str:
    """Return the command that a person gives about something in a cluster.

    Args:
        namespace: Where it is.
        verb: Such as `logs`.
        name: What `name_in` has named.
        more: What follows the name.
    """
    cluster, _, within = name.rpartition("/")
    command = " ".join(filter(None, ("kubectl -n", namespace, verb, within, more)))
    return f"{command} (in cluster {cluster})" if cluster else command


@contextmanager
def errors_in(cluster: str) -> Iterator[None]:
    """Name a cluster in the errors of what is done there; not the first one."""
    try:
        yield
    except StorageSwitchError as error:
        if cluster == FIRST:
            raise
        problem = f"Cluster {cluster}: {error.problem}"
        raise type(error)(problem, state=error.state, next_step=error.next_step) from error


@dataclass(frozen=True)
class Clusters:
    """The clusters of a volume. `ports.PodAccess` over all of them.

    Attributes:
        first: Where juicefs runs.
        more: The others, by the names of their connections.
    """

    first: Cluster
    more: Mapping[str, Cluster] = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        """Of the CSI driver, the same in every cluster."""
        return self.first.namespace

    @property
    def each(self) -> dict[str, Cluster]:
        """Every cluster by its name, the first one first."""
        return {FIRST: self.first, **self.more}

    def ask_all(self, ask: Callable[[str, Cluster], Iterable[T]]) -> list[T]:
        """Ask every cluster.

        Args:
            ask: Asks one, given its name.

        Raises:
            StorageSwitchError: A cluster does not answer.
        """
        answers, silent = self.ask_each(ask)
        raise_first(silent)
        return answers

    def ask_each(self, ask: Callable[[str, Cluster], Iterable[T]]) -> tuple[list[T], dict[str, StorageSwitchError]]:
        """Ask every cluster, also where another one fails.

        Args:
            ask: Asks one, given its name.

        Returns:
            The answers of all that answered, and the errors of the others by their names.
        """
        answers: list[T] = []
        silent: dict[str, StorageSwitchError] = {}
        for name, cluster in self.each.items():
            try:
                with errors_in(name):
                    answers += ask(name, cluster)
            except StorageSwitchError as error:
                silent[name] = error
        return answers, silent

    def in_each(self, do: Callable[[str, Cluster], Iterable[str]]) -> list[str]:
        """Do something in every cluster, also where it fails in another one: a way back depends on no other cluster.

        Args:
            do: Does it in one, given its name, and returns the names of what it changed.

        Raises:
            StorageSwitchError: It failed in a cluster.
        """
        done, failed = self.ask_each(lambda name, cluster: [name_in(name, line) for line in do(name, cluster)])
        if failed and self.more:
            error = next(iter(failed.values()))
            others = ", ".join(name or "the first" for name in self.each.keys() - failed.keys()) or "no cluster"
            raise type(error)(
                error.problem,
                state=f"{error.state or 'not done there'}; done in {others}",
                next_step=f"{error.next_step}; then clear this task with Downstream",
            ) from error
        raise_first(failed)
        return done

    def pods(self, label_selector: str = "") -> Sequence[Pod]:
        """Read the pods of every cluster.

        Raises:
            StorageSwitchError: A cluster does not answer.
        """
        return self.ask_all(_pods(label_selector))

    def pods_seen(self, label_selector: str = "") -> tuple[list[Pod], dict[str, StorageSwitchError]]:
        """Read the pods of the clusters that answer; and the errors of the others, by their names."""
        return self.ask_each(_pods(label_selector))

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        """Run a command in a pod of whichever cluster, see `ports.PodAccess`.

        Args:
            pod: The pod's name.
            container: Its container.
            command: The command and its arguments.
            stdin: Its standard input.
            timeout_s: How long it may run, in seconds.
        """
        where, _, name = pod.rpartition("/")
        with errors_in(where):
            return self.each[where].exec(name, container, command, stdin=stdin, timeout_s=timeout_s)

    def log_tail(self, pod: str, lines: int = 20, container: str = "", since_s: float | None = None) -> str:
        """Return the last lines of the log of a pod of whichever cluster, see `ports.PodAccess`.

        Args:
            pod: Its name.
            lines: How many at most.
            container: Where the pod has several.
            since_s: None older than so many seconds; None: of any age.
        """
        where, _, name = pod.rpartition("/")
        with errors_in(where):
            return self.each[where].log_tail(name, lines, container, since_s)


def _pods(label_selector: str) -> Callable[[str, Cluster], list[Pod]]:
    def read(name: str, cluster: Cluster) -> list[Pod]:
        return [replace(pod, name=name_in(name, pod.name)) for pod in cluster.pods(label_selector)]

    return read


def raise_first(failed: Mapping[str, StorageSwitchError]) -> None:
    """Raise the first of the errors of several clusters; log the others."""
    for error in list(failed.values())[1:]:
        log.warning("%s", error)
    for error in failed.values():
        raise error
