"""A run or an evaluation as one HTML file, to look at, to search and to listen to: no server, no network.

    python report.py runs/en                      (a run of train.py, finished or not, with the evaluations inside it)
    python report.py runs/en/evaluation_test      (results of evaluate.py)
    python report.py runs/en --no_audio           (voices are personal data: leave them out of what is passed on)

Writes report.html into the folder, or --output. Clips come from the prepared data that the run or the results name, or
from --data_dir when it has moved. What a folder lacks is said in the page.
"""

from errors import UsageError, exit_status

# isort: split

import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import results_page
import run_page
from atomic import format_bytes, write_atomically
from clips import embed_clips, open_split
from config import ReportConfig, parse_arguments
from explorer import Explorer
from listing import Listed, UtteranceTable, scan
from markup import Markup, element, join, json_block
from page import navigation, notes, render, section
from progress import say
from readback import ResultsFolder, RunFolder, find_folders
from runlog import REPORT_FILE

# A page that a phone opens and a mail takes.
MAX_PAGE_BYTES = 10_000_000
# Of these, for the texts of the utterances of all evaluations together.
LISTING_BYTES = 2_500_000
# For what is said about clips after they have been embedded.
SPARE_BYTES = 20_000


@dataclass(frozen=True)
class Evaluated:
    """An evaluation, what its utterances count up to, and how they are shown; None without utterances.csv.

    `number` is its place in the page, which the identities of its elements end with.
    """

    number: int
    folder: ResultsFolder
    counted: UtteranceTable | None
    explorer: Explorer | None


