"""Whether the new store holds what the old one does."""

from __future__ import annotations

from dataclasses import replace

from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.ports import MetadataStore
from include.juicefs_storage.switch.findings import Finding, ok, refusal, warning
from include.juicefs_storage.switch.params import Consistency
from include.juicefs_storage.volume.difference import (
    Difference,
    Kind,
    compare_listings,
    compare_needed,
    compare_sample,
    files_of_examples,
)
from include.juicefs_storage.volume.setting import Setting

CHECK = "consistency"
SAMPLE_BLOCKS = 200
_HOW = {
    "sample": f"{SAMPLE_BLOCKS} blocks drawn at random, by content",
    "listing": "every block, by key and size",
    "metadata": "every block that files refer to, by key and size",
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
) -> tuple[list[Finding], Difference]:
    """Compare the blocks on the new store with those on the old one.

    A volume in use is always ahead of its copy. With `catch_up` a copy that is behind is a warning, since the rest is
    copied before the setting is written; a copy that was not made at all is a refusal.

    Args:
        source: The old bucket.
        target: The new bucket.
        setting: The volume's setting.
        metadata: Which blocks files refer to, and which slices the volume has given out.
        mode: `sample`: some blocks, by content. `listing`: all, by key and size. `metadata`: those that files refer to,
            by key and size; it sees what the old store has lost already. `content`: all, read on both sides.
        catch_up: Whether what is missing will be copied.
    """
    if mode == "off":
        return [warning(CHECK, "The stores were not compared.", "set consistency=listing")], Difference()
    if mode == "sample":
        difference = compare_sample(metadata, setting, source, target, SAMPLE_BLOCKS)
    elif mode == "metadata":
        difference = compare_needed(metadata, setting, source, target)
    else:
        difference = compare_listings(source, target, setting, contents=mode == "content")
    findings = [
        *_lost(difference, metadata),
        *_different(difference),
        *_missing(difference, catch_up=catch_up),
        *_foreign(difference, metadata),
    ]
    return findings or [ok(CHECK, f"{_HOW[mode]}: all {difference.expected} are the same on both stores")], difference


def _lost(difference: Difference, metadata: MetadataStore) -> list[Finding]:
    if not difference.lost:
        return []
    files = files_of_examples(replace(difference, examples=difference.examples_of("lost")), metadata)
    return [
        refusal(
            CHECK,
            f"{difference.lost} of {difference.expected} blocks that files refer to are not whole on the old store, "
            f"such as {_examples(difference, 'lost')}. Files of these: {', '.join(files) or 'not known'}.",
            "restore these files from elsewhere, or delete them; plan=metadata of juicefs_storage_sync names all",
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


def _missing(difference: Difference, *, catch_up: bool) -> list[Finding]:
    if not difference.missing:
        return []
    message = f"{difference.missing} of {difference.expected} blocks are not on the new store"
    examples = _examples(difference, "missing")
    if catch_up and difference.present:
        remedy = "they are copied before the setting is written (catch_up=true)"
        return [warning(CHECK, f"{message} yet, such as {examples}.", remedy)]
    return [refusal(CHECK, f"{message}, such as {examples}.", "copy the volume (see docs/switch.md), then start again")]


def _examples(difference: Difference, kind: Kind) -> str:
    return "; ".join(example.removeprefix(f"{kind}: ") for example in difference.examples_of(kind))


def _foreign(difference: Difference, metadata: MetadataStore) -> list[Finding]:
    """Blocks that only the new store has: of files deleted since the copy was made, or of another volume."""
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
