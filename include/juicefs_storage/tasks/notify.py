"""Notify people, with the Airflow notifier that connection `juicefs_notify` names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from airflow.sdk import BaseHook, BaseNotifier
from airflow.sdk.exceptions import AirflowNotFoundException

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.tasks.context import log

#: extra.notifier = class, extra.arguments = what it is made with; strings in there are templates.
NOTIFY_CONN_ID = "juicefs_notify"


class Notify(BaseNotifier):
    """Notify that something happened to a run. It never fails a run: errors are logged.

    Templates find `news.subject` (a line), `news.text` (the plan or the report, in Markdown), `news.url` (the task in
    the UI), and everything else that a task's context has. Without the connection nothing is sent.

    Args:
        event: What happened, where the report of the run does not say it.
        source: The task whose report and Markdown are sent.
    """

    def __init__(self, event: str, source: str = "finalize") -> None:
        super().__init__()
        self.event, self.source = event, source

    def notify(self, context: Any) -> None:
        """Hand the news to the notifier that the connection names."""
        try:
            try:
                extra = BaseHook.get_connection(NOTIFY_CONN_ID).extra_dejson
            except AirflowNotFoundException:
                return
            make_notifier(extra)({**context, "news": self.news(context)})
        except Exception:  # noqa: BLE001  a notifier of any kind, with errors of any kind
            log.exception("No notification was sent: %s.", self.event)

    def news(self, context: Any) -> dict[str, str]:
        """Put together what happened: a line, a text, an address."""
        ti = context["ti"]
        report = ti.xcom_pull(task_ids=self.source, key="report") or {}
        plan = ti.xcom_pull(task_ids="plan", key="return_value") or {}
        volume = f"volume {plan['volume']}: " if "volume" in plan else ""
        subject = f"{ti.dag_id}: {volume}{report.get('outcome') or self.event}"
        text = ti.xcom_pull(task_ids=self.source, key="markdown")
        return {"subject": subject, "text": text or subject, "url": str(getattr(ti, "log_url", "") or "")}


def make_notifier(extra: dict[str, Any]) -> BaseNotifier:
    """Make the notifier that a connection's extra describes.

    Raises:
        PermanentError: It names no notifier.
    """
    path, arguments = str(extra.get("notifier", "")), extra.get("arguments", {})
    module, _, name = path.rpartition(".")
    kind = getattr(import_module(module), name, None) if module else None
    if not (isinstance(kind, type) and issubclass(kind, BaseNotifier)):
        raise PermanentError(
            f"Connection {NOTIFY_CONN_ID!r}: expected an Airflow notifier's class as extra.notifier, found {path!r}.",
            next_step='for example {"notifier": "airflow.providers.smtp.notifications.smtp.SmtpNotifier", '
            '"arguments": {"to": "…", "subject": "{{ news.subject }}"}}',
        )
    notifier: BaseNotifier = kind(**arguments)
    return notifier
