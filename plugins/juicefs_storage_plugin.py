"""Links from the task instances of the storage DAGs to the plan and the report of their run, and the pages behind them.

A third page of each run, a tab of it in Airflow's UI, says what is so now (include/juicefs_storage/run_status.py).
Plan and report are the Markdown that the tasks leave in XCom `markdown`, also where they then fail. A fleet has one
page more: where each of its volumes stands now. Another, in the navigation, tells of each registered volume whether it
is ready to be switched: the last event of the rehearsal.
While a run works its note links to that page; then it says how the run ended, with the task that failed first and the
link to its report; also where a person marked the run, and no task could write a report.
"""

import hashlib
import html
import re
from base64 import b64encode
from functools import cached_property
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Literal

from airflow.listeners import hookimpl
from airflow.plugins_manager import AirflowPlugin
from airflow.sdk import BaseOperator, BaseOperatorLink
from airflow.sdk.types import TaskInstanceKey

from include.juicefs_storage import run_note
from include.juicefs_storage.failures import ERROR, LAST, Failure, first_failure, unreported_end
from include.juicefs_storage.markdown import one_line, table
from include.juicefs_storage.names import (
    CLIENTS,
    DAG_PREFIX,
    FLEET,
    PAGES,
    PROGRESS,
    READINESS,
    READINESS_LOOK_BACK,
    REHEARSAL,
    SWITCH,
    Page,
    fleet_url,
    page_url,
    run_url,
    volume_run_id,
)
from include.juicefs_storage.run_state import Row, Run, steps_of
from include.juicefs_storage.run_status import describe, first_failed
from include.juicefs_storage.run_steps import STEPS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from airflow.models.dagrun import DagRun
    from fastapi import FastAPI

TEMPLATE = Path(__file__).with_name("juicefs_storage_page.html")
#: What the page of a run has in it before its script has asked for the first time.
RUN_TEMPLATE = TEMPLATE.with_name("juicefs_storage_run.html")
SCRIPT = TEMPLATE.with_suffix(".js")
#: The pages that are Markdown.
Written = Literal["plan", "report"]

#: The tasks that write each page; a DAG has one of them.
WRITERS: dict[Written, tuple[str, ...]] = {"plan": ("plan", "plan_partitions"), "report": ("finalize",)}
#: The tasks that link to each page.
LINKED: dict[Written, frozenset[str]] = {
    "plan": frozenset({"plan", "plan_partitions", "choose_path", "approve", "decide", "finalize"}),
    "report": frozenset({"finalize"}),
}


def headers() -> dict[str, str]:
    """Return the headers of every answer. The script of the pages, as it is now, may run and fetch; no other may."""
    script = b64encode(hashlib.sha256(SCRIPT.read_bytes()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script}'; connect-src 'self'; "
        "frame-ancestors 'self'"
    )
    return {"Cache-Control": "no-store", "Content-Security-Policy": policy}


def page_link(page: Written, ti_key: TaskInstanceKey) -> str:
    """Return the page's URL, relative to the root of the UI; empty, so that no link shows, where the task has none."""
    if not ti_key.dag_id.startswith(DAG_PREFIX) or ti_key.task_id not in LINKED[page]:
        return ""
    return page_url(page, ti_key.dag_id, ti_key.run_id)


class FleetLink(BaseOperatorLink):
    """The link to where the volumes of a fleet stand."""

    name = "Volumes"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:  # noqa: ARG002
        """Return the link; empty for the tasks of other DAGs."""
        return fleet_url(ti_key.run_id) if ti_key.dag_id == FLEET else ""


class PlanLink(BaseOperatorLink):
    """The link to the plan."""

    name = "Plan"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:  # noqa: ARG002
        """See page_link."""
        return page_link("plan", ti_key)


class ReportLink(BaseOperatorLink):
    """The link to the report."""

    name = "Report"

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:  # noqa: ARG002
        """See page_link."""
        return page_link("report", ti_key)


def render_page(page: Written, dag_id: str, run_id: str, markdown: str | None) -> str:
    """Render a page; it says so where there is no Markdown yet. Nothing in the Markdown is taken as HTML."""
    if markdown is None:
        writer = " or ".join(f"`{task}`" for task in WRITERS[page])
        markdown = f"## No {page} yet\nTask {writer} writes it; in this run it has not done so."
    # Links of a plan or report are relative to the root of the UI, where its tasks show them too.
    markdown = re.sub(rf"\]\((?=dags/|{PAGES}/)", "](../../../../", markdown)
    return _run_html(page, dag_id, run_id, _rendered(markdown))


