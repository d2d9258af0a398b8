"""Partitions cover every key once and are of about the same work."""

from __future__ import annotations

from include.juicefs_storage.copy.partitions import PARTITION_OBJECTS, cut_partitions, task_groups
from include.juicefs_storage.copy.segments import Segment
from include.juicefs_storage.copy.survey import Survey
from include.juicefs_storage.objects.model import KeyRange
from tests.support.copy_fakes import ListingBucket, assert_covered


def test_big_objects_weigh_by_their_bytes() -> None:
    sizes = {f"a{number:04}": 1 for number in range(1000)} | {f"b{number}": 128 * 2**30 for number in range(8)}
    partitions = cut_partitions(Survey(ListingBucket(sizes)).run(KeyRange()), KeyRange())
    assert len(partitions) == 5
    assert_covered(partitions, sizes)
    assert max(partition.bytes for partition in partitions) <= 256 * 2**30 + 1000


def test_the_default_is_a_quarter_of_a_million_objects() -> None:
    segments = [Segment(f"{number:05}", 1000, 1) for number in range(2_001)]
    partitions = cut_partitions(segments, KeyRange())
    assert len(partitions) == 9
    assert max(partition.objects for partition in partitions) <= PARTITION_OBJECTS


def test_a_hostile_key_makes_no_template_of_a_label() -> None:
    (partition,) = cut_partitions([Segment("{{ 1/0 }}\n\u202e", 1, 1)], KeyRange())
    assert partition.label == "000 ?? 1/0 ???? 1 objects, 1 B"


def test_more_partitions_than_airflow_maps_share_tasks() -> None:
    partitions = cut_partitions([Segment(f"{number:05}", 250_000, 0) for number in range(4000)], KeyRange())
    grouped = task_groups(partitions)
    assert len(partitions) == 4000
    assert len(grouped) <= 1024
    assert [index for group in grouped for index in group] == list(range(4000))
    assert task_groups(partitions[:3]) == [[0], [1], [2]]
    assert task_groups([]) == []
