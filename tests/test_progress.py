"""What progress prints into a pipe, on a terminal, and when it is disabled."""

import io
import os
import sys

import pytest
from conftest import Seconds
from rich.table import Table

import progress
from progress import Progress, format_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Seconds:
    clock = Seconds()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_plain_lines_every_ten_seconds(clock: Seconds, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("preparing", total=400, unit="clips") as bar:
        for _ in range(25):
            clock.now += 1
            bar.advance(10, audio_seconds=36.0)
    assert capsys.readouterr() == (
        "",
        "preparing: 100/400 (25%), 10.0 clips/s, 0.10 h of audio, ETA 0:00:30\n"
        "preparing: 200/400 (50%), 10.0 clips/s, 0.20 h of audio, ETA 0:00:20\n",
    )


def test_note_stands_behind_the_rate(clock: Seconds, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", total=8, unit="updates") as bar:
        clock.now += 20
        bar.advance(note="loss 1.250")
    assert capsys.readouterr().err == "training: 1/8 (12%), 0.1 updates/s, loss 1.250, ETA 0:02:20\n"


def test_a_resumed_run_does_not_count_what_was_done_before(clock: Seconds, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", total=1_000, unit="updates", start=900) as bar:
        clock.now += 10
        bar.advance(20)
    assert capsys.readouterr().err == "training: 920/1000 (92%), 2.0 updates/s, ETA 0:00:40\n"


def test_work_that_turns_out_longer_and_comes_in_fractions(clock: Seconds, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("transcribing", total=0, unit="s of audio") as bar:
        bar.expect(16)
        for _ in range(20):
            clock.now += 1
            bar.advance(0.4)
    assert capsys.readouterr().err == (
        "transcribing: 4/16 (25%), 0.4 s of audio/s, ETA 0:00:30\n"
        "transcribing: 8/16 (50%), 0.4 s of audio/s, ETA 0:00:20\n"
    )


def test_short_work_and_no_work_print_nothing(clock: Seconds, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("evaluating", total=2, unit="batches") as bar:
        clock.now += 9
        bar.advance(2)
    with Progress("evaluating", total=0, unit="batches"):
        clock.now += 100
    assert capsys.readouterr() == ("", "")


def test_disabled_prints_nothing_at_all(
    clock: Seconds, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    for stderr in (sys.stderr, terminal):
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress("training", total=8, unit="updates", enabled=False) as bar:
            clock.now += 60
            bar.advance(note="loss 1")
            bar.print("a row of the log")
    assert terminal.getvalue() == ""
    assert capsys.readouterr() == ("", "")


def test_lines_go_to_stdout_and_progress_to_stderr(clock: Seconds, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", total=8, unit="updates") as bar:
        bar.print("step 1/8, WER 100.00%")
    assert capsys.readouterr() == ("step 1/8, WER 100.00%\n", "")


def test_a_failure_inside_passes_and_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyError), Progress("training", total=8, unit="updates") as bar:
        bar.advance()
        raise KeyError
    assert Progress._display is None


def test_on_a_terminal_an_evaluation_shares_the_display_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    with Progress("training", total=8, unit="updates") as outer:
        outer.advance(3, note="loss 0.5")
        with Progress("evaluating", total=4, unit="batches") as inner:
            inner.advance(2)
            assert [(task.description, task.completed) for task in outer._bar.tasks] == [
                ("training", 3),
                ("evaluating", 2),
            ]
            inner._bar.refresh()
        assert [task.description for task in outer._bar.tasks] == ["training"]
        outer.print("row [of] the log")
        outer.advance()
    shown = terminal.getvalue()
    assert all(text in shown for text in ("3/8", "2/4", "4/8", "loss 0.5", "row [of] the log"))
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "one display hides the cursor and gives it back"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.4, "0:00:59"), (59.5, "0:01:00"), (3_599.6, "1:00:00"), (360_000, "100:00:00")],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_table_for_a_reader_that_has_gone_costs_the_table_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    table = Table("slice")
    table.add_row("speaker")
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        progress.print_table(table)
        assert not progress.say("more", stdout)
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())  # What is left in the buffer goes nowhere.


def test_a_table_is_printed_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("slice", box=None)
    table.add_row("speaker")
    progress.print_table(table)
    assert [line.strip() for line in capsys.readouterr().out.split("\n")] == ["slice", "speaker", ""]