def render_run(dag_id: str, run_id: str) -> str:
    """Render the page of what is so now in a run; its script fills it."""
    return _run_html("run", dag_id, run_id, RUN_TEMPLATE.read_text(encoding="utf-8"))


def _run_html(page: Page, dag_id: str, run_id: str, body: str) -> str:
    """Put a page of a run together, with the links to its others. `body` is HTML."""
    current: dict[str, str] = {page: ' aria-current="page"'}
    tabs = "".join(f'<a href="{name}"{current.get(name, "")}>{name.capitalize()}</a>' for name in ("run", *WRITERS))
    run = f"../../../../{run_url(dag_id, run_id)}"
    return _html(
        f"{page.capitalize()} of {dag_id}",
        nav=f'<a href="{run}">← The run in Airflow</a>{tabs}',
        about=f"{html.escape(dag_id)} · {html.escape(run_id)}",
        body=body,
    )


def _html(title: str, *, nav: str, about: str, body: str) -> str:
    """Put a whole page together. `nav`, `about` and `body` are HTML."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title), nav=nav, about=about, body=body, script=SCRIPT.read_text(encoding="utf-8")
    )


def _rendered(markdown: str) -> str:
    """Render Markdown that is not trusted."""
    from markdown_it import MarkdownIt

    return str(MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(markdown))


def render_volumes(events: "Sequence[tuple[Mapping[str, Any], str | None]]") -> str:
    """Render the page of the volumes.

    Args:
        events: What each event of the asset says (`switch/readiness.py` describes it), the latest first, and its run.
    """
    last: dict[str, tuple[Mapping[str, Any], str | None]] = {}
    for event, run_id in events:
        if "volume" in event:
            last.setdefault(str(event["volume"]), (event, run_id))
    lines = ["## Ready to be switched"]
    if not last:
        lines.append(
            f"No volume was rehearsed yet. Register volumes in `include/volumes.yaml`; `{REHEARSAL}` does the rest."
        )
    else:
        latest = sorted(last.items(), key=lambda item: (bool(item[1][0].get("ready")), item[0]))
        rows = [_readiness_row(volume, event, run_id) for volume, (event, run_id) in latest]
        lines += table(["volume", "", "since", "newest backup", "rehearsed"], rows)
    for volume, (event, _) in sorted(last.items()):
        if blockers := event.get("blockers"):
            lines += ["", f"### What blocks {volume}", *(f"- {one_line(str(blocker))}" for blocker in blockers)]
    if last:
        lines += ["", "To go back to a backup, give its id to `juicefs_storage_revert`."]
    # No way back to Airflow: the page stands inside of its UI.
    return _html("JuiceFS volumes", nav="", about=REHEARSAL, body=_rendered("\n".join(lines)))


def _readiness_row(volume: str, event: "Mapping[str, Any]", run_id: str | None) -> list[str]:
    # The page is one level above the pages of the runs.
    report = page_url("report", REHEARSAL, run_id or "").removeprefix(f"{PAGES}/")
    backup = f"`{event['backup_id']}`, {_minute(event.get('backup_at'))}" if event.get("backup_id") else "none"
    state = "ready" if event.get("ready") else "**not ready**"
    return [volume, state, _minute(event.get("since")), backup, f"[{_minute(event.get('rehearsed_at'))}]({report})"]


def render_fleet(run_id: str, planned: "Mapping[str, Any] | None", runs: "Mapping[str, tuple[str, str]]") -> str:
    """Render the page of a fleet's volumes.

    Args:
        run_id: Of the fleet's run.
        planned: What its task `plan` left in XCom (`fleet/plan.py` describes it); None where it has not yet.
        runs: Of each volume's run that exists: id -> its state and its note.
    """
    lines = ["## Where the volumes are"]
    waves = (planned or {}).get("waves") or []
    if planned is None:
        lines.append("There is no plan yet: task `plan` writes it when the dry runs have ended.")
    elif not waves:
        lines.append("No volume is to be moved: see the plan.")
    else:
        rows = [_fleet_row(number, key, run_id, runs) for number, wave in enumerate(waves) for key in wave]
        lines += table(["wave", "volume", "run", "how it ended"], rows)
    fleet = f"../../{run_url(FLEET, run_id)}"
    nav = f'<a href="{fleet}">← The run in Airflow</a>'
    return _html(
        "Volumes of a fleet", nav=nav, about=html.escape(f"{FLEET} · {run_id}"), body=_rendered("\n".join(lines))
    )


def _fleet_row(number: int, key: str, run_id: str, runs: "Mapping[str, tuple[str, str]]") -> list[str]:
    own = volume_run_id(run_id, key)
    state, note = runs.get(own, ("not started", ""))
    shown = f"[{state}](../../{run_url(SWITCH, own)})" if own in runs else state
    ended, cause = run_note.read_end(note)
    parts = [ended, cause.replace("](dags/", "](../../dags/")]
    return [str(number or "canary"), key, shown, " ".join(filter(None, parts))]


def _minute(moment: object) -> str:
    """Format a time of an event (ISO 8601, UTC) for people."""
    return f"{str(moment)[:16].replace('T', ' ')} UTC"


class RunNote:
    """Writes into a run's note where to look at it, and how it ended, whoever ended it.

    The scheduler calls this, or the API server where a person marks the run, in the transaction in which it writes the
    run's state: it commits, and nothing here may. A session of its own would wait for that transaction's locks.
    """

    @hookimpl
    def on_dag_run_running(self, dag_run: "DagRun") -> None:
        """See above."""
        if dag_run.dag_id.startswith(DAG_PREFIX):
            page = page_url("run", dag_run.dag_id, dag_run.run_id)
            dag_run.note = run_note.with_now(dag_run.note or "", page)

    @hookimpl
    def on_dag_run_success(self, dag_run: "DagRun") -> None:
        """See above."""
        _note_end(dag_run, "success")

    @hookimpl
    def on_dag_run_failed(self, dag_run: "DagRun") -> None:
        """See above."""
        _note_end(dag_run, "failed")


def _note_end(dag_run: "DagRun", how: str) -> None:
    if not dag_run.dag_id.startswith(DAG_PREFIX):
        return
    from airflow.models.taskinstance import TaskInstance
    from airflow.models.xcom import XComModel
    from sqlalchemy import select
    from sqlalchemy.orm import object_session

    if (session := object_session(dag_run)) is None:
        return
    dag_id, run_id = dag_run.dag_id, dag_run.run_id
    of_this_run = (TaskInstance.dag_id == dag_id, TaskInstance.run_id == run_id)
    instances = session.scalars(select(TaskInstance).where(*of_this_run).order_by(TaskInstance.end_date)).all()

    def xcoms(key: str, *task_ids: str) -> dict[tuple[str, int], Any]:
        query = XComModel.get_many(run_id=run_id, dag_ids=dag_id, task_ids=task_ids or None, key=key)
        rows: Sequence[Any] = session.scalars(query).all()
        return {(row.task_id, row.map_index): XComModel.deserialize_value(row) for row in rows}

    states = {instance.task_id: str(instance.state or "none") for instance in instances}
    said = xcoms("note", LAST).get((LAST, -1))
    reported = said is not None and states.get(LAST) in {"success", "failed"}
    if not reported:
        results = {task_id: value for (task_id, _), value in xcoms("return_value", "plan", "resolve_params").items()}
        said = unreported_end(dag_id, how, states, results, results.get("resolve_params") or {})
    errors = xcoms(ERROR)
    failed = [
        Failure.of(dag_id, run_id, *instance, errors.get(instance, {}))
        for instance in [(each.task_id, each.map_index) for each in instances if str(each.state) == "failed"]
    ]
    first = first_failure(failed, [instance.task_id for instance in instances]) if how == "failed" else None
    failure = first.to_markdown() if first else ""
    dag_run.note = run_note.with_end(dag_run.note or "", str(said), page_url("report", dag_id, run_id), failure)


def run_now(session: Any, dag_id: str, run_id: str) -> "dict[str, Any] | None":
    """Read what is so in a run, by four queries whatever its size; None where there is no such run of ours.

    Args:
        session: Of the database.
        dag_id: The DAG.
        run_id: The run.
    """
    from airflow.models.dagrun import DagRun
    from airflow.models.taskinstance import TaskInstance as Instance
    from airflow.models.xcom import XComModel
    from sqlalchemy import and_, func, or_, select

    about = select(DagRun.state, DagRun.start_date, DagRun.end_date)
    run = session.execute(about.where(DagRun.dag_id == dag_id, DagRun.run_id == run_id)).first()
    if run is None or dag_id not in STEPS:
        return None
    times = func.min(Instance.start_date), func.max(Instance.end_date)
    counts = func.count(), func.max(Instance.try_number), *times, func.min(Instance.map_index)
    grouped = select(Instance.task_id, Instance.state, *counts).group_by(Instance.task_id, Instance.state)
    rows = session.execute(grouped.where(Instance.dag_id == dag_id, Instance.run_id == run_id))
    steps = steps_of(dag_id, [Row(task_id, str(was or "none"), *rest) for task_id, was, *rest in rows])

    def xcoms(*where: Any) -> list[tuple[str, int, str, Any]]:
        # Columns and not objects, each of which would bring its run along.
        query = select(XComModel.task_id, XComModel.map_index, XComModel.key, XComModel.value)
        found = session.execute(query.where(XComModel.dag_id == dag_id, XComModel.run_id == run_id, *where))
        return [(row.task_id, row.map_index, row.key, XComModel.deserialize_value(row)) for row in found]

    key, task = XComModel.key, XComModel.task_id
    failed = first_failed(steps) or ("", -1)
    left = xcoms(
        or_(
            and_(key == "return_value", task.in_(["resolve_params", "plan"])),
            and_(key == "note", task == LAST),
            and_(key == ERROR, task == failed[0], XComModel.map_index == failed[1]),
        )
    )
    progress: dict[str, list[dict[str, Any]]] = {}
    clients: dict[str, list[dict[str, Any]]] = {}
    for task_id, _, name, value in xcoms(key.in_([PROGRESS, CLIENTS])):
        if name == CLIENTS:
            clients[task_id] = value
        else:
            progress.setdefault(task_id, []).append(value)
    results = {task_id: value for task_id, _, name, value in left if name == "return_value"}
    note = next((str(value) for _, _, name, value in left if name == "note"), "")
    errors = {(task_id, index): value for task_id, index, name, value in left if name == ERROR}
    ran = run.start_date, run.end_date
    return describe(Run(dag_id, run_id, str(run.state), steps, results, note, errors, progress, clients, *ran))


def _add_pages_of_runs(app: "FastAPI") -> None:
    from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
    from airflow.api_fastapi.common.db.common import SessionDep
    from airflow.api_fastapi.core_api.security import requires_access_dag
    from airflow.models.xcom import XComModel
    from fastapi import Depends
    from fastapi.responses import HTMLResponse, JSONResponse

    readable = Depends(requires_access_dag("GET", DagAccessEntity.XCOM))

    # These before the pages, whose names are checked.
    @app.get("/runs/{dag_id}/{run_id}/run", dependencies=[readable])
    def run(dag_id: str, run_id: str) -> HTMLResponse:
        # Airflow shows the tab in the runs of every DAG.
        if dag_id in STEPS:
            return HTMLResponse(render_run(dag_id, run_id), headers=headers())
        text = f"<p>This page is for the runs of {html.escape(', '.join(STEPS))}.</p>"
        return HTMLResponse(_html("Not a storage run", nav="", about="", body=text), status_code=404, headers=headers())

    @app.get("/runs/{dag_id}/{run_id}/status", dependencies=[readable])
    def status(dag_id: str, run_id: str, session: SessionDep) -> JSONResponse:
        found = run_now(session, dag_id, run_id)
        return JSONResponse(found or {}, status_code=200 if found else 404, headers=headers())

    # One query for all tasks, some hundred bytes each.
    @app.get("/runs/{dag_id}/{run_id}/progress", dependencies=[readable])
    def progress(dag_id: str, run_id: str, session: SessionDep) -> JSONResponse:
        rows: Sequence[Any] = session.scalars(XComModel.get_many(run_id=run_id, dag_ids=dag_id, key=PROGRESS)).all()
        tasks = [
            {"task_id": row.task_id, "map_index": row.map_index, **XComModel.deserialize_value(row)} for row in rows
        ]
        return JSONResponse({"tasks": tasks}, headers=headers())

    @app.get("/runs/{dag_id}/{run_id}/{page}", dependencies=[readable])
    def show(dag_id: str, run_id: str, page: Written, session: SessionDep) -> HTMLResponse:
        query = XComModel.get_many(run_id=run_id, dag_ids=dag_id, task_ids=WRITERS[page], key="markdown", limit=1)
        found = session.scalars(query).first()
        markdown = str(XComModel.deserialize_value(found)) if found else None
        content = render_page(page, dag_id, run_id, markdown)
        return HTMLResponse(content, status_code=200 if found else 404, headers=headers())


def make_app() -> "FastAPI":
    """Make the web application of the pages: GET /runs/{dag_id}/{run_id}/run, …/plan and …/report, /fleets/…, /volumes.

    And of JSON: …/status, what the page of a run shows (run_status.py); …/progress, how far each long task of a run is
    (`Progress` in objects/progress.py).

    Whoever may read the DAG's XComs may read them; 401 or 403 for everybody else, 404 where there is no such page yet.
    This and RunNote are the only places that know Airflow's own tables and API internals.
    """
    from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
    from airflow.api_fastapi.common.db.common import SessionDep
    from airflow.api_fastapi.core_api.security import requires_access_dag
    from airflow.models.asset import AssetEvent, AssetModel
    from airflow.models.dagrun import DagRun
    from airflow.models.xcom import XComModel
    from fastapi import Depends, FastAPI
    from fastapi.responses import HTMLResponse
    from sqlalchemy import select

    app = FastAPI(title="JuiceFS storage", docs_url=None, redoc_url=None, openapi_url=None)
    _add_pages_of_runs(app)

    # What is shown of the volumes' runs, the state and the outcome, is in the fleet's own report at its end.
    @app.get("/fleets/{run_id}", dependencies=[Depends(requires_access_dag("GET", DagAccessEntity.XCOM, FLEET))])
    def fleet(run_id: str, session: SessionDep) -> HTMLResponse:
        query = XComModel.get_many(run_id=run_id, dag_ids=FLEET, task_ids=WRITERS["plan"], key="planned", limit=1)
        found = session.scalars(query).first()
        planned = XComModel.deserialize_value(found) if found else None
        keys = [volume_run_id(run_id, key) for wave in (planned or {}).get("waves", []) for key in wave]
        rows = session.scalars(select(DagRun).where(DagRun.dag_id == SWITCH, DagRun.run_id.in_(keys)))
        runs = {row.run_id: (str(row.state), row.note or "") for row in rows}
        return HTMLResponse(render_fleet(run_id, planned, runs), headers={**headers(), "Refresh": "15"})

    # What the rehearsal found out is in the XComs of its DAG too: the same people may read it.
    @app.get("/volumes", dependencies=[Depends(requires_access_dag("GET", DagAccessEntity.XCOM, REHEARSAL))])
    def volumes(session: SessionDep) -> HTMLResponse:
        query = (
            select(AssetEvent.extra, AssetEvent.source_run_id)
            .join(AssetModel, AssetModel.id == AssetEvent.asset_id)
            .where(AssetModel.name == READINESS)
            .order_by(AssetEvent.timestamp.desc())
            .limit(READINESS_LOOK_BACK)
        )
        return HTMLResponse(render_volumes([(row[0], row[1]) for row in session.execute(query)]), headers=headers())

    return app


class JuiceFSStoragePlugin(AirflowPlugin):
    """What Airflow loads."""

    name = "juicefs_storage"
    # Global links are worked out by the API server when the UI asks. An operator's own links are stored by the task's
    # process when it ends: too late for an approval that waits, and never where the process was killed.
    global_operator_extra_links = [PlanLink(), ReportLink(), FleetLink()]  # noqa: RUF012  (declared by Airflow)

    listeners = [RunNote()]  # noqa: RUF012  (declared by Airflow)

    external_views = [  # noqa: RUF012  (declared by Airflow)
        {
            "name": "Volumes",
            "href": f"{PAGES}/volumes",
            "destination": "nav",
            "url_route": "juicefs-volumes",
        },
        {
            "name": "Storage",
            "href": f"{PAGES}/runs/{{DAG_ID}}/{{RUN_ID}}/run",
            "destination": "dag_run",
            "url_route": "juicefs-run",
        },
    ]

    @cached_property
    def fastapi_apps(self) -> list[dict[str, Any]]:  # type: ignore[override]  # a list in the base class
        """Made when the API server asks: every process loads plugins, and these imports take more than a second."""
        return [{"app": make_app(), "url_prefix": f"/{PAGES}", "name": "JuiceFS storage"}]
