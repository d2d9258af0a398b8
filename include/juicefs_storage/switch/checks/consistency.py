"""Whether the new store holds what the old one does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.ports import MetadataStore
from include.juicefs_storage.switch.change import TWO_STORES, Change
from include.juicefs_storage.switch.findings import Finding, ok, refusal, warning
from include.juicefs_storage.switch.params import Consistency
from include.juicefs_storage.volume.block_contents import BlockContents, How
from include.juicefs_storage.volume.difference import (
    EXAMPLES,
    Difference,
    Kind,
    compare_blocks,
    compare_sample,
    files_of,
    lost_blocks,
    missing_blocks,
)
from include.juicefs_storage.volume.layout import ObjectSizes
from include.juicefs_storage.volume.setting import Setting

CHECK = "consistency"
_NOT_COMPARED = warning(CHECK, "The stores were not compared.", "set consistency=listing")
SAMPLE_BLOCKS = 200
_COPY_AGAIN = "where the old store has them whole, remove these objects from the new one and copy them again; else "
#: What tells that a block is whole, see `BlockContents`.
_BY: Mapping[How, str] = {
    "checksum": "the checksum that JuiceFS left with each",
    "decompressed": "decompression alone",
    "length": "their length alone",
}
_HOW = {
    "sample": f"{SAMPLE_BLOCKS} blocks drawn at random, by content",
    "listing": "every block, by key and size",
    "metadata": "every block that files refer to, by key and size",
    "target": "every block that files refer to, by key and size",
    "target_content": "every block that files refer to, by content",
    "content": "every block, by content",
}


def check_consistency(
    source: Bucket,
    target: Bucket,
    setting: Setting,
    metadata: MetadataStore,
    *,
    mode: Consistency,
    catch_up: bool,
    change: Change = TWO_STORES,
    accept_lost: int = 0,
    new_bucket: bool = False,
) -> tuple[list[Finding], Difference]:
    """Compare the blocks on the new store with those on the old one, and the old store with the metadata.

    Where there is one store alone, by the kind of change or by `mode`, it is compared with the metadata, and read where
    `mode` asks for contents. A store that the clients keep is not read: nothing is copied there.

    A volume in use is always ahead of its copy. With `catch_up` a copy that is behind is a warning, since the rest is
    copied before the setting is written; a copy that was not made at all is a refusal. In every mode a block that files
    refer to and the old store does not hold whole is a refusal: the proofs after the cut-over would miss it.

    Args:
        source: The old bucket.
        target: The new bucket.
        setting: The volume's setting.
        metadata: Which blocks files refer to, and which slices the volume has given out.
        mode: What is compared with the new store: see the param `consistency`.
        change: How the storage changes.
        catch_up: Whether what is missing will be copied.
        accept_lost: How many lost blocks the operator accepts.
        new_bucket: The new bucket will be made by the run: that all is missing there is no copy that was forgotten.

    Returns:
        The findings, and the difference; `lost_keys` holds every block that is lost where these are accepted.
    """
    read = mode in {"content", "target_content"} and not change.one_store
    contents = BlockContents(target, ObjectSizes.of(setting)) if read else None
    if not change.copies:
        return _compare_only_store(metadata, setting, target, change, accept_lost, contents)
    if mode not in {"target", "target_content"}:
        return _compare_both(source, target, setting, metadata, mode, catch_up, accept_lost, new_bucket)
    alone = missing_blocks(metadata, setting, target, keep_lost=max(accept_lost, EXAMPLES), contents=contents)
    damaged = _lost(alone, metadata, accept_lost, "the new store", _COPY_AGAIN)
    if alone.lost > accept_lost or not (alone.missing or alone.different):
        return [*(damaged or [_all_there(alone, "the new store", contents)]), *_untold(contents)], alone
    # Only the old store tells which of those that are not there are lost.
    accept_lost -= alone.lost
    findings, both = _compare_both(source, target, setting, metadata, "metadata", catch_up, accept_lost, new_bucket)
    lost_keys = [*alone.lost_keys, *both.lost_keys]
    return [*damaged, *_untold(contents), *findings], replace(both, lost=alone.lost + both.lost, lost_keys=lost_keys)


def _compare_both(
    source: Bucket,
    target: Bucket,
    setting: Setting,
    metadata: MetadataStore,
    mode: Consistency,
    catch_up: bool,
    accept_lost: int,
    new_bucket: bool,
) -> tuple[list[Finding], Difference]:
    try:
        compared = compare_blocks(
            metadata, setting, source, target,
            others=mode in {"listing", "content"}, contents=mode == "content", keep_lost=max(accept_lost, EXAMPLES),
        )  # fmt: skip
    except StorageSwitchError as error:
        if mode != "off":
            raise
        problem = f"The old store was not compared with the metadata: {error.problem}"
        return [_NOT_COMPARED, warning(CHECK, problem, error.next_step)], Difference()
    lost = _lost(compared, metadata, accept_lost, "the old store")
    if mode == "off":
        return [_NOT_COMPARED, *lost], compared
    sampled = mode == "sample"
    difference = compare_sample(metadata, setting, source, target, SAMPLE_BLOCKS) if sampled else compared
    findings = [*_different(difference), *_missing(difference, catch_up=catch_up, new_bucket=new_bucket)]
    findings += _foreign(difference, metadata)
    if not findings and not any(finding.level == "refusal" for finding in lost):
        findings = [ok(CHECK, f"{_HOW[mode]}: all {difference.present} are the same on both stores")]
    return [*lost, *findings], replace(difference, lost=compared.lost, lost_keys=compared.lost_keys)


def _compare_only_store(
    metadata: MetadataStore,
    setting: Setting,
    target: Bucket,
    change: Change,
    accept_lost: int,
    contents: BlockContents | None,
) -> tuple[list[Finding], Difference]:
    difference = lost_blocks(metadata, setting, target, max(accept_lost, EXAMPLES), contents)
    where = "the new store" if change.kind == "moved" else "the store"
    findings = _lost(difference, metadata, accept_lost, where) or [_all_there(difference, where, contents)]
    if change.kind == "moved":
        told = f"The old store does not serve, the new one was compared with the metadata alone. {change.why}"
        remedy = "if the old store only fails for now, bring it back and plan again: then both are compared"
        findings = [warning(CHECK, told, remedy), *findings]
    return [*findings, *_untold(contents)], difference


def _all_there(difference: Difference, where: str, contents: BlockContents | None) -> Finding:
    """Say that every block is there, and what tells it."""
    if contents is None:
        return ok(CHECK, f"{_HOW['target']}: all {difference.present} are on {where}")
    told_by = ", ".join(f"{contents.told_by[how]} by {by}" for how, by in _BY.items() if contents.told_by[how])
    return ok(CHECK, f"{_HOW['target_content']}: all {difference.present} are whole on {where}: {told_by or 'none'}")


def _untold(contents: BlockContents | None) -> list[Finding]:
    """Warn of blocks that were read, and whose contents nothing tells."""
    if contents is None or not (untold := contents.told_by["length"]):
        return []
    return [
        warning(
            CHECK,
            f"{untold} blocks were read in full and have their length; whether their content is right nothing tells: "
            "they have no checksum of JuiceFS's, as what some tools copied has none.",
            "compare with the old store where it serves (consistency=content)",
        )
    ]


def _lost(difference: Difference, metadata: MetadataStore, accepted: int, where: str, first: str = "") -> list[Finding]:
    if not difference.lost:
        return []
    files = ", ".join(files_of(difference.lost_keys, metadata)[:EXAMPLES]) or "not known"
    found = (
        f"{difference.lost} blocks that files refer to are not whole on {where}, such as "
        f"{_examples(difference, 'lost')}. Files of these: {files}."
    )
    if difference.lost <= accepted:
        return [warning(CHECK, f"{found} accept_lost_blocks={accepted} accepts them.", "they stay lost: see the files")]
    given = f"; accept_lost_blocks={accepted} accepts fewer" if accepted else ""
    return [
        refusal(
            CHECK,
            f"{found[:-1]}{given}.",
            f"{first}restore these files from elsewhere, or delete them; or accept the loss with "
            f"accept_lost_blocks={difference.lost}; plan=metadata of juicefs_storage_sync names all",
        )
    ]


def _different(difference: Difference) -> list[Finding]:
    if not difference.different:
        return []
    return [
        refusal(
            CHECK,
            f"{difference.different} of {difference.expected} blocks differ on the new store, such as "
            f"{_examples(difference, 'different')}.",
            "find out what wrote them; nothing here overwrites an object that differs",
        )
    ]


def _missing(difference: Difference, *, catch_up: bool, new_bucket: bool) -> list[Finding]:
    if not difference.missing:
        return []
    message = f"{difference.missing} of {difference.expected} blocks are not on the new store"
    examples = _examples(difference, "missing")
    if catch_up and (difference.present or new_bucket):
        remedy = "they are copied before the setting is written (catch_up=true)"
        return [warning(CHECK, f"{message} yet, such as {examples}.", remedy)]
    return [refusal(CHECK, f"{message}, such as {examples}.", "copy the volume (see docs/switch.md), then start again")]


def _examples(difference: Difference, kind: Kind) -> str:
    return "; ".join(example.removeprefix(f"{kind}: ") for example in difference.examples_of(kind))


def _foreign(difference: Difference, metadata: MetadataStore) -> list[Finding]:
    """Check blocks that only the new store has: of files deleted since the copy was made, or of another volume."""
    if not difference.extra:
        return []
    slice_id, key = difference.newest_extra
    # Read after the listing: an id that was given out meanwhile is below it.
    if slice_id >= (given_out := metadata.next_slice()):
        return [
            refusal(
                CHECK,
                f"{key} on the new store is not this volume's: it has given out no slice {slice_id} yet, only those "
                f"below {given_out}. Another volume of the same name would write to the same keys.",
                "choose a bucket where the prefix holds this volume's copy alone",
            )
        ]
    if difference.extra > difference.present:
        return [
            warning(
                CHECK,
                f"{difference.extra} blocks are on the new store only, more than the {difference.present} that both "
                f"have, such as {key}.",
                "is this the copy of this volume? Blocks of files deleted since it was made are harmless",
            )
        ]
    return []
