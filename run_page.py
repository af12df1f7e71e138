"""The sections of a report that are about a run: its state and figures, curves, slices, cost, checks, settings."""

import dataclasses
import datetime
import shlex
from collections.abc import Collection, Sequence
from typing import Any

from atomic import format_bytes
from charts import PANELS, draw_panel, panel_data, percent
from config import TrainConfig
from costs import MEANINGS, Cost, measure_cost
from markup import Markup, element, join
from page import facts, rate_table, slice_rows, table, tiles
from progress import format_seconds
from readback import Row, RunFolder

MEGABYTE = 10**6


def state_line(run: RunFolder) -> str:
    """Where the run stands, in a sentence."""
    if run.is_finished:
        took = run.results.get("train_runtime")
        behind = f" in {format_seconds(took)} of training" if took else ""
        because = run.results.get("stopped_early_because")
        behind += f", stopped early: {because}" if because else ""
        return f"Finished: {int(run.log[-1]['step']):,} updates{behind}." if run.log else f"Finished{behind}."
    if not run.log:
        return "No update has been logged yet."
    cost = measure_cost(run.log, run.config, run.results)
    of = f" of {cost.total_steps:,} ({cost.step / cost.total_steps:.0%})" if cost.total_steps else ""
    left = f"; at that pace {format_seconds(cost.remaining_seconds)} are left" if cost.remaining_seconds else ""
    when = datetime.datetime.fromtimestamp(run.log_time, datetime.timezone.utc)
    return f"Not finished: at step {cost.step:,}{of} at {when:%Y-%m-%d %H:%M} UTC{left}.{_diagnosis(run.log)}"


def _diagnosis(log: Sequence[Row]) -> str:
    """What the last evaluation found of a run whose WER stays at 1; see diagnosis.py."""
    evaluated = [row for row in log if "eval_wer" in row]
    state = evaluated[-1].get("state") if evaluated else None
    return f" Its state: {state} (WER of 0.99 or more)." if state else ""


def run_tiles(run: RunFolder) -> Markup | None:
    """The best error rates on dev, and those on test before and after."""
    figures = []
    results = run.results or _best_so_far(run.log, run.config.get("metric_for_best_model", "eval_wer"))
    for prefix, name, before in (
        ("best_eval_", "dev", "eval_wer_before"),
        ("average_eval_", "dev, mean of the best", ""),
        ("eval_full_", "all of dev", ""),
        ("test_", "test", "test_wer_before"),
    ):
        if (wer := results.get(f"{prefix}wer")) is None:
            continue
        limits = [results.get(f"{prefix}wer_{end}") for end in ("low", "high")]
        details = [_range(*limits)] if None not in limits else []
        if prefix == "best_eval_" and results.get("best_step") is not None:
            details.append(f"best, at step {results['best_step']:,}")
        if prefix == "average_eval_":
            details.append("it is model/" if results.get("kept") == "average" else "not better, so not kept")
        if results.get(before) is not None:
            details.append(f"before training {percent(results[before])}")
        figures.append((f"WER on {name}", percent(wer), "; ".join(details)))
        if (cer := results.get(f"{prefix}cer")) is not None:
            figures.append((f"CER on {name}", percent(cer), ""))
    return tiles(figures) if figures else None


def curves(run: RunFolder) -> Markup:
    """The panels of the log."""
    if not run.log:
        return element("p", "The log holds no row yet.", class_="empty")
    hint = "Point at a curve, or focus it and use the arrow keys, to read its values."
    drawn = [draw_panel(panel, run.log, number) for number, panel in enumerate(PANELS)]
    return join(element("p", hint, class_="quiet"), element("div", drawn, class_="panels"))


def curve_data(run: RunFolder) -> list[dict[str, Any]]:
    """What the script shows of the panels, in their order."""
    return [panel_data(panel, run.log) for panel in PANELS]


def run_slices(run: RunFolder, scored: Collection[str]) -> Markup:
    """The last evaluation's groups of dev utterances; of `scored`, the page has a later evaluation."""
    parts = []
    if run.slices:
        parts += [
            element("h3", f"dev, at step {int(run.slices[0]['step']):,}"),
            rate_table(slice_rows(run.slices)),
        ]
    for name, split in (("eval_full_slices", "dev"), ("test_slices", "test")):
        if run.results.get(name) and split not in scored:
            parts += [element("h3", f"all of {split}, best model"), rate_table(slice_rows(run.results[name]))]
    return join(*parts) if parts else element("p", "No evaluation has been written yet.", class_="empty")


def cost_card(run: RunFolder) -> Markup:
    """What the run has cost; what the log does not say is not guessed."""
    if not run.log:
        return element("p", "The log holds no row yet.", class_="empty")
    cost = measure_cost(run.log, run.config, run.results)
    is_divided = MEANINGS["compute"] in cost.time_shares
    said = None if is_divided else "This log does not say how long updates waited for data and how long they computed."
    return join(facts(_cost_facts(cost, run)), element("p", said, class_="quiet") if said else None)


