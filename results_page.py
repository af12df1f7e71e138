"""The sections of a report that are about an evaluation: figures, slices, utterances, confusions, durations."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from alignment import Confusions
from charts import interval_bar, percent, with_limits
from letters import MIN_OCCURRENCES, name_found
from listing import UtteranceTable
from markup import Markup, element, join
from page import RateRow, facts, rate_table, slice_rows, table, tiles
from progress import format_seconds
from readback import Row
from result_layout import MIN_UTTERANCES
from text import visible

CONFUSIONS_SHOWN = 20
LETTERS_SHOWN = 20


def results_tiles(results: Row) -> Markup:
    """The figures of results.json."""
    figures = []
    for name, title in (("wer", "WER"), ("cer", "CER"), ("sentence_error_rate", "sentences with an error")):
        if results.get(name) is not None:
            low, high = results.get(f"{name}_low"), results.get(f"{name}_high")
            limits = "" if low is None or high is None else f"95 %: {100 * low:.2f} to {percent(high)}"
            figures.append((title, percent(results[name]), limits))
    if words := results.get("words"):
        total = max(words["hits"] + words["deletions"] + words["substitutions"], 1)
        for name, title in (("substitutions", "replaced"), ("deletions", "lost"), ("insertions", "inserted")):
            figures.append((f"words {title}", percent(words[name] / total), f"{words[name]:,} of {total:,}"))
    return tiles(figures)


def results_facts(results: Row) -> Markup:
    """What the figures cover."""
    unit, unknown = results.get("interval", {}), results.get("unknown_characters", {})
    covers = "" if unit.get("unit") == "speakers" else "; too few speakers are known for it to cover new voices"
    processes = results.get("processes", {})
    precision = {"no": "fp32"}.get(processes.get("mixed_precision"), processes.get("mixed_precision"))
    scored = (
        f"{results['utterances']:,} of {results['utterances_of_split']:,}"
        if {"utterances", "utterances_of_split"} <= results.keys()
        else None
    )
    seconds, taken = results.get("seconds"), results.get("seconds_taken")
    return facts(
        {
            "model": results.get("model"),
            "data": results.get("data"),
            "utterances": scored,
            "audio": f"{format_seconds(seconds)}, scored in {taken:.0f} s" if seconds and taken is not None else None,
            "precision": precision,
            "intervals": f"bootstrap over {unit['units']:,} {unit['unit']}{covers}" if unit else None,
            "text": ", ".join(f"{name} {value}" for name, value in results.get("text_rules", {}).items()) or None,
            "letters without a label": _counted(unknown.items()) if unknown else None,
            "WER on the texts as found": percent(results["raw_wer"]) if "raw_wer" in results else None,
            "near-ties": f"{results['near_ties']:,} of {results['frames']:,} frames, where another machine may decide "
            "otherwise"
            if {"near_ties", "frames"} <= results.keys()
            else None,
        }
    )


def results_slices(results: Row) -> Markup | None:
    """The slice table with intervals as bars; None without slices."""
    if not results.get("slices"):
        return None
    worst, said = results.get("worst_slice"), None
    if worst:
        named = f"{worst['slice']} {worst['group']}"
        beyond = "above the whole beyond chance" if worst["is_beyond_chance"] else "which may be chance"
        said = f"Worst: {named}, WER {with_limits(worst['wer'], worst['wer_low'], worst['wer_high'])}, {beyond}."
    return join(element("p", said) if said else None, rate_table(slice_rows(results["slices"])))


def durations(counted: UtteranceTable) -> Markup:
    """Error rate by the length of the clip."""
    rows = [
        RateRow(
            f"{low:g} to {high:g} s",
            "",
            count,
            wer.rate,
            _known(wer.low),
            _known(wer.high),
            is_small=count < MIN_UTTERANCES,
        )
        for low, high, count, wer in counted.by_duration()
    ]
    return rate_table(rows, "duration")


def comparison(facts_of_both: Row) -> Markup:
    """The paired difference of two models."""
    rows = []
    for place, kind in enumerate(("WER", "CER")):
        difference = facts_of_both["differences"][place]["interval"]
        clear = "chance does not explain it" if facts_of_both["is_clear"][place] else "may be chance"
        rates = [with_limits(*_limits(facts_of_both[name][place])) for name in ("other", "own")]
        rows.append([kind, *rates, f"{with_limits(*_limits(difference))}: {clear}"])
    said = f"{facts_of_both['utterances']:,} utterances that both have scored"
    if facts_of_both["left_out"]:
        said += f"; {facts_of_both['left_out']:,} left out"
    return join(
        element("p", said, class_="quiet"),
        table(("rate", facts_of_both["other_model"], "this model", "difference"), rows),
    )


def confusions(found: Confusions, unit: str) -> Markup:
    """The commonest replacements, losses and insertions of a unit: word or character."""
    total = max(found.reference_length, 1)
    replaced = [
        [_unit(said), _unit(heard), _count(count), _share(count / found.occurrences[said])]
        for (said, heard), count in _commonest(found.substitutions)
    ]
    lost = [[_unit(said), _count(count), _share(count / found.occurrences[said])]
            for said, count in _commonest(found.deletions)]  # fmt: skip
    inserted = [[_unit(heard), _count(count), _share(count / total)] for heard, count in _commonest(found.insertions)]
    kinds = (
        ("replaced", found.substitutions, (unit, "by", "times", f"of this {unit}"), replaced),
        ("lost", found.deletions, (unit, "times", f"of this {unit}"), lost),
        ("inserted", found.insertions, (unit, "times", f"per {unit}"), inserted),
    )
    parts = []
    for title, counts, headings, rows in kinds:
        shown = f", {len(rows)} of {len(counts):,} kinds shown" if len(rows) < len(counts) else ""
        heading = f"{counts.total():,} {title}{shown}"
        numeric = (len(headings) - 2, len(headings) - 1)
        parts.append(element("div", element("h3", heading), table(headings, rows, numeric) if rows else None))
    return element("div", parts, class_="columns")


def letters(found: Row, rare_in_training: Row) -> Markup | None:
    """The letters of the references that are found least; None without any that is frequent enough."""
    common = [(letter, one) for letter, one in found.items() if one["occurrences"] >= MIN_OCCURRENCES]
    worst = sorted(common, key=lambda item: item[1]["recall"])[:LETTERS_SHOWN]
    if not worst:
        return None
    rows = [
        [_unit(letter), (one["recall"], join(interval_bar(one["recall"], None, None, 1.0), percent(one["recall"]))),
         _count(one["occurrences"]), _mistaken(one)]
        for letter, one in worst
    ]  # fmt: skip
    rare = len(found) - len(common)
    said = f"Share of each letter's occurrences that are found at their place, the least first; {rare} letters with "
    said += f"fewer than {MIN_OCCURRENCES} occurrences are left out."
    if rare_in_training:
        named = ", ".join(f"{visible(letter)} {count}" for letter, count in rare_in_training.items())
        said += f" Seen fewer than {MIN_OCCURRENCES} times in the training text: {named}."
    headings = ("letter", "found", "occurrences", "instead, mostly")
    return join(element("p", said, class_="quiet"), table(headings, rows, (1, 2), "bars"))


def _mistaken(one: Row) -> str:
    """What most often stands in a letter's place; older results do not say."""
    if one.get("taken_for") is None:
        return ""
    return f"{name_found(one['taken_for'])}, {one.get('times') or 0:,} times"


def _unit(text: str) -> Markup:
    """A word or a character so that it can be seen: a space has no ink, and a mark needs a letter to stand on."""
    if text == " ":
        return element("span", "␣", title="space", aria_label="space")
    if len(text) == 1 and unicodedata.category(text).startswith("M"):
        name = unicodedata.name(text, f"U+{ord(text):04X}").lower()
        return join(element("bdi", f"◌{text}", title=name), element("small", name))
    return element("bdi", text)


def _commonest(counts: Counter) -> Sequence[tuple]:
    """The most frequent first; equal ones by name, so that the same results give the same page."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:CONFUSIONS_SHOWN]


def _count(count: int) -> tuple[int, str]:
    return count, f"{count:,}"


def _share(share: float) -> tuple[float, str]:
    return share, percent(share)


def _counted(items: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name!r} {count:,}" for name, count in list(items)[:LETTERS_SHOWN])


def _known(value: float) -> float | None:
    return None if value != value else value


def _limits(interval: Row) -> tuple[float, float | None, float | None]:
    return interval["rate"], *(None if interval[end] is None else _known(interval[end]) for end in ("low", "high"))
