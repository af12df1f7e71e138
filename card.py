"""The model card: README.md of model/, with what the run knows of its data, texts, figures, settings and limits.

The front matter is the Hugging Face Hub's, which shows the figures of `model-index` beside the model
(https://huggingface.co/docs/hub/model-cards). Rates are fractions there, as in train_results.json, and percent in the
text. No sentence, speaker or path of the corpus is quoted: a card is made to be published.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData

import levers
from atomic import write_atomically
from audio import SAMPLE_RATE_HZ
from coverage import commonest
from data import ShardDataset
from findings import percent
from integrity import read_sealed
from joined import CORPUS, members, name_sets
from levers import METRICS
from sampling import GROUPS_SHOWN
from scoring import limits_of

if TYPE_CHECKING:
    from pretraining_run import PretrainingRun
    from run import Run
    from training_run import TrainingRun

Results = Mapping[str, float]
Intervals = Mapping[str, tuple[float, float]]

TASK = "automatic-speech-recognition"
# Name in train_results.json, the split, what it is.
FIGURES = (
    ("best_eval_wer", "dev", "WER"),
    ("best_eval_cer", "dev", "CER"),
    ("test_wer", "test", "WER"),
    ("test_cer", "test", "CER"),
    ("test_wer_seen_speakers", "test", "WER, voices heard in training"),
    ("test_wer_unseen_speakers", "test", "WER, voices not heard in training"),
    ("test_raw_wer", "test", "WER against the texts as found"),
)
MAX_CHARACTERS_NAMED = 120
UNKNOWN_CHARACTERS_NAMED = 8


def write_card(folder: Path, run: "Run", results: Results, intervals: Intervals | None = None) -> None:
    """README.md of a model folder.

    Args:
        folder: holds the weights.
        run: what made them.
        results: figures by their names in train_results.json; those of the test set come at the end of a run.
        intervals: low and high end of the 95 % interval of a figure, by the same names; those of `results`, in NAME_low
            and NAME_high, when not given.

    Raises:
        RunFailed: disk full or not writable; an older card is as it was.
    """
    if intervals is None:
        found = ((name, limits_of(results, name)) for name, _, _ in FIGURES)
        intervals = {name: limits for name, limits in found if limits is not None}
    write_atomically(folder / "README.md", model_card(run, results, intervals))


def write_pretraining_card(folder: Path, run: "PretrainingRun") -> None:
    """README.md of an encoder that was pre-trained: where it is from, what it heard, how to go on.

    Raises:
        RunFailed: disk full or not writable; an older card is as it was.
    """
    state, config, masks = run.state, run.config, run.config.masks
    hours = float(run.plan.num_samples.sum(dtype=np.int64)) / SAMPLE_RATE_HZ / 3600
    base = config.model_name_or_path
    origin = "from random weights" if base is None else f"further, from {_base_model(run)},"
    front = ModelCardData(
        language=_languages(run) or None,
        library_name="transformers",
        tags=["pretraining", "speech", run.hf_config.model_type],
        base_model=None if _is_folder(run) else base,
        model_name=_name(run),
    ).to_yaml()
    done = "" if state.step == run.total_steps else f" ({state.step:,} of them done when this was written)"
    blocks = [
        f"---\n{front}\n---",
        f"# {_name(run)}",
        f"A speech encoder, pre-trained {origin} on {len(run.plan.rows):,} untranscribed utterances ({hours:.2f} h) of "
        f"`{_data_name(run)}`, in {run.total_steps:,} updates{done} of {state.utterances_per_update} utterances. It "
        "has no head and no vocabulary: it cannot write before it is fine-tuned.",
        "## Use",
        _code(["from transformers import Wav2Vec2Model", "encoder = Wav2Vec2Model.from_pretrained('.')"]),
        "To fine-tune it, name this folder as `--model_name_or_path` of train.py, with `--vocabulary train`.",
        "## Figures",
        _table(
            ["figure", "value"],
            [["dev loss", f"{state.best_metric:.4f} at update {state.best_step}"]] if state.best_step else [],
        ),
        "## Training",
        f"Contrastive and diversity loss of wav2vec 2.0; masks: mask_time_prob {masks.mask_time_prob:g} in spans of "
        f"{masks.mask_time_length} frames; learning rate {config.learning_rate:g} ({config.lr_scheduler_type}, "
        f"{run.schedule.warmup_steps} warm-up); seed {config.seed}.",
    ]
    write_atomically(folder / "README.md", "\n\n".join(blocks) + "\n")


def usage(model: Path | str, clip: Path | str) -> list[str]:
    """Statements of Python that print the text of a clip; `pipeline` opens a file name only where there is ffmpeg."""
    return [
        "import soundfile",
        "from transformers import pipeline",
        f"raw, rate = soundfile.read('{clip}')",
        f"recognise = pipeline('{TASK}', model='{model}')",
        "print(recognise({'raw': raw, 'sampling_rate': rate})['text'])",
    ]


def model_card(run: "Run", results: Results, intervals: Intervals) -> str:
    """The card as text: front matter and Markdown."""
    sections = {
        "Figures": _figures(run, results, intervals),
        "Use": ["In this folder (elsewhere, its path takes the place of the dot):", _code(usage(".", "CLIP.wav"))],
        "Data": _data(run),
        "Text": _text(run),
        "Training": _training(run),
        "Limits": _bullets(_limits(run, results)),
    }
    blocks = [f"---\n{_front_matter(run, results)}\n---", f"# {_name(run)}", _introduction(run)]
    for title, paragraphs in sections.items():
        blocks += [f"## {title}", *paragraphs]
    return "\n\n".join(blocks) + "\n"


def _front_matter(run: "Run", results: Results) -> str:
    data = _data_name(run)
    figures = [
        EvalResult(
            task_type=TASK, dataset_type=data, dataset_name=data, dataset_split=_split(run, split),
            metric_type=kind.lower(), metric_name=kind, metric_value=results[name],
        )
        for name, split, kind in FIGURES
        if kind in ("WER", "CER") and _is_known(results, name)
    ]  # fmt: skip
    return ModelCardData(
        language=_languages(run) or None,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=[TASK, "ctc", run.hf_config.model_type],
        base_model=None if _is_folder(run) else run.config.model_name_or_path,
        metrics=["wer", "cer"],
        model_name=_name(run),
        eval_results=figures,
    ).to_yaml()


def _introduction(run: "Run") -> str:
    state, base = run.state, run.config.model_name_or_path
    origin = "trained from random weights" if base is None else f"fine-tuned from {_base_model(run)}"
    goes_on = "" if state.step == run.total_steps else f"; the run was at update {state.step} when this was written"
    if state.stopped_early_at_step is not None:
        goes_on = f"; the run stopped early at update {state.step}, no longer getting better"
    return f"A {run.hf_config.model_type} model with a CTC head, {origin}. {_weights(run)}{goes_on}."


def _weights(run: "Run") -> str:
    """What they are of, as the run chose them."""
    state, lowest = run.state, f"which had the lowest {_split(run, 'dev')} {METRICS[run.config.metric_for_best_model]}"
    update = f"update {state.best_step} of {run.total_steps}, {lowest}"
    if state.best_weights == "ema":
        decay = f"an exponential moving average (decay {run.config.ema_decay:g})"
        return f"Its weights are {decay} of those up to {update}"
    if state.best_weights == "average":
        steps = ", ".join(str(step) for step in run.best.averaged_steps)
        return f"Its weights are the mean of those at updates {steps} of {run.total_steps}, {lowest}"
    return f"Its weights are those after {update}"


# --- Figures -------------------------------------------------------------------------------------------------------


def _figures(run: "Run", results: Results, intervals: Intervals) -> list[str]:
    columns = ["figure", "this model", *(["95 % interval"] if intervals else []), "before training"]
    rows = []
    for name, split, kind in FIGURES:
        if not _is_known(results, name):
            continue
        before = f"{name.replace('best_', '')}_before"
        interval = f"{100 * intervals[name][0]:.2f} to {_percent(intervals[name][1])}" if name in intervals else "-"
        rows.append(
            [
                f"{_split(run, split)} {kind}",
                _percent(results[name]),
                *([interval] if intervals else []),
                _percent(results[before]) if _is_known(results, before) else "-",
            ]
        )
    scored = [f"{len(run.eval_rows):,} of {len(run.eval_set):,} {_split(run, 'dev')} utterances"]
    if _is_known(results, "test_wer"):
        scored.append(f"all {len(run.test_set):,} test utterances")
    how = (
        "Error rates of greedy decoding without a language model, on normalised texts (see Text): errors of all "
        f"utterances over words or characters of all references. Scored: {' and '.join(scored)}."
    )
    return [how, _table(columns, rows)]


# --- Data, texts, settings -----------------------------------------------------------------------------------------


def _data(run: "Run") -> list[str]:
    hours = run.plan.num_samples.sum(dtype="int64") / SAMPLE_RATE_HZ / 3600
    rows = [
        [_named(run, one), f"{len(one):,}", f"{one.seconds / 3600:.2f}", f"`{one.fingerprint}`"]
        for dataset in run.sets.values()
        for one in members(dataset)
    ]
    left_out = [f"- training: {_counts(run.selection.drops_by_reason)}"]
    for dataset in run.sets.values():
        for one in members(dataset):
            prepared = read_sealed(one.folder.parent / "prepare.json")["splits"][one.folder.name]
            left_out.append(f"- preparing, {_named(run, one)}: {_counts(prepared.get('dropped', {}))}")
    return [
        f"Prepared data `{_data_name(run)}`. Trained on {len(run.plan.rows):,} utterances, {hours:.2f} hours.",
        *_sampled(run),
        _table(["split", "utterances", "hours", "fingerprint"], rows),
        "Left out, with the number of utterances by reason:",
        "\n".join(left_out),
    ]


def _named(run: "Run", one: ShardDataset) -> str:
    """A split, with its set where there are several."""
    split, folders = one.folder.name, run.config.data_dirs
    return split if len(folders) == 1 else f"{name_sets(folders)[folders.index(one.folder.parent)]} {split}"


def _data_name(run: "TrainingRun") -> str:
    return " + ".join(name_sets(run.config.data_dirs))


def _sampled(run: "Run") -> list[str]:
    """What an epoch hears where that is not each utterance once."""
    if run.sampling is None:
        return []
    columns = ["set", run.sampling.column, "utterances", "hours", "drawn per epoch"]
    # Groups of people, and whatever else a corpus says of them, are only counted: the card is made to be published.
    rows = [
        [
            one.corpus or "all", one.name if run.sampling.column == CORPUS else f"group {number}",
            f"{one.num_clips:,}", f"{one.hours:.2f}", f"{one.draws:,}",
        ]
        for number, one in enumerate(run.sampling.groups[:GROUPS_SHOWN], 1)
    ]  # fmt: skip
    more = len(run.sampling.groups) - len(rows)
    return ["What an epoch draws:" + (f" ({more:,} more groups)" if more else ""), _table(columns, rows)]


def _text(run: "Run") -> list[str]:
    rules, characters = run.normalizer, sorted(run.vocabulary.characters - {" "})
    named = f": {_verbatim(''.join(characters))}" if len(characters) <= MAX_CHARACTERS_NAMED else ""
    removed = rules.characters_to_ignore
    names = ", ".join(own.name for own in rules.languages)
    language = [f"rules of writing: {names}"] if names else []
    return _bullets(
        [
            *language,
            f"case: {rules.case}",
            f"characters removed: {_verbatim(removed) if removed else 'none'}",
            f"vocabulary: {len(run.vocabulary)} outputs, {len(characters)} characters{named}",
        ]
    )


def _training(run: "Run") -> list[str]:
    config, size = run.config, run.state.utterances_per_update
    updates = run.total_steps if run.state.stopped_early_at_step is None else run.state.stopped_early_at_step
    frozen = ", feature encoder frozen" if config.freeze_feature_encoder else ""
    return _bullets(
        [
            f"base model: {'none, random weights' if config.model_name_or_path is None else _base_model(run)}{frozen}",
            f"updates: {updates:,} of {size} utterances, {updates / run.plan.updates_per_epoch:.1f} epochs"
            f"{'' if updates == run.total_steps else f', of {run.total_steps:,} that were planned'}",
            f"learning rate: {config.learning_rate:g}, {config.lr_scheduler_type}, {run.schedule.warmup_steps} warm-up "
            f"updates; weight decay {config.weight_decay:g}",
            *([f"also: {_verbatim(turned_on)}"] if (turned_on := levers.describe(config)) else []),
            f"precision: {run.accelerator.mixed_precision} (the launcher's mixed precision; the weights are fp32)",
            f"seed: {config.seed}",
            f"made with transformers {transformers.__version__} and torch {torch.__version__}",
        ]
    )


# --- Limits --------------------------------------------------------------------------------------------------------


def _limits(run: "Run", results: Results) -> list[str]:
    seconds = run.plan.num_samples / SAMPLE_RATE_HZ
    limits = [
        f"It takes mono audio of {SAMPLE_RATE_HZ // 1000} kHz, and was trained on clips of {seconds.min():.1f} to "
        f"{seconds.max():.1f} s.",
        "WER and CER are those of normalised texts: it writes neither another case than that above nor a character "
        "that was removed.",
        f"The {_split(run, 'dev')} figures are the best of the evaluations of this run, chosen by this very "
        f"{METRICS[run.config.metric_for_best_model]}.",
    ]
    if run.eval_set is run.train_set:
        limits.append("The train figures are of utterances that it was trained on: how well it knows them by heart.")
    if not _is_known(results, "test_wer"):
        limits.append("No test set has been scored." if run.test_set is None else "The test set is not scored yet.")
    languages = ", ".join(_languages(run))
    limits.append(
        f"Language, as the corpus names it: {languages}." if languages else "The data does not name its language."
    )
    limits += [
        f"At update {entry['step']} the run went on although this had changed: {', '.join(entry['changed'])}."
        for entry in run.state.resumed_anyway
    ]
    return [*limits, *_unknown_characters(run), *_shared(run)]


def _languages(run: "TrainingRun") -> list[str]:
    """Common Voice's column of that name."""
    if "locale" not in run.train_set.column_names:
        return []
    return sorted(set(run.train_set.column("locale")) - {""})