def _cost_facts(cost: Cost, run: RunFolder) -> dict[str, object]:
    last = run.log[-1]
    counts = {
        "bad_updates": "left out",
        "scaler_skips": "skipped by the scaler",
        "oom_retries": "out of memory, redone",
    }
    counted = [f"{int(last[name]):,} {meaning}" for name, meaning in counts.items() if last.get(name)]
    shares = "; ".join(f"{name} {share:.1%}" for name, share in cost.time_shares.items())
    return {
        "time of the run": format_seconds(cost.elapsed_seconds) if cost.elapsed_seconds else None,
        "time left": format_seconds(cost.remaining_seconds) if cost.remaining_seconds is not None else None,
        "share of the time": shares or None,
        "of the whole run": f"{cost.audio_hours_per_hour:.3g} hours of audio per hour"
        if cost.audio_hours_per_hour
        else None,
        "speed of updates": f"{cost.audio_rate / 3600:.4g} hours of audio per second ({cost.audio_rate:.3g} h per hour)"
        if cost.audio_rate
        else None,
        "utterances": f"{cost.utterance_rate:.3g} per second of updates" if cost.utterance_rate else None,
        "padding": f"{percent(cost.padding_fraction)} of what was computed"
        if cost.padding_fraction is not None
        else None,
        "evaluations": f"{cost.evaluations:,}",
        "updates": ", ".join([f"{cost.step:,} done", *counted]),
        "peak memory": format_bytes(cost.peak_memory_mb * MEGABYTE) if cost.peak_memory_mb else None,
    }


def checks(run: RunFolder) -> Markup | None:
    """What was checked before step 1, and who was left out; None where that is not known."""
    findings = run.preflight.get("findings")
    if not findings:
        return None
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in run.preflight.get("left_out", {}).items()) or "none"
    rows = [
        [element("span", one["verdict"], class_=one["verdict"]), one["check"],
         join(one["result"], element("small", one["remedy"]) if one["remedy"] else None)]
        for one in findings
    ]  # fmt: skip
    unusual = [row for row, one in zip(rows, findings, strict=True) if one["verdict"] != "ok"]
    headings = ("verdict", "check", "result")
    summary = f"{len(findings)} checks, {len(unusual)} of them with a warning"
    return join(
        facts({"training clips left out": left_out}),
        table(headings, unusual, class_="checks") if unusual else None,
        element("details", element("summary", summary), table(headings, rows, class_="checks")),
    )


def settings(config: Row) -> Markup | None:
    """config.yaml: what differs from the defaults first; None without it."""
    if not config:
        return None
    defaults = {
        field.name: field.default if field.default is not dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(TrainConfig)
    }
    changed = []
    for name, value in config.items():
        if isinstance(value, dict) and value:
            changed += [[f"{name}: {key}", _value(inner), ""] for key, inner in value.items()]
        elif name not in defaults or value != defaults[name]:
            changed.append([name, _value(value), _value(defaults.get(name, ""))])
    others = [[name, _value(value)] for name, value in config.items() if name in defaults and value == defaults[name]]
    return join(
        table(("setting", "value", "default"), changed, class_="settings"),
        element("details", element("summary", f"settings at their defaults ({len(others)})"),
                table(("setting", "value"), others, class_="settings")),
    )  # fmt: skip


def machine(environment: Row) -> Markup | None:
    """environment.json; None without it."""
    if not environment:
        return None
    flat = _flatten(environment)
    if isinstance(command := environment.get("command"), list):
        flat["command"] = element("code", shlex.join(map(str, command)))
    if environment.get("nvidia_smi"):
        flat["nvidia_smi"] = element("pre", environment["nvidia_smi"])
    return facts({name: _value(value) for name, value in flat.items()})


def evaluation_command(run: RunFolder, data_dir: str | None) -> str:
    """The command that makes what this report lacks: every utterance of the test set."""
    model, data = run.folder / "model", data_dir or run.config.get("data_dir") or "DATA_DIR"
    data = data if isinstance(data, str) else data[0]  # One set at a time is scored.
    return shlex.join(["python", "evaluate.py", "--model_name_or_path", str(model), "--data_dir", str(data)])


def _best_so_far(log: Sequence[Row], metric: str) -> Row:
    """Under the names of train_results.json, from the rows of an unfinished run behind step 0."""
    names = ("eval_wer", "eval_wer_low", "eval_wer_high", "eval_cer")
    scored = [row for row in log if "eval_wer" in row and row["step"]]
    # The moving average's figures, which have no limits, stand in columns of their own.
    averaged = [
        {"step": row["step"]} | {name: row.get(f"ema_{name}") for name in (*names, metric)}
        for row in scored
        if "ema_eval_wer" in row
    ]
    candidates = [row for row in (*scored, *averaged) if row.get(metric) is not None]
    if not candidates:
        return {}
    best = min(candidates, key=lambda row: row[metric])
    return {f"best_{name}": best.get(name) for name in names} | {"best_step": int(best["step"])}


def _range(low: float, high: float) -> str:
    return f"{100 * low:.2f} to {percent(high)}"


def _flatten(values: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {str(key): inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _value(value: object) -> object:
    if isinstance(value, Markup):
        return value
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
