"""The sections of a report that are about an evaluation: figures, slices, utterances, confusions, durations."""

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignment import Confusions, Pair, align_characters, align_words, count_errors, highlight
from charts import interval_bar, percent, with_limits
from listing import MIN_UTTERANCES, OTHER, RANDOM, WORST, Listed, UtteranceTable
from markup import Markup, element, join
from page import RateRow, facts, rate_table, slice_rows, table, tiles
from progress import format_seconds
from readback import Row

CONFUSIONS_SHOWN = 20
# A recall from fewer occurrences is a matter of chance; as on evaluate.py's screen.
MIN_OCCURRENCES = 20
LETTERS_SHOWN = 20
KINDS = (("", "all"), (WORST, "the worst"), (RANDOM, "the random ones"))


@dataclass
class Explorer:
    """Utterances that can be searched, sorted and heard.

    Attributes:
        identity: of the element and, with an ending, of its blocks of data.
        listed: the utterances, in the order of their importance.
        total: utterances of the evaluation.
        facets: columns to filter by, with their values.
        split: the prepared data that they are from; None where it is not known.
        fingerprint: of that data, where it is known.
        clips: base64 of MP3 by id.
        remarks: what is said about clips and listing.
    """

    identity: str
    listed: list[Listed]
    total: int
    facets: dict[str, list[str]] = field(default_factory=dict)
    split: Path | None = None
    fingerprint: str | None = None
    clips: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def heard(self) -> list[str]:
        """Ids whose clips belong into the page, the most important first: the worst and the random ones in turn."""
        kinds = {kind: [one.id for one in self.listed if one.kind == kind] for kind in (WORST, RANDOM)}
        if not kinds[WORST]:
            return [one.id for one in self.listed]
        longest = max(map(len, kinds.values()))
        return [ids[place] for place in range(longest) for ids in kinds.values() if place < len(ids)]

    def data(self, max_bytes: int) -> dict[str, object]:
        """What the page's script reads; the least important utterances that do not fit into `max_bytes` are left out.

        The worst and the random ones are always there.
        """
        shown, used = [], 0
        for one in self.listed:
            described = describe(one)
            used += len(json.dumps(described, ensure_ascii=False).encode("utf-8", "replace"))
            if used > max_bytes and one.kind == OTHER:
                break
            shown.append(described)
        if len(shown) < self.total:
            self.remarks.append(
                f"{len(shown):,} of {self.total:,} utterances are listed: the worst, the random ones, the next worst."
            )
        facets = [{"name": name, "values": values} for name, values in self.facets.items()]
        return {"utterances": shown, "facets": facets}

    def show(self) -> Markup:
        """The controls and an empty list, which the script fills."""
        has_kinds = any(one.kind for one in self.listed)
        has_seconds = any(one.seconds is not None for one in self.listed)
        controls = [
            _control("search in texts and ids", element("input", type="search", data_control="text"), class_="wide"),
            _control("show", _select("kind", KINDS)) if has_kinds else None,
            _control("only", _select_facet(self.facets)) if self.facets else None,
            _control("sort by", _select("order", _orders(has_seconds))),
        ]
        return element(
            "div",
            [element("p", remark, class_="quiet") for remark in self.remarks],
            _legend(),
            element("div", controls, class_="controls", role="search"),
            element("p", class_="status quiet", role="status"),
            element("ul", class_="list"),
            element("button", "show more", class_="more", type="button", hidden=True),
            element("noscript", element("p", "The utterances are shown by a script, which is switched off here.")),
            class_="explorer", id=self.identity,
            data_utterances=f"{self.identity}-utterances", data_clips=f"{self.identity}-clips",
        )  # fmt: skip


def describe(one: Listed) -> dict[str, object]:
    """An utterance for the page's script."""
    words = align_words(one.reference, one.hypothesis)
    errors, length = count_errors(words)
    character_errors, characters = count_errors(align_characters(one.reference, one.hypothesis))
    return {
        "id": one.id,
        "kind": one.kind,
        "seconds": None if one.seconds is None else round(one.seconds, 2),
        "errors": errors,
        "words": length,
        "rate": round(errors / max(length, 1), 5),
        "characterRate": round(character_errors / max(characters, 1), 5),
        "pairs": [_describe_pair(pair) for pair in words],
        "groups": one.groups,
    }


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
    scored = f"{results['utterances']:,} of {results['utterances_of_split']:,}" if "utterances" in results else None
    seconds = results.get("seconds")
    return facts(
        {
            "model": results.get("model"),
            "data": results.get("data"),
            "utterances": scored,
            "audio": f"{format_seconds(seconds)}, scored in {results['seconds_taken']:.0f} s" if seconds else None,
            "precision": precision,
            "intervals": f"bootstrap over {unit['units']:,} {unit['unit']}{covers}" if unit else None,
            "text": ", ".join(f"{name} {value}" for name, value in results.get("text_rules", {}).items()) or None,
            "letters without a label": _counted(unknown.items()) if unknown else None,
            "WER on the texts as found": percent(results["raw_wer"]) if "raw_wer" in results else None,
            "near-ties": f"{results['near_ties']:,} of {results['frames']:,} frames, where another machine may decide "
            "otherwise"
            if "near_ties" in results
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


def letters(found: Row) -> Markup | None:
    """The letters of the references that are found least; None without any that is frequent enough."""
    common = [(letter, one) for letter, one in found.items() if one["occurrences"] >= MIN_OCCURRENCES]
    worst = sorted(common, key=lambda item: item[1]["recall"])[:LETTERS_SHOWN]
    if not worst:
        return None
    rows = [
        [_unit(letter), (one["recall"], join(interval_bar(one["recall"], None, None, 1.0), percent(one["recall"]))),
         _count(one["occurrences"])]
        for letter, one in worst
    ]  # fmt: skip
    rare = len(found) - len(common)
    said = f"Share of each letter's occurrences that are found at their place, the least first; {rare} letters with "
    said += f"fewer than {MIN_OCCURRENCES} occurrences are left out."
    return join(element("p", said, class_="quiet"), table(("letter", "found", "occurrences"), rows, (1, 2), "bars"))


def _describe_pair(pair: Pair) -> object:
    said, found = pair
    if said == found:
        return said
    return list(pair) if said is None or found is None else list(highlight(said, found))


def _control(name: str, control: Markup, class_: str | None = None) -> Markup:
    return element("label", name, control, class_=class_)


def _select(name: str, options: Iterable[tuple[str, str]]) -> Markup:
    return element("select", [element("option", text, value=value) for value, text in options], data_control=name)


def _select_facet(facets: dict[str, list[str]]) -> Markup:
    groups = [
        element("optgroup", [element("option", value or "not given", value=f"{place},{number}")
                             for number, value in enumerate(values)], label=name)
        for place, (name, values) in enumerate(facets.items())
    ]  # fmt: skip
    return element("select", element("option", "all", value=""), groups, data_control="group")


def _orders(has_seconds: bool) -> list[tuple[str, str]]:
    orders = [("rate", "WER"), ("errors", "word errors"), ("characters", "CER")]
    if has_seconds:
        orders += [("longest", "duration, longest first"), ("shortest", "duration, shortest first")]
    return [*orders, ("id", "id")]


def _legend() -> Markup:
    samples = [("replaced", "replaced"), ("lost", "lost"), ("inserted", "inserted")]
    return element(
        "p", "Above what was said, below what the model found:",
        [element("span", text, class_=f"sample {kind}") for kind, text in samples], class_="legend",
    )  # fmt: skip


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
