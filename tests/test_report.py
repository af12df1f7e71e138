"""report.py from outside: figures are those of the files, text stays text, limits are kept, missing pieces are said."""

import base64
import copy
import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path

import pytest
import yaml
from conftest import TALKATIVE, TINY_GROUP_NORM_MODEL, make_rows, training, write_part, write_recipe
from report_folders import HOSTILE, Seen, blocks, make_texts, write_data, write_results, write_run

import evaluate
import report
from errors import exit_status
from listing import scan
from result_layout import COUNT_COLUMNS, MAX_GROUPS
from run_page import _best_so_far
from runlog import TrainingLog

Command = Callable[..., int]
# All that the page is made of.
KNOWN_ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "script", "header", "main", "section", "nav", "footer"),
    *("h1", "h2", "h3", "p", "div", "span", "b", "i", "a", "ul", "li", "dl", "dt", "dd", "small", "bdi", "code", "pre"),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "figure", "figcaption", "svg", "path", "line"),
    *("label", "input", "select", "option", "optgroup", "button", "noscript", "output"),
}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs report.py; its status."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        return exit_status(report.main)

    return run


def visible(page: str) -> str:
    """What is shown without the script, in one line."""
    without = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", without)).split())


# A whole run, made by the real commands


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of two updates with its evaluation inside: folder / run / evaluation_test."""
    folder = tmp_path_factory.mktemp("real")
    accents = [{"accent": "north" if row % 2 else "south"} for row in range(130)]
    for split, count, seed in (("train", 16, 1), ("dev", 4, 2)):
        write_part(folder / "data" / split / "part_1", make_rows(count, seed))
    write_part(folder / "data" / "test" / "part_1", make_rows(130, 3, ("ann", "cem")), metadata=accents)
    recipe = write_recipe(
        folder / "recipe.yaml", folder / "data", max_steps=2, model_config=TINY_GROUP_NORM_MODEL | TALKATIVE
    )
    with training() as train:
        assert train("--config", recipe, "--output_dir", folder / "run") == 0
    with pytest.MonkeyPatch.context() as patch:
        flags = (
            "--model_name_or_path",
            folder / "run/model",
            "--data_dir",
            folder / "data",
            "--dataloader_num_workers",
            0,
        )
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        assert exit_status(evaluate.main) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def page(real: Path) -> str:
    """The report of that run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report.py", str(real)])
        assert exit_status(report.main) == 0
    return (real / "report.html").read_text(encoding="utf-8")


