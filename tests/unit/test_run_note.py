from __future__ import annotations

from include.juicefs_storage.run_note import LENGTH, End, read_end, with_end, with_now


def test_our_lines_replace_each_other_and_what_a_person_wrote_stays() -> None:
    assert with_end("", "planned.", "x") == "**[Outcome](x)**: planned."
    ended = "CHG-1\n\n**[plan](dags/d) failed**: Broken.\n\n**[Outcome](x)**: refused.\n\nstarted by Kim"
    again = with_now(ended, "page")
    assert again == "CHG-1\n\nstarted by Kim\n\n**[Now](page)**: what the run does, and whether it is safe to abort"
    assert with_end(again, "switched,\n`a`", "y") == "CHG-1\n\nstarted by Kim\n\n**[Outcome](y)**: switched, `a`"


def test_a_note_without_room_stays_as_it_is() -> None:
    full = "x" * (LENGTH - 10)
    assert with_end(full, "switched.", "x") == full
    assert with_now(full, "x") == full


def test_the_end_is_read_back() -> None:
    note = with_end("by Kim", "refused.", "x", "**[plan](dags/d) failed**: Broken.")
    assert read_end(note) == End("refused.", "**[plan](dags/d) failed**: Broken.")
    assert read_end(with_now(note, "page")) == End("", "")