def main() -> None:
    """Read, choose, embed, write, say."""
    config = parse_arguments(ReportConfig, sys.argv[1:], __doc__)
    folder = Path(config.folder)
    run, found = find_folders(folder)
    path = choose_output(config, folder)
    evaluations = [gather(one, number, config) for number, one in enumerate(found)]
    samples = gather_samples(run, config) if run is not None and run.samples else None
    explorers = [one.explorer for one in evaluations if one.explorer] + ([samples] if samples else [])
    for one in explorers:
        one.keep_within(LISTING_BYTES // len(explorers))
    data = [json_block(f"{one.identity}-utterances", one.data()) for one in explorers]
    title = f"{folder.resolve().name}: {'run' if run else 'evaluation' if len(found) == 1 else 'evaluations'}"

    def compose() -> bytes:
        body = show(title, run, evaluations, samples, config)
        clips = [json_block(f"{one.identity}-clips", one.clips) for one in explorers]
        panels = json_block("panels", run_page.curve_data(run)) if run else None
        return render(title, body, join(panels, data, clips)).encode("utf-8", "replace")

    add_clips(explorers, MAX_PAGE_BYTES - SPARE_BYTES - len(compose()), config)
    page = compose()
    write_atomically(path, page)
    say(f"written: {path} ({format_bytes(len(page))})", sys.stdout)


def choose_output(config: ReportConfig, folder: Path) -> Path:
    """--output, else report.html in the folder.

    Raises:
        UsageError: there is no such folder, or it is one.
    """
    path = Path(config.output) if config.output else folder / REPORT_FILE
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder: name a file, such as {path / REPORT_FILE}")
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no folder {path.parent}, make it first")
    return path


def gather(found: ResultsFolder, number: int, config: ReportConfig) -> Evaluated:
    """Count the utterances of an evaluation, and choose those to show.

    Raises:
        UsageError: utterances.csv is damaged, and nothing else is there.
    """
    if found.utterances is None:
        return Evaluated(number, found, None, None)
    try:
        counted = scan(found.utterances)
    except UsageError as error:
        if not found.results:
            raise
        found.missing.append(str(error))
        return Evaluated(number, found, None, None)
    split = [Path(found.results["data"])] if "data" in found.results else []
    if split and config.data_dir:
        split = [Path(config.data_dir) / split[0].name]
    explorer = Explorer(
        f"utterances-{number}", counted.read(counted.choose(config.seed)), len(counted), counted.facets, split,
        found.results.get("data_fingerprint"),
    )  # fmt: skip
    return Evaluated(number, found, counted, explorer)


def gather_samples(run: RunFolder, config: ReportConfig) -> Explorer:
    """The few utterances that a run writes out at every evaluation."""
    listed = [Listed(row["id"], row["reference"], row["prediction"]) for row in run.samples]
    data_dir = config.data_dir or run.config.get("data_dir")
    folders = data_dir if isinstance(data_dir, list) else [data_dir] if data_dir else []
    split = [Path(str(one)) / (run.config.get("eval_split") or "dev") for one in folders]
    return Explorer("samples", listed, len(listed), split=split)


def add_clips(explorers: Sequence[Explorer], max_bytes: int, config: ReportConfig) -> None:
    """Embed what fits into `max_bytes`, an equal part for each of the explorers that are left; say what does not."""
    said = set()
    for place, explorer in enumerate(explorers):
        if not config.audio:
            explorer.remarks.append("Clips are left out (--no_audio).")
            continue
        try:
            if not explorer.split:
                raise UsageError("the data is not named here: results.json or config.yaml is missing")
            dataset = open_split(explorer.split, explorer.fingerprint)
            explorer.clips = embed_clips(dataset, explorer.heard, max_bytes // (len(explorers) - place))
        except UsageError as error:
            remark = f"No clips: {error}. If the data lies elsewhere, give --data_dir."
            explorer.remarks.append(remark)
            if remark not in said:
                say(remark, sys.stderr)
            said.add(remark)
            continue
        max_bytes -= sum(map(len, explorer.clips.values()))
        explorer.remarks.append(describe_clips(explorer))


def describe_clips(explorer: Explorer) -> str:
    """How many can be heard, and why the others cannot."""
    wanted, embedded = len(explorer.heard), len(explorer.clips)
    if embedded < wanted:
        places = " + ".join(map(str, explorer.split))
        return (
            f"{embedded:,} of {wanted:,} clips can be heard; the others are not in {places}, or would make the "
            f"page larger than {format_bytes(MAX_PAGE_BYTES)}."
        )
    return f"{embedded:,} clips can be heard{': the worst and the random ones' if wanted < explorer.total else ''}."


def show(
    title: str, run: RunFolder | None, evaluations: Sequence[Evaluated], samples: Explorer | None, config: ReportConfig
) -> Markup:
    """The body of the page."""
    if run is None:
        # Several: the folder holds results folders, of models to be looked at side by side.
        sections = list(map(show_inside, evaluations)) if len(evaluations) > 1 else show_evaluation(*evaluations)
    else:
        curves = ("curves", "Curves", run_page.curves(run))
        sections = [curves, *map(show_inside, evaluations), *show_run(run, evaluations, samples, config)]
    now = datetime.datetime.now(datetime.timezone.utc)
    missing = [*(run.missing if run else [])]
    missing += [f"{one.folder.name}: {line}" for one in evaluations for line in one.folder.missing]
    return join(
        element("header",
                element("h1", title),
                element("p", run_page.state_line(run)) if run else None,
                notes(missing, "What this report lacks"),
                navigation((identity, name) for identity, name, _ in sections)),
        element("main",
                run_page.run_tiles(run) if run else None,
                [section(identity, name, content) for identity, name, content in sections]),
        element("footer", element("p", f"Made by report.py at {now:%Y-%m-%d %H:%M} UTC.", class_="quiet")),
    )  # fmt: skip


def show_run(
    run: RunFolder, evaluations: Sequence[Evaluated], samples: Explorer | None, config: ReportConfig
) -> list[tuple[str, str, Markup]]:
    """The sections of a run behind its curves and evaluations."""
    splits = {Path(str(one.folder.results.get("data", ""))).name for one in evaluations}
    parts = [("run-slices", "Slices while training", run_page.run_slices(run, scored=splits))]
    if samples is not None:
        step = element(
            "p", f"The same few utterances at every evaluation, here those of step {run.samples[0]['step']}."
        )
        parts.append(("samples-section", "Samples of dev", join(step, samples.show())))
    if not any(one.explorer for one in evaluations):
        command = element("p", element("code", run_page.evaluation_command(run, config.data_dir)), class_="command")
        said = "Utterances, confusions and durations come from evaluate.py; after this command the report shows them:"
        parts.append(("evaluate", "Every utterance", join(element("p", said), command)))
    parts.append(("cost", "Cost", run_page.cost_card(run)))
    optional = (
        ("checks", "Checks before step 1", run_page.checks(run)),
        ("settings", "Configuration", run_page.settings(run.config)),
        ("machine", "Environment", run_page.machine(run.environment)),
    )
    return parts + [part for part in optional if part[2] is not None]


def show_evaluation(one: Evaluated) -> list[tuple[str, str, Markup]]:
    """The sections of one evaluation."""
    results, counted = one.folder.results, one.counted
    parts = []
    if results:
        parts.append(
            ("figures", "Figures", join(results_page.results_tiles(results), results_page.results_facts(results)))
        )
    if one.folder.comparison:
        parts.append(("comparison", "Compared with another model", results_page.comparison(one.folder.comparison)))
    parts.append(("slices", "Slices", results_page.results_slices(results)))
    if counted is not None:
        parts += [
            ("list", "Utterances", one.explorer.show()),
            ("words", "Words taken for others", results_page.confusions(counted.words, "word")),
            ("characters", "Characters taken for others", results_page.confusions(counted.characters, "character")),
            ("durations", "Errors by duration", results_page.durations(counted)),
        ]
    parts.append(
        (
            "letters",
            "Letters found",
            results_page.letters(results.get("letters", {}), results.get("rare_in_training") or {}),
        )
    )
    return [(f"{identity}-{one.number}", title, content) for identity, title, content in parts if content is not None]


def show_inside(one: Evaluated) -> tuple[str, str, Markup]:
    """One evaluation of several, or of a run, as a section with parts of its own."""
    parts = show_evaluation(one)
    links = navigation((identity, title) for identity, title, _ in parts)
    content = join(links, [section(identity, title, content, level=3) for identity, title, content in parts])
    return f"evaluation-{one.number}", f"Evaluation: {one.folder.name}", content


if __name__ == "__main__":
    sys.exit(exit_status(main))