def test_figures_are_those_of_the_files(real: Path, page: str) -> None:
    shown = visible(page)
    results = json.loads((real / "evaluation_test" / "results.json").read_text())
    trained = json.loads((real / "train_results.json").read_text())
    for name in ("wer", "cer", "sentence_error_rate"):
        limits = f"95 %: {100 * results[f'{name}_low']:.2f} to {100 * results[f'{name}_high']:.2f} %"
        assert f"{100 * results[name]:.2f} % {limits}" in shown
    assert f"WER on dev {100 * trained['best_eval_wer']:.2f} %" in shown
    assert f"WER on test {100 * trained['test_wer']:.2f} %" in shown
    for one in results["slices"]:
        limits = "" if one["wer_low"] is None else f" [{100 * one['wer_low']:.2f}, {100 * one['wer_high']:.2f}]"
        few = " (few)" if one["is_small"] else ""
        row = f"{one['slice']} {one['group']}{few} {100 * one['wer']:.2f} %{limits} {one['utterances']:,}"
        assert f"{row} {100 * one['cer']:.2f} %" in shown
    with (real / "training_log.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    loss = blocks(page)["panels"][0]["curves"][0]
    assert [point[:2] for point in loss["points"]] == [
        [int(row["step"]), pytest.approx(float(row["train_loss"]), rel=1e-5)] for row in log if row["train_loss"]
    ]
    assert "Finished: 2 updates" in shown
    assert f"{trained['audio_hours_per_hour']:.3g} hours of audio per hour" in shown
    for column, name in (
        ("data_seconds", "waiting for data"),
        ("compute_seconds", "computing"),
        ("save_seconds", "saving"),
    ):
        assert f"{name} {trained[column] / trained['elapsed_seconds']:.1%}" in shown
    assert "What this report lacks" not in shown


def test_utterances_are_those_of_the_table(real: Path, page: str) -> None:
    utterances = {one["id"]: one for one in blocks(page)["utterances-0-utterances"]["utterances"]}
    with (real / "evaluation_test" / "utterances.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert set(utterances) == {row["id"] for row in rows}
    for row in rows:
        one = utterances[row["id"]]
        insertions, deletions, substitutions, hits = (int(row[name]) for name in COUNT_COLUMNS[:4])
        assert one["errors"] == insertions + deletions + substitutions
        assert one["words"] == hits + deletions + substitutions
        assert one["seconds"] == pytest.approx(float(row["seconds"]), abs=0.01)
        assert (side(one, 0), side(one, 1)) == (row["reference"], " ".join(row["hypothesis"].split()))
    kinds = [one["kind"] for one in utterances.values()]
    assert (kinds.count("worst"), kinds.count("random"), kinds.count("")) == (50, 50, 30)
    worst = min(one["rate"] for one in utterances.values() if one["kind"] == "worst")
    assert worst >= max(one["rate"] for one in utterances.values() if one["kind"] != "worst")
    assert set(blocks(page)["utterances-0-clips"]) == {name for name, one in utterances.items() if one["kind"]}


def side(utterance: dict, at: int) -> str:
    """The reference (0) or the hypothesis (1) that the pairs of an utterance make up."""
    words = [pair if isinstance(pair, str) else pair[at] for pair in utterance["pairs"]]
    return " ".join("".join(word) if isinstance(word, list) else word for word in words if word is not None)


def test_confusions_add_up_to_the_errors_of_the_results(real: Path, page: str) -> None:
    results = json.loads((real / "evaluation_test" / "results.json").read_text())
    counted = scan(real / "evaluation_test" / "utterances.csv")
    for found, name in ((counted.words, "words"), (counted.characters, "characters")):
        assert found.substitutions.total() == results[name]["substitutions"]
        assert found.deletions.total() == results[name]["deletions"]
        assert found.insertions.total() == results[name]["insertions"]
        assert f"{results[name]['substitutions']:,} replaced" in visible(page)
    assert counted.facets == {"speaker": ["ann", "cem"], "accent": ["north", "south"]}


def test_durations_are_rates_over_their_rows(real: Path, page: str) -> None:
    with (real / "evaluation_test" / "utterances.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    total = 0
    for low, high, count, wer in scan(real / "evaluation_test" / "utterances.csv").by_duration():
        inside = [row for row in rows if low <= float(row["seconds"]) < high]
        counts = [sum(int(row[name]) for row in inside) for name in COUNT_COLUMNS[:4]]
        assert (count, wer.rate) == (len(inside), pytest.approx(sum(counts[:3]) / sum(counts[1:])))
        assert f"{low:g} to {high:g} s" in visible(page)
        total += count
    assert total == len(rows) == 130


def test_the_page_reaches_nothing_outside_and_runs_one_script(page: str) -> None:
    seen = Seen(page)
    scripts = [attributes for name, attributes in seen.elements if name == "script"]
    assert [attributes for attributes in scripts if attributes.get("type") != "application/json"] == [{}]
    for name, attributes in seen.elements:
        assert name not in ("link", "iframe", "object", "embed", "base", "form", "img")
        assert not {key for key in attributes if key.startswith("on") or key in ("src", "srcset", "action")}
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in page and "@import" not in page
    (policy,) = [a["content"] for _, a in seen.elements if a.get("http-equiv") == "Content-Security-Policy"]
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    # Text may only enter through textContent.
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch(", "import("):
        assert forbidden not in script


def test_the_screens_of_train_and_evaluate_name_the_command(real: Path, capsys: pytest.CaptureFixture) -> None:
    with training() as train:
        recipe = real.parent / "recipe.yaml"
        assert train("--config", recipe, "--output_dir", real.parent / "again") == 0
    assert f"report: python report.py {real.parent / 'again'}" in capsys.readouterr().out
    flags = ("--model_name_or_path", real / "model", "--data_dir", real.parent / "data", "--max_eval_samples", 4)
    with pytest.MonkeyPatch.context() as patch:
        output = ("--output_dir", real.parent / "scored", "--dataloader_num_workers", 0)
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, flags + output)])
        assert exit_status(evaluate.main) == 0
        assert f"report: python report.py {real.parent / 'scored'}" in capsys.readouterr().out
        # A report in its folder is no reason to refuse the next evaluation, which it does not belong to.
        (real.parent / "scored" / "report.html").write_text("old")
        assert exit_status(evaluate.main) == 0
        assert not (real.parent / "scored" / "report.html").exists()


def test_letters_with_what_stands_for_them(tmp_path: Path, command: Command) -> None:
    """And, as before, results that do not say it."""
    data = write_data(tmp_path / "data", 2)
    letters = {"\u0257": {"occurrences": 40, "recall": 0.25, "taken_for": "d", "times": 29}}
    letters |= {"b": {"occurrences": 40, "recall": 0.5, "taken_for": "", "times": 20}}
    letters |= {"a": {"occurrences": 90, "recall": 1.0, "taken_for": None, "times": 0}}
    letters |= {"o": {"occurrences": 90, "recall": 1.0}}
    folder = tmp_path / "results"
    write_results(folder, [("a", "a"), ("b", "b")], data, letters=letters, rare_in_training={"\u0199": 4, "\u0301": 2})
    assert command(folder, "--no_audio") == 0
    said = " ".join(visible((folder / "report.html").read_text(encoding="utf-8")).split())
    assert "Seen fewer than 20 times in the training text: \u0199 4, U+0301 2." in said
    assert "as d, 29 times" in said
    assert "lost, 20 times" in said


# Text that is hostile


def test_text_stays_text_wherever_it_comes_from(tmp_path: Path, command: Command) -> None:
    data = write_data(tmp_path / "data", 12)
    texts = [pair for text in HOSTILE for pair in ((text, "one"), ("one", text), (text, f"{text} x"), (text, text))]
    letters = {HOSTILE[1]: {"occurrences": 50, "recall": 0.5, "taken_for": HOSTILE[0], "times": 25}}
    rare = {HOSTILE[1]: 3}
    folder = tmp_path / "run" / "evaluation_test"
    write_results(folder, texts, data, model=HOSTILE[0], letters=letters, rare_in_training=rare)
    assert command(tmp_path / "run" / "evaluation_test", "--no_audio") == 0
    page = (tmp_path / "run" / "evaluation_test" / "report.html").read_text(encoding="utf-8")
    seen = Seen(page)
    assert {name for name, _ in seen.elements} <= KNOWN_ELEMENTS
    assert not [a for _, a in seen.elements if any(key.startswith("on") for key in a)]
    assert page.count("<script>") == 1 and page.count("</script>") == 1 + len(blocks(page))
    listed = blocks(page)["utterances-0-utterances"]["utterances"]
    said = {(one["id"], side(one, 0), side(one, 1)) for one in listed}
    assert said == {
        (f"u3_{row}", " ".join(reference.split()), " ".join(hypothesis.split()))
        for row, (reference, hypothesis) in enumerate(texts)
    }
    assert HOSTILE[0] in visible(page).replace("  ", " ")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_run_is_shown_as_text(tmp_path: Path, command: Command, text: str) -> None:
    write_run(tmp_path / "run", tmp_path / "data", samples=[(text, text, "one"), ("2", "one", text)])
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"platform": text, "command": [text]}))
    assert command(tmp_path / "run", "--no_audio") == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    seen = Seen(page)
    assert {name for name, _ in seen.elements} <= KNOWN_ELEMENTS
    assert not [a for _, a in seen.elements if any(key.startswith("on") for key in a)]
    assert " ".join(text.split()) in " ".join("".join(seen.texts).split())
    assert blocks(page)["samples-utterances"]["utterances"][0]["id"] == " ".join(text.splitlines())


