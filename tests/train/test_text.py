"""Text of others in messages: one line, of a bounded length, without anything that a terminal would act on."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdmp_train.text import brief, duration, one_line, printable

HOSTILE = "a\x1b[2J\u202eb"


@pytest.mark.parametrize("show", [printable, one_line, brief, lambda text: one_line(ValueError(text))])
def test_control_characters_become_escapes(show):
    shown = show(HOSTILE)
    assert shown.strip("'") == "a\\x1b[2J\\u202eb"
    assert shown.isprintable()


def test_bytes_of_a_path_that_are_no_text_are_shown_as_bytes():
    assert printable(Path("caf\udce9")) == "caf\\xe9"
    assert one_line("caf\udce9") == "caf\\xe9"


def test_line_breaks_are_spaces_in_one_line_and_escapes_in_a_name():
    assert one_line("two\n  lines\r\n") == "two lines"
    assert printable("two\nlines") == "two\\nlines"


def test_what_is_long_is_shortened_and_what_is_empty_says_its_kind():
    assert len(one_line("x" * 10_000)) < 400
    assert len(brief(["x" * 10_000] * 10_000)) <= 400
    assert one_line(KeyError()) == "KeyError"
    assert brief(10**5000) == "a int too large to print"


def test_durations_have_two_units_at_most():
    shown = {0.254: "0.25 s", 42.2: "42 s", 59.7: "1 min 00 s", 425: "7 min 05 s", 3599.8: "1 h 00 min"}
    shown |= {12000: "3 h 20 min", 86_399: "1 d 00 h", 187_200: "2 d 04 h"}
    assert {seconds: duration(seconds) for seconds in shown} == shown