def _unknown_characters(run: "Run") -> list[str]:
    said = []
    for split, texts in run.texts.items():
        if texts.coverage.unknown:
            unknown = commonest(texts.coverage.unknown)[:UNKNOWN_CHARACTERS_NAMED]
            named = ", ".join(f"{_verbatim(character)} {count:,}" for character, count in unknown)
            share = percent(texts.coverage.unknown_fraction)
            said.append(f"It cannot write {share} of the characters of the {split} texts, among them {named}.")
    return said


SHARED = {
    "sentences": "a sentence that is also in",
    "speakers": "a speaker who is also in",
    "audio": "the very audio (which is not trained on) of a clip of",
}


def _shared(run: "Run") -> list[str]:
    """What the scored splits share with the whole training split, as the preflight counted it."""
    said = []
    for finding in run.overlap.findings:
        what = SHARED[finding.check.removeprefix("shared ")]
        for split in [split for split in run.sets if split != "train"]:
            facts = finding.facts[f"train-{split}"]
            who = f"{facts['utterances']:,} {split} utterances ({percent(facts['share'])}) have"
            if not facts["utterances"]:
                who = f"No {split} utterance has"
            said.append(f"{who} {what} the training split{_unknown_speakers(facts)}.")
    return said


def _unknown_speakers(facts: Mapping[str, object]) -> str:
    unknown = [f"{count:,} in {split}" for split, count in facts.get("unknown", {}).items() if count]
    return f" (speaker unknown: {', '.join(unknown)})" if unknown else ""


# --- Words and Markdown --------------------------------------------------------------------------------------------


def _name(run: "TrainingRun") -> str:
    return run.folder.resolve().name


def _split(run: "Run", split: str) -> str:
    """`dev` is what the run evaluates on, which --eval_split may have made the training split."""
    return run.eval_set.folder.name if split == "dev" else split


def _is_folder(run: "TrainingRun") -> bool:
    name = run.config.model_name_or_path
    return name is not None and Path(name).expanduser().is_dir()


def _base_model(run: "TrainingRun") -> str:
    """A folder by its name alone: its path means nothing elsewhere."""
    name = run.config.model_name_or_path
    return f"the folder {Path(name).expanduser().resolve().name}" if _is_folder(run) else name


def _is_known(results: Results, name: str) -> bool:
    return results.get(name) is not None


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f} %"


def _counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.items()) or "none"


def _bullets(lines: list[str]) -> list[str]:
    return ["\n".join(f"- {line}" for line in lines)]


def _table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])


def _code(lines: list[str]) -> str:
    return "\n".join(["```python", *lines, "```"])


def _verbatim(text: str) -> str:
    """A code span, in which Markdown changes nothing, a backtick included."""
    return f"`` {text} ``"