# Limits


def test_random_utterances_are_drawn_by_the_seed_and_are_never_the_worst(tmp_path: Path, command: Command) -> None:
    write_results(tmp_path / "found", make_texts(300), write_data(tmp_path / "data", 12))

    def kinds(*flags: object) -> tuple[set[str], set[str]]:
        assert command(tmp_path / "found", "--no_audio", "--output", tmp_path / "x.html", *flags) == 0
        listed = blocks((tmp_path / "x.html").read_text(encoding="utf-8"))["utterances-0-utterances"]["utterances"]
        assert len({one["id"] for one in listed}) == len(listed) == 300
        return tuple({one["id"] for one in listed if one["kind"] == kind} for kind in ("worst", "random"))

    worst, drawn = kinds()
    assert kinds() == (worst, drawn)
    assert len(worst) == len(drawn) == 50 and not worst & drawn
    again, other = kinds("--seed", 7)
    assert again == worst and other != drawn and not other & worst


def test_the_worst_have_the_highest_rate_and_then_the_most_errors(tmp_path: Path) -> None:
    texts = [
        ("a b c d e", "x y z d e"),
        ("a", "a"),
        ("a", "x"),
        ("a b", "x y"),
        ("", "z"),
        ("a b", "x b"),
        ("a", "x y"),
    ]
    write_results(tmp_path / "found", texts, write_data(tmp_path / "data", 12))
    counted = scan(tmp_path / "found" / "utterances.csv")
    assert counted.rates.tolist() == pytest.approx([0.6, 0, 1, 1, 1, 0.5, 2])
    assert [row for row, _ in counted.choose(seed=0)] == [6, 3, 2, 4, 0, 5, 1]


