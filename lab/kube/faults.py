"""Faults that a test orders: refused, slow or cut requests, rollouts that fail, execs that break, missing rights.

An order is one of (keys with `?` may be left out; `times` null or absent means until cleared):

- `{"match": {"verb"?, "resource"?, "name"?, "subresource"?}, "times"?, "action": ACTION}` with ACTION one of
  `{"status": 409 | 429 | 500, "retry_after"?}`, `{"delay_s": n}`, `{"drop": "before" | "after"}`
- `{"rollout": "never-ready" | "crash-loop", "name": workload}`
- `{"exec": "delete-pod" | "drop", "after_s"?, "times"?}` (once, unless `times` says more)
- `{"deny": {"verb"?, "group"?, "resource"?}}`; a subresource is written `pods/exec`
- `{"kill": pod name, "namespace"?}`: kill the pod's main process, once, now
"""

from typing import Any

from lab.kube.store import Obj

_KINDS = ("match", "rollout", "exec", "deny", "kill")


class Faults:
    """What is ordered at present."""

    def __init__(self) -> None:
        self._orders: list[Obj] = []

    def order(self, fault: Obj) -> None:
        """Add an order; ValueError for an unknown one."""
        if sum(kind in fault for kind in _KINDS) != 1:
            raise ValueError(f"a fault has exactly one of {', '.join(_KINDS)}; got {', '.join(fault) or 'none'}")
        if "match" in fault and not fault.get("action", {}).keys() & {"status", "delay_s", "drop"}:
            raise ValueError("a match needs an action: status, delay_s or drop")
        if "rollout" in fault and (fault["rollout"] not in ("never-ready", "crash-loop") or "name" not in fault):
            raise ValueError("a rollout fault is never-ready or crash-loop, with the workload's name")
        if "exec" in fault and fault["exec"] not in ("delete-pod", "drop"):
            raise ValueError("an exec fault is delete-pod or drop")
        self._orders.append({"times": 1} | fault if "exec" in fault else dict(fault))

    def clear(self) -> None:
        """Forget all orders."""
        self._orders.clear()

    def action(self, verb: str, resource: str, name: str, subresource: str) -> Obj:
        """Return the action ordered for a request, or an empty one, and count it."""
        asked = {"verb": verb, "resource": resource, "name": name, "subresource": subresource}
        for order in self._orders:
            match = order.get("match")
            # A match without a subresource means the object itself, not its log or exec.
            if match is not None and asked.items() >= ({"subresource": ""} | match).items() and _take(order):
                return dict(order["action"])
        return {}

    def exec(self) -> Obj:
        """Return the order for the exec that starts now, or an empty one, and count it."""
        return next((o for o in self._orders if "exec" in o and _take(o)), {})

    def rollout(self, workload: str) -> str:
        """Return what is ordered for a workload's pods: `never-ready`, `crash-loop` or nothing."""
        return next((str(o["rollout"]) for o in self._orders if "rollout" in o and o["name"] == workload), "")

    def denied(self, verb: str, group: str, resource: str) -> bool:
        """Return whether the caller has no right to this; `resource` may be `pods/exec`."""
        asked = {"verb": verb, "group": group, "resource": resource}
        return any(asked.items() >= o["deny"].items() for o in self._orders if "deny" in o)


def _take(order: dict[str, Any]) -> bool:
    left = order.get("times")
    if left is None:
        return True
    order["times"] = left - 1
    return bool(left > 0)
