"""What a terminal shows: lines broken between words, colours where they are wanted, a clock."""

import io
import sys

import pytest

from litgpt_moe import cli, terminal
from litgpt_moe.cli import status
from litgpt_moe.terminal import WordWrapper, paint, paint_report, width_of, wrapped


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal with colours, 20 columns wide."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WT_SESSION", "1")
    monkeypatch.setenv("COLUMNS", "21")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("One day a little dog ran home.", ["One day a little dog", "ran home."]),
        ("a" * 45, ["a" * 20, "a" * 20, "a" * 5]),  # a word that fits into no line
        ("to " + "a" * 25, ["to", "a" * 20, "a" * 5]),
        ("first\n\n  second", ["first", "", "  second"]),  # its own line breaks and indents stay
        ("one two three four. ", ["one two three four."]),
        ("小狗跑回家了小狗跑回家了", ["小狗跑回家了小狗跑回", "家了"]),  # two columns each, no spaces
        ("e\u0301" * 20 + " b", ["e\u0301" * 20, "b"]),  # an accent of its own takes none
    ],
)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_lines_break_between_words_however_the_text_comes(text: str, lines: list[str], size: int) -> None:
    wrapper = WordWrapper(20)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    assert "".join([*map(wrapper.put, pieces), wrapper.end()]).split("\n") == lines
    assert max(map(width_of, lines)) <= 20


def test_a_word_is_written_as_soon_as_it_is_whole() -> None:
    wrapper = WordWrapper(20)
    assert [wrapper.put(text) for text in ("On", "ce up", "on", " ")] == ["", "Once", "", " upon"]


def test_a_file_gets_the_text_as_it_is() -> None:
    text = "One day a little dog ran home."
    assert wrapped(text, io.StringIO()) == text
    assert wrapped(text, Terminal()) == "One day a little dog\nran home."


def test_colours_are_for_terminals_that_show_them_and_users_who_want_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert paint("a", "title", Terminal()) == "\x1b[1ma\x1b[0m" and paint("", "title", Terminal()) == ""
    assert paint("a", "title", io.StringIO()) == "a"
    monkeypatch.setenv("NO_COLOR", "")  # empty is unset: no-color.org
    assert paint("a", "title", Terminal()) != "a"
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert paint("a", "title", Terminal()) == "a"
    monkeypatch.setattr(sys, "platform", "win32")
    assert paint("a", "title", Terminal()) != "a"
    monkeypatch.delenv("WT_SESSION")
    monkeypatch.delenv("TERM_PROGRAM", raising=False)
    assert paint("a", "title", Terminal()) == "a"


def test_of_a_report_the_titles_and_the_commands_are_painted() -> None:
    text = "Trained    8 tokens\n\nA story from it:\n\nTom said: hi\n\nNext:\n  uv run python a.py b"
    painted = paint_report(text, Terminal())
    assert "\x1b[1mA story from it:\x1b[0m\n" in painted and "Tom said: hi\n" in painted
    assert painted.endswith("\x1b[1mNext:\x1b[0m\n  \x1b[36muv run python a.py b\x1b[0m")
    assert paint_report(text, io.StringIO()) == text


def test_errors_and_warnings_are_seen_at_once_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    cli.note("Warning: a")
    cli.note("b Warning: c")
    cli.fail("d\x1b[2J", 2)
    assert shown.getvalue() == (
        "\x1b[33mWarning:\x1b[0m a\nb Warning: c\n\x1b[1;31merror:\x1b[0m d\\x1b[2J\n"
    )


def test_a_status_has_a_clock_that_goes_on_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "TICK_S", 0.001)
    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    with status("loading"):
        while shown.getvalue().count("loading 00:00") < 3:
            pass
        cli.note("a note")
    assert "\ra note\n" in shown.getvalue() and shown.getvalue().endswith("\r")
    monkeypatch.setattr(sys, "stderr", unshown := io.StringIO())
    with status("loading"):
        pass
    assert unshown.getvalue() == ""