@pytest.mark.parametrize(("count", "worst", "drawn"), [(1, 1, 0), (50, 50, 0), (60, 50, 10)])
def test_few_utterances(tmp_path: Path, command: Command, count: int, worst: int, drawn: int) -> None:
    write_results(tmp_path / "found", make_texts(count), write_data(tmp_path / "data", 12))
    assert command(tmp_path / "found", "--no_audio") == 0
    found = blocks((tmp_path / "found" / "report.html").read_text(encoding="utf-8"))["utterances-0-utterances"]
    kinds = [one["kind"] for one in found["utterances"]]
    assert (kinds.count("worst"), kinds.count("random")) == (worst, drawn)


def test_the_page_keeps_its_size_and_says_what_it_leaves_out(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "data", 130)
    write_results(tmp_path / "found", make_texts(130), data)
    assert command(tmp_path / "found") == 0
    whole = (tmp_path / "found" / "report.html").read_bytes()
    assert "100 clips can be heard: the worst and the random ones." in visible(whole.decode())
    limit = len(whole) // 2
    monkeypatch.setattr(report, "MAX_PAGE_BYTES", limit)
    assert command(tmp_path / "found") == 0
    page = (tmp_path / "found" / "report.html").read_bytes()
    assert len(page) <= limit
    clips = blocks(page.decode())["utterances-0-clips"]
    assert 0 < len(clips) < 100
    assert f"{len(clips)} of 100 clips can be heard" in visible(page.decode())
    listed = blocks(page.decode())["utterances-0-utterances"]["utterances"]
    kinds = [one["kind"] for one in listed if one["id"] in clips]
    assert abs(kinds.count("worst") - kinds.count("random")) <= 5, "both kinds are heard"


