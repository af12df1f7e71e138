"""Utterances with reference and hypothesis side by side, to be searched, sorted and heard in the page."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alignment import Pair, align_characters, align_words, count_errors, highlight
from listing import OTHER, RANDOM, RANDOM_SHOWN, WORST, WORST_SHOWN, Listed
from markup import Markup, element

CHOICE = f"The worst are the {WORST_SHOWN} with the highest WER; {RANDOM_SHOWN} of the others are drawn at random."
KINDS = (("", "all"), (WORST, "the worst"), (RANDOM, "the random ones"))


@dataclass
class Explorer:
    """Utterances that can be searched, sorted and heard.

    Attributes:
        identity: of the element and, with an ending, of its blocks of data.
        listed: the utterances, in the order of their importance.
        total: utterances of the evaluation.
        facets: columns to filter by, with their values.
        split: the folders of prepared data that they are from; none where that is not known.
        fingerprint: of that data, where it is known.
        clips: base64 of MP3 by id.
        remarks: what is said about clips and listing.
    """

    identity: str
    listed: list[Listed]
    total: int
    facets: dict[str, list[str]] = field(default_factory=dict)
    split: Sequence[Path] = ()
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

    def keep_within(self, max_bytes: int) -> None:
        """Leave out the least important utterances whose texts do not fit; the worst and the random ones stay."""
        used, kept = 0, []
        for one in self.listed:
            used += len(json.dumps(describe(one), ensure_ascii=False).encode("utf-8", "replace"))
            if used > max_bytes and one.kind == OTHER:
                break
            kept.append(one)
        self.listed = kept
        if len(kept) < self.total:
            self.remarks.append(
                f"{len(kept):,} of {self.total:,} utterances are listed: the worst, the random ones, the next worst."
            )

    def data(self) -> dict[str, object]:
        """What the page's script reads."""
        facets = [{"name": name, "values": values} for name, values in self.facets.items()]
        return {"utterances": list(map(describe, self.listed)), "facets": facets}

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
            element("p", CHOICE, class_="quiet") if has_kinds else None,
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
