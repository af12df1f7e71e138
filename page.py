"""The frame of a report, and the parts that its sections are made of: one HTML file without any other."""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from charts import bar_limit, interval_bar, percent, with_limits
from markup import Markup, element, join

TEMPLATES = Path(__file__).parent / "templates"
# The page reaches nothing outside of itself and runs no script but its own; bars have their lengths as inline styles.
POLICY = (
    "default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; media-src data:; "
    "base-uri 'none'; form-action 'none'"
)


@dataclass(frozen=True)
class RateRow:
    """One bar of a table of error rates.

    Attributes:
        group: of the utterances.
        kind: what the groups divide by; shown above the group.
        utterances: in the group.
        wer: with `low` and `high`, None where they are not known.
        cer: None where it is not known.
        is_small: too few utterances for a rate that says much.
    """

    group: str
    kind: str
    utterances: int
    wer: float
    low: float | None
    high: float | None
    cer: float | None = None
    is_small: bool = False


def render(title: str, body: Markup, data: Markup) -> str:
    """The whole file.

    Args:
        title: of the page.
        body: what is shown.
        data: blocks of JSON that the page's script reads.
    """
    script, style = (f"\n{(TEMPLATES / name).read_text(encoding='utf-8')}" for name in ("report.js", "report.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = Template((TEMPLATES / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=join(title),
        policy=POLICY.format(digest=digest),
        style=style,
        script=script,
        body=body,
        data=data,
    )


def section(identity: str, title: str, *children: object, level: int = 2) -> Markup:
    """A part of the page with a heading to link to."""
    return element("section", element(f"h{level}", title), *children, id=identity, aria_label=title)


def navigation(sections: Iterable[tuple[str, str]]) -> Markup:
    """Links to the sections, given as (identity, title)."""
    links = [element("li", element("a", title, href=f"#{identity}")) for identity, title in sections]
    return element("nav", element("ul", links), aria_label="sections")


def tiles(figures: Iterable[tuple[str, str, str]]) -> Markup:
    """The main figures: (name, value, what belongs to it)."""
    return element(
        "div",
        [
            element("div", element("span", name, class_="quiet"), element("b", value),
                    element("span", detail, class_="quiet") if detail else None, class_="tile")
            for name, value, detail in figures
        ],
        class_="tiles",
    )  # fmt: skip


def facts(pairs: Mapping[str, object]) -> Markup:
    """Names and values; a value of None is left out."""
    kept = [(name, value) for name, value in pairs.items() if value is not None]
    return element("dl", [join(element("dt", name), element("dd", value)) for name, value in kept], class_="facts")


def notes(lines: Sequence[str], title: str) -> Markup | None:
    """What a reader must know first; None without any."""
    if not lines:
        return None
    return element("div", element("b", title), element("ul", [element("li", line) for line in lines]), class_="notes")


def table(
    headings: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[int] = (), class_: str = ""
) -> Markup:
    """A table that sorts by its headings; cells of the columns in `numeric` are (value, text) or text."""

    def cell(value: object, column: int) -> Markup:
        if column not in numeric:
            return element("td", value)
        number, text = value
        return element("td", text, class_="number", data_value=number)

    head = [
        element("th", name, scope="col", class_="number" if column in numeric else None)
        for column, name in enumerate(headings)
    ]
    body = [element("tr", [cell(value, column) for column, value in enumerate(row)]) for row in rows]
    whole = element(
        "table", element("thead", element("tr", head)), element("tbody", body), class_=f"sortable {class_}".strip()
    )
    return element("div", whole, class_="scroll")


def rate_table(rows: Sequence[RateRow], heading: str = "group") -> Markup:
    """Error rates of groups of utterances as bars with their intervals."""
    limit = bar_limit([value for row in rows for value in (row.wer, row.high)])
    has_cer = any(row.cer is not None for row in rows)
    cells = []
    for row in rows:
        group = join(element("small", row.kind) if row.kind else None, row.group, " (few)" if row.is_small else None)
        bar = join(interval_bar(row.wer, row.low, row.high, limit), with_limits(row.wer, row.low, row.high))
        cer = [(row.cer, percent(row.cer))] if row.cer is not None else [(-1, "")]
        cells.append([group, (row.wer, bar), (row.utterances, f"{row.utterances:,}"), *(cer if has_cer else [])])
    headings = [heading, "WER", "clips", *(["CER"] if has_cer else [])]
    numeric = range(1, len(headings))
    said = element(
        "p", f"Bars reach to {percent(limit)} at the full width; the line is the 95 % interval.", class_="quiet"
    )
    return join(said, table(headings, cells, numeric, class_="bars"))


def slice_rows(slices: Iterable[Mapping[str, Any]]) -> list[RateRow]:
    """Rows of eval_slices.csv or of the slices of results.json, as `readback` reads them."""
    return [
        RateRow(
            one["group"], one["slice"], one["utterances"], one["wer"], one["wer_low"], one["wer_high"], one["cer"],
            one["is_small"],
        )
        for one in slices
    ]  # fmt: skip
