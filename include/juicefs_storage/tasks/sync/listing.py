"""List the source for the plan: in `check` alone where that suffices, else in several tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.copy.partitions import amount
from include.juicefs_storage.copy.segments import Ruler, Segment, most_segments
from include.juicefs_storage.copy.survey import ALONE_CALLS, Survey, share_out
from include.juicefs_storage.names import COPY_POOL
from include.juicefs_storage.objects.merge import key_filter
from include.juicefs_storage.objects.progress import EVERY_S, Status
from include.juicefs_storage.tasks.context import log, pull, push, run_id
from include.juicefs_storage.tasks.progress import Publisher
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.sync.folder import manifests_folder
from include.juicefs_storage.tasks.sync.runtime import RETRIES, TASKS, SyncRuntime
from include.juicefs_storage.tasks.sync.steering import steer

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.listing_files import ListingFiles
    from include.juicefs_storage.adapters.s3.store import S3Store

#: Tasks that list what `check` leaves. More than work at once: fast workers take more of them, and what a killed one
#: had done is little.
PLANNERS = min(256, 2 * TASKS)
_LISTING = "listing"


def begin_listing(params: SyncParams, source: S3Store) -> list[dict[str, Any]]:
    """List the source, up to ALONE_CALLS requests, and share out the rest.

    Args:
        params: With `planners` everything is shared out.
        source: Only listed.

    Returns:
        For each task that lists a share: which one, and its name in the grid; none where all is listed.
    """
    from include.juicefs_storage.adapters.s3.bucket import S3Bucket

    # Its own: where the listing begins again, tasks of this one may still run.
    folder = f"listing-{uuid4().hex[:12]}"
    files = _files(folder)
    with _steered(params, "check", 1) as how:
        survey = _survey(params, source, most_calls=0 if params.planners else ALONE_CALLS, **how)
        survey.run(params.keys)
        shares = []
        if survey.left:
            shares = share_out(S3Bucket(source), survey.left, params.planners or PLANNERS, survey.await_resumed)
    survey.ruler.shrink(most_segments(len(shares)))
    files.write(0, survey.calls, survey.ruler.segments())
    if shares:
        files.write_shares(shares)
        log.info("Listed %s; %d tasks list the rest.", amount(survey.objects, survey.bytes), len(shares))
    push(_LISTING, {"folder": folder, "shares": len(shares)})
    return [
        {"folder": folder, "number": number, "shares": len(shares), "label": f"{number} of {len(shares)}"}
        for number in range(1, len(shares) + 1)
    ]


@runbook_task(
    pool=COPY_POOL,
    max_active_tis_per_dagrun=TASKS,
    map_index_template="{{ task.op_kwargs['share']['label'] }}",
    execution_timeout=None,  # it may be paused
    **RETRIES,
)
def list_source(share: dict[str, Any]) -> dict[str, Any]:
    """List a share of the source for the plan: ranges of keys from all over it, sixteen requests at once.

    **Changes** nothing on either store. **Safe to clear**: yes, with Downstream: the share is listed again.
    """
    params = SyncParams.model_validate(pull("check", "params"))
    source, _ = SyncRuntime(params).stores()
    files = _files(share["folder"])
    with _steered(params, "list_source", share["shares"]) as how:
        survey = _survey(params, source, ruler=Ruler(most_segments(share["shares"])), **how)
        segments = survey.run(*files.share(share["number"]))
    files.write(share["number"], survey.calls, segments)
    log.info("Listed %s with %d requests.", amount(survey.objects, survey.bytes), survey.calls)
    return {"objects": survey.objects, "bytes": survey.bytes, "requests": survey.calls}


def read_listing() -> tuple[list[Segment], int]:
    """Join what `check` and `list_source` found: segments in order, and LIST requests.

    Raises:
        PermanentError: Some of it is not there.
    """
    listing = pull("check", _LISTING)
    requests, segments = _files(listing["folder"]).read(listing["shares"])
    return segments, requests


def _files(folder: str) -> ListingFiles:
    from include.juicefs_storage.adapters.listing_files import ListingFiles

    return ListingFiles(manifests_folder(run_id()) / folder)


def _survey(params: SyncParams, source: S3Store, **options: Any) -> Survey:
    from include.juicefs_storage.adapters.s3.bucket import S3Bucket

    return Survey(S3Bucket(source), key_filter(params.include, params.exclude), **options)


@contextmanager
def _steered(params: SyncParams, task_id: str, tasks: int) -> Iterator[dict[str, Any]]:
    """Tell how far a survey is while the block lasts, and pause it where the Variable says so; yields its options.

    Args:
        params: Of the run.
        task_id: The task that lists.
        tasks: How many instances it has.
    """
    steering = steer(params, task_id, tasks)
    status = Status("Listing of the source", flow=steering.flow, every_s=EVERY_S, publish=Publisher(steering.every_s))
    with status.told(steering.look):
        yield {"told": status.count, "await_resumed": steering.flow.await_resumed}