def test_a_large_evaluation_lists_the_worst_and_says_so(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(tmp_path / "found", make_texts(1_000), write_data(tmp_path / "data", 12))
    monkeypatch.setattr(report, "LISTING_BYTES", 60_000)
    assert command(tmp_path / "found", "--no_audio") == 0
    page = (tmp_path / "found" / "report.html").read_text(encoding="utf-8")
    listed = blocks(page)["utterances-0-utterances"]["utterances"]
    assert 100 < len(listed) < 1_000
    assert f"{len(listed):,} of 1,000 utterances are listed" in visible(page)
    left_out = 1_000 - len(listed)
    rates = sorted(scan(tmp_path / "found" / "utterances.csv").rates)
    others = [one["rate"] for one in listed if one["kind"] == ""]
    assert min(others) >= rates[left_out - 51], "those left out have the lowest rates"


def test_no_audio_leaves_no_clip(tmp_path: Path, command: Command) -> None:
    write_results(tmp_path / "found", make_texts(5), write_data(tmp_path / "data", 12))
    assert command(tmp_path / "found", "--no_audio") == 0
    page = (tmp_path / "found" / "report.html").read_text(encoding="utf-8")
    assert blocks(page)["utterances-0-clips"] == {}
    assert "Clips are left out (--no_audio)." in visible(page)


def test_columns_with_many_values_are_not_filtered_by(tmp_path: Path) -> None:
    table = tmp_path / "utterances.csv"
    rows = [f"{row},a,a,1.0,{row % MAX_GROUPS},{row % (MAX_GROUPS + 1)},same" for row in range(100)]
    table.write_text("\n".join(["id,reference,hypothesis,seconds,speaker,path,locale", *rows]) + "\n")
    assert scan(table).facets == {"speaker": sorted(str(value) for value in range(MAX_GROUPS))}


# What is missing


def test_a_run_that_is_still_training(tmp_path: Path, command: Command) -> None:
    write_data(tmp_path / "data", 12, "dev")
    write_run(tmp_path / "run", tmp_path / "data", samples=[("u3_1", "one two", "one too"), ("u3_4", "six", "six")])
    assert command(tmp_path / "run") == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    shown = visible(page)
    assert "Not finished: at step 20 of 40 (50%)" in shown
    assert "at that pace 0:01:00 are left" in shown
    assert "WER on dev 40.00 % 35.00 to 95.00 %; best, at step 20" in shown
    assert "speaker ann 25.00 % [12.50, 50.00] 31 6.25 %" in shown
    assert "train_results.json is not there: the run is not finished" in shown
    assert "0.01 hours of audio per second (36 h per hour)" in shown
    assert "2.50 % of what was computed" in shown
    assert f"python evaluate.py --model_name_or_path {tmp_path / 'run' / 'model'}" in shown
    assert "too_long 3" in shown and "3 clips <br>" in shown and "--seed '1 <2>'" in shown
    assert set(blocks(page)["samples-clips"]) == {"u3_1", "u3_4"}
    assert "max_steps 40 -1 model_config: conv_dim 32, 64 model_config: model_type wav2vec2" in shown
    assert "settings at their defaults (2) setting value eval_split dev learning_rate 0.0003" in shown


def test_the_best_so_far_is_by_the_run_s_metric_and_of_either_weights() -> None:
    log = [
        {"step": 0, "eval_wer": 0.1, "eval_cer": 0.1, "eval_loss": 0.1},
        {"step": 10, "eval_wer": 0.5, "eval_cer": 0.4, "eval_loss": 1.0, "ema_eval_wer": 0.6, "ema_eval_cer": 0.2},
        {"step": 15, "train_loss": 1.0},
        {"step": 20, "eval_wer": 0.4, "eval_cer": 0.3, "eval_loss": 2.0, "eval_wer_low": 0.3, "eval_wer_high": 0.5},
    ]
    limits = {"best_eval_wer_low": 0.3, "best_eval_wer_high": 0.5}
    unknown = dict.fromkeys(limits)
    found = {metric: _best_so_far(log, metric) for metric in ("eval_wer", "eval_cer", "eval_loss")}
    assert found["eval_wer"] == {"best_step": 20, "best_eval_wer": 0.4, "best_eval_cer": 0.3} | limits
    assert found["eval_cer"] == {"best_step": 10, "best_eval_wer": 0.6, "best_eval_cer": 0.2} | unknown
    assert found["eval_loss"] == {"best_step": 10, "best_eval_wer": 0.5, "best_eval_cer": 0.4} | unknown
    assert _best_so_far(log[:1], "eval_wer") == {}


def test_a_run_that_stopped_early_and_kept_an_average(tmp_path: Path, command: Command) -> None:
    write_run(tmp_path / "run", tmp_path / "data")
    results = {"best_step": 10, "best_eval_wer": 0.4, "average_eval_wer": 0.3, "train_runtime": 60.0}
    results |= {"kept": "average", "stopped_early_at_step": 20, "stopped_early_because": "3 evaluations in a row"}
    (tmp_path / "run" / "train_results.json").write_text(json.dumps(results))
    assert command(tmp_path / "run", "--no_audio") == 0
    shown = visible((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "stopped early: 3 evaluations in a row." in shown
    assert "WER on dev, mean of the best 30.00 % it is model/" in shown


@pytest.mark.parametrize("name", ["training_log.csv", "eval_slices.csv", "eval_samples.csv", "preflight.json",
                                  "config.yaml", "environment.json"])  # fmt: skip
@pytest.mark.parametrize("damage", [None, b"", b"\x00\xff{", b"[]", b"a,b\n1,2\n"])
def test_each_piece_of_a_run_may_be_missing_or_damaged(
    tmp_path: Path, command: Command, name: str, damage: bytes | None
) -> None:
    write_run(tmp_path / "run", tmp_path / "data", samples=[("u3_1", "one two", "one too")])
    (tmp_path / "run" / name).unlink() if damage is None else (tmp_path / "run" / name).write_bytes(damage)
    assert command(tmp_path / "run", "--no_audio") == 0
    shown = visible((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    if damage is None:
        assert f"{name} is not there: no " in shown
    else:
        assert f"{name} cannot be read" in shown


def changed(tree: object, path: tuple[str | int, ...], value: object) -> object:
    """A copy of a tree with another value at a place, or without it where the value is ABSENT."""
    if not path:
        return value
    copied = copy.copy(tree)
    inner = changed(copied[path[0]], path[1:], value)
    if inner is ABSENT:
        del copied[path[0]]
    else:
        copied[path[0]] = inner
    return copied


def places(tree: object) -> Iterator[tuple[str | int, ...]]:
    """Every place of a tree of dicts and lists."""
    yield ()
    for name in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield from ((name, *inner) for inner in places(tree[name]))


ABSENT = object()


@pytest.mark.parametrize("value", ["<text>", {"a": 1}, None, ABSENT], ids=("text", "dict", "none", "absent"))
@pytest.mark.parametrize("name", ["results.json", "train_results.json", "preflight.json", "config.yaml",
                                  "environment.json"])  # fmt: skip
def test_any_value_of_a_file_may_be_another(
    tmp_path: Path, command: Command, name: str, value: object, capsys: pytest.CaptureFixture
) -> None:
    """Another version, another program's results.json, an editor: shown, or named; never a traceback."""
    folder = tmp_path / "run"
    write_run(folder, tmp_path / "data", samples=[("u3_1", "one two", "one too")])
    tree = yaml.safe_load((folder / name).read_text()) if (folder / name).is_file() else {}
    if name == "results.json":
        folder = tmp_path / "found"
        tree = write_results(folder, make_texts(2), write_data(tmp_path / "data", 12))
    elif name == "train_results.json":
        rates = {"best_eval_wer": 0.2, "best_eval_wer_low": 0.1, "best_eval_wer_high": 0.3, "test_cer": 0.1}
        one = {"slice": "speaker", "group": "ann", "utterances": 31, "wer": 0.25, "wer_low": 0.1, "wer_high": 0.5}
        tree = rates | {"best_step": 10, "train_runtime": 20.0, "elapsed_seconds": 30.0, "eval_seconds": 2.0}
        tree |= {"test_slices": [one | {"cer": 0.1, "is_small": False}]}
    for place in places(tree):
        if place or value is not ABSENT:
            (folder / name).write_text(json.dumps(changed(tree, place, value)), encoding="utf-8")
            assert command(folder, "--no_audio") == 0, place
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("eval_slices.csv", ",31,", ",many,"), ("eval_slices.csv", "0.25", "low"), ("training_log.csv", ",36,", ",fast,")],
)
def test_a_table_with_text_where_numbers_belong(
    tmp_path: Path, command: Command, name: str, before: str, after: str
) -> None:
    write_run(tmp_path / "run", tmp_path / "data")
    text = (tmp_path / "run" / name).read_text()
    assert before in text
    (tmp_path / "run" / name).write_text(text.replace(before, after))
    assert command(tmp_path / "run", "--no_audio") == 0
    assert f"{name} cannot be read" in visible((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))


def test_a_damaged_evaluation_inside_a_run_is_said(tmp_path: Path, command: Command) -> None:
    write_run(tmp_path / "run", tmp_path / "data")
    write_results(tmp_path / "run" / "evaluation_test", make_texts(20), write_data(tmp_path / "data", 12))
    (tmp_path / "run" / "evaluation_test" / "utterances.csv").write_text("id,reference\n1,a\n")
    assert command(tmp_path / "run", "--no_audio") == 0
    shown = visible((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "test: " in shown and "utterances.csv is not a table that evaluate.py wrote" in shown
    assert "43.21 %" in shown and "Words taken for others" not in shown


def test_a_run_whose_wer_stays_at_one_says_its_state(tmp_path: Path, command: Command) -> None:
    write_run(tmp_path / "run", tmp_path / "data")
    TrainingLog(tmp_path / "run" / "training_log.csv").append(
        {"step": 30, "epoch": 4.0, "eval_wer": 1.0, "state": "plateau"}, {"step": 35, "epoch": 4.5, "train_loss": 3.0}
    )
    assert command(tmp_path / "run") == 0
    assert "Its state: plateau" in visible((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))


def test_the_folder_may_stand_behind_the_flags(tmp_path: Path, command: Command) -> None:
    write_results(tmp_path / "found", make_texts(3), write_data(tmp_path / "data", 12))
    assert command("--output", tmp_path / "x.html", "--no_audio", tmp_path / "found") == 0
    assert (tmp_path / "x.html").is_file() and not (tmp_path / "found" / "report.html").exists()


def test_a_run_that_has_only_begun(tmp_path: Path, command: Command) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("data_dir: data\n")
    assert command(tmp_path / "run") == 0
    shown = visible((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "No update has been logged yet." in shown
    assert "The log holds no row yet." in shown and "No evaluation has been written yet." in shown


@pytest.mark.parametrize("name", ["results.json", "utterances.csv"])
def test_results_without_one_of_their_files(tmp_path: Path, command: Command, name: str) -> None:
    write_results(tmp_path / "found", make_texts(20), write_data(tmp_path / "data", 12))
    (tmp_path / "found" / name).unlink()
    assert command(tmp_path / "found", "--no_audio") == 0
    shown = visible((tmp_path / "found" / "report.html").read_text(encoding="utf-8"))
    assert f"{name} is not there: no " in shown
    assert ("43.21 %" in shown) == (name != "results.json")
    assert ("Words taken for others" in shown) == (name != "utterances.csv")


def test_data_that_has_moved(tmp_path: Path, command: Command, capsys: pytest.CaptureFixture) -> None:
    data = write_data(tmp_path / "data", 12)
    write_results(tmp_path / "found", make_texts(12), data)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert command(tmp_path / "found") == 0
    page = (tmp_path / "found" / "report.html").read_text(encoding="utf-8")
    said = f"No clips: there is no folder {tmp_path / 'data' / 'test'}. If the data lies elsewhere, give --data_dir."
    assert said in visible(page)
    assert capsys.readouterr().err.count(said) == 1
    assert blocks(page)["utterances-0-clips"] == {}
    assert command(tmp_path / "found", "--data_dir", tmp_path / "elsewhere") == 0
    assert len(blocks((tmp_path / "found" / "report.html").read_text(encoding="utf-8"))["utterances-0-clips"]) == 12


def test_several_results_in_a_folder_are_shown_side_by_side(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture
) -> None:
    data = write_data(tmp_path / "data", 12)
    for name, count in (("first", 10), ("second", 12)):
        write_results(tmp_path / "all" / name, make_texts(count), data)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert command(tmp_path / "all") == 0
    page = (tmp_path / "all" / "report.html").read_text(encoding="utf-8")
    assert "Evaluation: first" in visible(page) and "Evaluation: second" in visible(page)
    counts = [len(blocks(page)[f"utterances-{number}-utterances"]["utterances"]) for number in (0, 1)]
    assert counts == [10, 12]
    identities = [attributes["id"] for _, attributes in Seen(page).elements if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert capsys.readouterr().err.count("No clips: there is no folder") == 1, "the same is said once"


@pytest.mark.parametrize("is_run", [True, False])
def test_the_texts_with_a_language_model_are_shown_beside_the_greedy_ones(
    tmp_path: Path, command: Command, is_run: bool
) -> None:
    write_run(tmp_path / "run", tmp_path / "data")
    folder = tmp_path / "run" / "evaluation_test"
    data = write_data(tmp_path / "data", 12)
    write_results(folder, make_texts(10), data)
    write_results(folder / "lm", make_texts(9), data)
    assert command(tmp_path / "run" if is_run else folder, "--no_audio", "--output", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    names = re.findall(r"<h2>Evaluation: ([^<]*)</h2>", page)
    assert names == (["test", "test/lm"] if is_run else ["test", "lm"])
    counts = [len(blocks(page)[f"utterances-{number}-utterances"]["utterances"]) for number in (0, 1)]
    assert counts == [10, 9]


def test_other_data_under_the_same_ids_is_not_played(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture
) -> None:
    write_results(tmp_path / "found", make_texts(4), write_data(tmp_path / "data", 12), data_fingerprint="0" * 64)
    assert command(tmp_path / "found") == 0
    assert "is not the data that was scored" in capsys.readouterr().err
    page = (tmp_path / "found" / "report.html").read_text(encoding="utf-8")
    assert blocks(page)["utterances-0-clips"] == {}


def test_a_comparison_is_shown(tmp_path: Path, command: Command) -> None:
    write_results(tmp_path / "found", make_texts(20), write_data(tmp_path / "data", 12))
    rate = {"rate": 0.3, "low": 0.25, "high": 0.35, "units": 20, "unit": "utterances"}
    difference = {"interval": rate | {"rate": -0.1, "low": -0.15, "high": -0.05}, "detectable": 0.05, "changed": 9}
    chance = {"interval": rate | {"rate": 0.01, "low": float("nan"), "high": float("nan")}} | {"detectable": 1}
    facts = {
        "utterances": 20, "left_out": 1, "other": [rate | {"rate": 0.4}, rate], "own": [rate, rate],
        "differences": [difference, chance], "is_clear": [True, False], "other_model": "base<model>",
    }  # fmt: skip
    (tmp_path / "found" / "comparison.json").write_text(json.dumps(facts))
    assert command(tmp_path / "found", "--no_audio") == 0
    shown = visible((tmp_path / "found" / "report.html").read_text(encoding="utf-8"))
    assert "rate base<model> this model difference" in shown
    assert "WER 40.00 % [25.00, 35.00] 30.00 % [25.00, 35.00] -10.00 % [-15.00, -5.00]: chance does not" in shown
    assert "1.00 %: may be chance" in shown
    (tmp_path / "found" / "comparison.json").write_text('{"other": "base"}')
    assert command(tmp_path / "found", "--no_audio") == 0
    shown = visible((tmp_path / "found" / "report.html").read_text(encoding="utf-8"))
    assert "comparison.json cannot be read (no other_model): no comparison" in shown


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a run directory of train.py or a results folder of evaluate.py"),
        (("nowhere",), "nowhere does not exist: name a run directory of train.py"),
        (("file",), "file is not a folder"),
        (("empty",), "empty is neither a run directory of train.py (training_log.csv, config.yaml) nor a results"),
        (("found", "--output", "empty"), "--output empty is a folder: name a file"),
        (("found", "--output", "no/x.html"), "there is no folder no, make it first"),
        (("found", "more"), "'more' belongs to no flag"),
        (("found", "--seed", "-1"), "--seed is -1, it must lie in 0"),
        (("found", "--no_video"), "unknown setting --no_video"),
        (("damaged",), "utterances.csv is not a table that evaluate.py wrote"),
        (("headless",), "utterances.csv holds no utterance"),
        (("foreign",), "foreign holds no results of evaluate.py: results.json cannot be read (no wer)"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file").touch()
    write_results(Path("found"), make_texts(3), write_data(tmp_path / "data", 12))
    for name, text in (("damaged", "id,reference\n1,a\n"), ("headless", "id,reference,hypothesis,seconds,speaker\n")):
        Path(name).mkdir()
        Path(name, "utterances.csv").write_text(text)
    Path("foreign").mkdir()
    Path("foreign", "results.json").write_text('{"accuracy": 0.3}')
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*.html"))
