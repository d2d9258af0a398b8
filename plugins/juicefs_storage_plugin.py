"""Links from the task instances of the storage DAGs to the plan and the report of their run, and the pages behind them.

Both are the Markdown that the tasks leave in XCom `markdown`, also where they then fail.
"""

import html
from functools import cached_property
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from airflow.plugins_manager import AirflowPlugin
from airflow.sdk import BaseOperator, BaseOperatorLink
from airflow.sdk.types import TaskInstanceKey

if TYPE_CHECKING:
    from fastapi import FastAPI

DAG_PREFIX = "juicefs_storage_"
URL_PREFIX = "/juicefs-storage"
TEMPLATE = Path(__file__).with_name("juicefs_storage_page.html")

Page = Literal["plan", "report"]
#: The task that writes each page.
WRITERS: dict[Page, str] = {"plan": "plan", "report": "finalize"}
#: The tasks that link to each page.
LINKED: dict[Page, frozenset[str]] = {
    "plan": frozenset({"plan", "choose_path", "approve", "decide", "finalize"}),
    "report": frozenset({"finalize"}),
}


def page_url(page: Page, ti_key: TaskInstanceKey) -> str:
    """The page's URL, relative to the root of the UI; empty, so that no link shows, where the task has none."""
    if not ti_key.dag_id.startswith(DAG_PREFIX) or ti_key.task_id not in LINKED[page]:
        return ""
    # Without a leading slash: the UI resolves it against its base, which may be below a prefix.
    return f"{URL_PREFIX[1:]}/runs/{quote(ti_key.dag_id, safe='')}/{quote(ti_key.run_id, safe='')}/{page}"


class PlanLink(BaseOperatorLink):
    """The link to the plan."""

    name = "Plan"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:  # noqa: ARG002
        """See page_url."""
        return page_url("plan", ti_key)


class ReportLink(BaseOperatorLink):
    """The link to the report."""

    name = "Report"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:  # noqa: ARG002
        """See page_url."""
        return page_url("report", ti_key)


def render_page(page: Page, dag_id: str, run_id: str, markdown: str | None) -> str:
    """The HTML of a page; says so where there is no Markdown yet. Nothing in the Markdown is taken as HTML."""
    from markdown_it import MarkdownIt

    if markdown is None:
        markdown = f"## No {page} yet\nTask `{WRITERS[page]}` writes it; in this run it has not done so."
    current = {page: ' aria-current="page"'}
    tabs = "".join(f'<a href="{name}"{current.get(name, "")}>{name.capitalize()}</a>' for name in WRITERS)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=page.capitalize(),
        dag_id=html.escape(dag_id),
        run_id=html.escape(run_id),
        dag_path=quote(dag_id, safe=""),
        run_path=quote(run_id, safe=""),
        tabs=tabs,
        body=MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(markdown),
    )


def make_app() -> "FastAPI":
    """The web application of the pages: GET /runs/{dag_id}/{run_id}/plan and …/report.

    Who may read the DAG's XComs may read them; 401 or 403 for everybody else, 404 where there is no such page yet.
    The only place that knows Airflow's own tables and API internals.
    """
    from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
    from airflow.api_fastapi.common.db.common import SessionDep
    from airflow.api_fastapi.core_api.security import requires_access_dag
    from airflow.models.xcom import XComModel
    from fastapi import Depends, FastAPI
    from fastapi.responses import HTMLResponse

    app = FastAPI(title="JuiceFS storage", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/runs/{dag_id}/{run_id}/{page}", dependencies=[Depends(requires_access_dag("GET", DagAccessEntity.XCOM))])
    def show(dag_id: str, run_id: str, page: Page, session: SessionDep) -> HTMLResponse:
        query = XComModel.get_many(run_id=run_id, dag_ids=dag_id, task_ids=WRITERS[page], key="markdown", limit=1)
        found = session.scalars(query).first()
        markdown = str(XComModel.deserialize_value(found)) if found else None
        return HTMLResponse(
            render_page(page, dag_id, run_id, markdown),
            status_code=200 if found else 404,
            headers={
                "Cache-Control": "no-store",
                "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'self'",
            },
        )

    return app


class JuiceFSStoragePlugin(AirflowPlugin):
    """What Airflow loads."""

    name = "juicefs_storage"
    # Global links are worked out by the API server when the UI asks. An operator's own links are stored by the task's
    # process when it ends: too late for an approval that waits, and never where the process was killed.
    global_operator_extra_links = [PlanLink(), ReportLink()]  # noqa: RUF012  (declared by Airflow)

    @cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:  # type: ignore[override]  # a list in the base class
        """Made when the API server asks: every process loads plugins, and these imports take more than a second."""
        return [{"app": make_app(), "url_prefix": URL_PREFIX, "name": "JuiceFS storage"}]
