"""Honest splits: sentences, speakers and identical audio that train, dev and test share.

What is shared decides what a WER means. Identical audio is left out of training; the rest is said. Values are compared
by 64-bit hashes (195,000 of them collide once in a billion runs). N: training utterances.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from audio_checks import is_silent
from cache import FactCache
from corpora import SPLITS
from data import ShardDataset
from findings import Finding, Verdict, percent
from identities import NONE, distinct, identities, is_among

PAIRS = (("train", "dev"), ("train", "test"), ("dev", "test"))
# One dev sentence in ten known from training moves a WER by more than most changes of a recipe do.
SHARED_SENTENCES_LIMIT = 0.1
# Digits and commands: where training has every sentence this often, to know the sentences is the task.
CLOSED_SET_REPEATS = 10
# Clips get into two splits by mistake; one in 100 is no mistake with a single clip, but in how the splits were made.
SHARED_AUDIO_LIMIT = 0.01
# Repeated training clips only weigh double; from one in ten on they are the corpus.
REPEATED_AUDIO_LIMIT = 0.1
SHOWN_CHARACTERS = 60
# The check that needs no texts.
SHARED_AUDIO = "shared audio"
NO_ROW = -1


@dataclass(frozen=True)
class Overlap:
    """What the splits share.

    Attributes:
        findings: one each for sentences, speakers and audio.
        leaked: training rows to leave out, bool [N], by reason: `audio_in_dev` and `audio_in_test`; a row that is in
            both is in the first only.
        details: by reason, a function from such a row to the other utterance's name.
    """

    findings: list[Finding]
    leaked: Mapping[str, np.ndarray]
    details: Mapping[str, Callable[[int], str]]


def find_overlap(sets: Mapping[str, ShardDataset], cache: FactCache | None = None, max_examples: int = 3) -> Overlap:
    """Compare the splits in `sets`, pair by pair; "train" must be among them. With `cache`, once for the same data.

    Empty texts, unknown speakers and silent clips are equal to nothing.
    """
    sets = {split: sets[split] for split in SPLITS if split in sets}

    def compare() -> dict[str, np.ndarray]:
        return _compare(sets, max_examples)

    fingerprints = {split: dataset.fingerprint for split, dataset in sets.items()}
    shapes = {"findings": ()} | {f"twin_in_{split}": (len(sets["train"]),) for split in sets if split != "train"}
    found = compare() if cache is None else cache.get("overlap", [fingerprints, max_examples], compare, shapes)
    findings = [Finding(**fields) for fields in json.loads(str(found["findings"]))]
    leaked, details, taken = {}, {}, np.zeros(len(sets["train"]), bool)
    for split in [split for split in sets if split != "train"]:
        twin_N, reason = found[f"twin_in_{split}"], f"audio_in_{split}"
        details[reason] = _naming_twin(sets, split, twin_N)
        leaked[reason] = (twin_N != NO_ROW) & ~taken
        taken |= leaked[reason]
    return Overlap(findings, leaked, details)


def _compare(sets: Mapping[str, ShardDataset], max_examples: int) -> dict[str, np.ndarray]:
    """The findings as JSON, and for each other split the row with the same audio as a training row, or NO_ROW, [N]."""
    pairs = [(known, scored) for known, scored in PAIRS if known in sets and scored in sets]
    who = {split: identities(dataset) for split, dataset in sets.items()}
    audio = {split: _Hashes(who[split].clips, ~is_silent(dataset)) for split, dataset in sets.items()}
    twins = {f"twin_in_{split}": _twins(audio["train"], audio[split]) for split in sets if split != "train"}
    num_leaked = int(np.any([twin_N != NO_ROW for twin_N in twins.values()], axis=0).sum()) if twins else 0
    findings = [
        _compare_sentences(sets, pairs, {split: _given(one.sentences) for split, one in who.items()}, max_examples),
        _compare_speakers(sets, pairs, {split: _given(one.speakers) for split, one in who.items()}, max_examples),
        _compare_audio(sets, pairs, audio, num_leaked, max_examples),
    ]
    return {"findings": np.asarray(json.dumps([asdict(finding) for finding in findings])), **twins}


@dataclass(frozen=True)
class _Hashes:
    """Hash [M] of every row's value, and whether it has one."""

    values: np.ndarray
    known: np.ndarray

    @property
    def of_known(self) -> np.ndarray:
        return self.values[self.known]


@dataclass(frozen=True)
class _Shared:
    """Of one pair: rows of the scored split whose value the other has, and how many values that are."""

    rows: np.ndarray
    num_values: int
    num_values_of_all: int
    num_rows_of_all: int

    @property
    def share(self) -> float:
        return len(self.rows) / self.num_rows_of_all

    def facts(self) -> dict:
        return {"utterances": len(self.rows), "share": self.share, "values": self.num_values}


def _given(values: np.ndarray) -> _Hashes:
    return _Hashes(values, values != NONE)


def _shared(known: _Hashes, scored: _Hashes) -> _Shared:
    rows = np.flatnonzero(scored.known & is_among(scored.values, distinct(known.of_known)))
    num_values, num_of_all = len(distinct(scored.values[rows])), len(distinct(scored.of_known))
    return _Shared(rows, num_values, num_of_all, len(scored.values))


def _twins(train: _Hashes, scored: _Hashes) -> np.ndarray:
    """For every training row the first row of the other split with the same value, or NO_ROW, [N]."""
    twin_N = np.full(len(train.values), NO_ROW, np.int32)
    order = np.argsort(scored.values, kind="stable")
    order = order[scored.known[order]]
    if not len(order):
        return twin_N
    values = scored.values[order]
    places = np.minimum(np.searchsorted(values, train.values), len(values) - 1)
    found = train.known & (values[places] == train.values)
    twin_N[found] = order[places[found]]
    return twin_N


def _naming_twin(sets: Mapping[str, ShardDataset], split: str, twin_N: np.ndarray) -> Callable[[int], str]:
    return lambda row: f"the same samples as {split} utterance {sets[split][int(twin_N[row])].id}"


# ---------------------------------------------------------------------------------------------------------------------
# Findings


def _compare_sentences(
    sets: Mapping[str, ShardDataset], pairs: Sequence[tuple[str, str]], keys: Mapping[str, _Hashes], max_examples: int
) -> Finding:
    closed = len(keys["train"].of_known) >= CLOSED_SET_REPEATS * max(len(distinct(keys["train"].of_known)), 1)
    facts, said, worst = {}, [], 0.0
    for known, scored in pairs:
        shared = _shared(keys[known], keys[scored])
        rows = _first_of_each(keys[scored], shared.rows)[:max_examples]
        examples = [_shortened(sets[scored][int(row)].text) for row in rows]
        facts[f"{known}-{scored}"] = shared.facts() | {"examples": examples}
        if known == "train":
            worst = max(worst, shared.share)
            said.append(_sentences_said(shared, scored, examples, closed))
    facts["closed_set"] = closed
    result = "; ".join(said) or "no dev or test split to compare sentences with"
    if closed or worst <= SHARED_SENTENCES_LIMIT:
        return Finding("shared sentences", result, facts=facts)
    remedy = "for the WER on sentences never seen prepare again with --split_by sentence"
    return Finding("shared sentences", result, "warning", remedy, facts)


def _sentences_said(shared: _Shared, scored: str, examples: list[str], closed: bool) -> str:
    if not len(shared.rows):
        return f"no {scored} sentence is in training: the {scored} WER is that of unseen sentences"
    counts = (
        f"{percent(shared.share)} of the {scored} utterances ({len(shared.rows):,}; {shared.num_values:,} of "
        f"{shared.num_values_of_all:,} sentences) have a sentence that is also in training"
    )
    if closed:
        return f"{counts}: a closed set, the {scored} WER says how well known phrases are told apart"
    named = ", ".join(f'"{text}"' for text in examples)
    return f"{counts} ({named}): on these the {scored} WER says how well the model repeats known sentences"


def _compare_speakers(
    sets: Mapping[str, ShardDataset],
    pairs: Sequence[tuple[str, str]],
    speakers: Mapping[str, _Hashes],
    max_examples: int,
) -> Finding:
    facts, said = {}, []
    for known, scored in pairs:
        shared = _shared(speakers[known], speakers[scored])
        rows = _first_of_each(speakers[scored], shared.rows)[:max_examples]
        examples = [_shortened(name) for name in sets[scored].column("speaker", rows)]
        unknown = {split: int((~speakers[split].known).sum()) for split in (known, scored)}
        facts[f"{known}-{scored}"] = shared.facts() | {"examples": examples, "unknown": unknown}
        if known == "train":
            comparable = speakers[known].known.any() and speakers[scored].known.any()
            text = _speakers_said(shared, scored, examples) if comparable else f"{scored} voices cannot be compared"
            said.append(text + _unknown_said(unknown, sets))
    result = "; ".join(said) or "no dev or test split to compare speakers with"
    return Finding("shared speakers", result, facts=facts)


def _speakers_said(shared: _Shared, scored: str, examples: list[str]) -> str:
    if not shared.num_values:
        return f"no {scored} speaker ({shared.num_values_of_all:,} in all) is in training: WER on new voices"
    if shared.num_values == shared.num_values_of_all:
        whose = f"all {scored} speakers ({shared.num_values:,}) are in training: WER on known voices"
        return f"{whose}, new ones will be recognised less well (--split_by speaker measures it)"
    return (
        f"{shared.num_values:,} of {shared.num_values_of_all:,} {scored} speakers ({', '.join(examples)}) are in "
        f"training, with {percent(shared.share)} of its utterances: the WER mixes known and new voices"
    )


def _unknown_said(unknown: Mapping[str, int], sets: Mapping[str, ShardDataset]) -> str:
    counts = [f"{count:,} of {len(sets[split]):,} in {split}" for split, count in unknown.items() if count]
    return f" (speaker unknown: {', '.join(counts)})" if counts else ""


def _compare_audio(
    sets: Mapping[str, ShardDataset],
    pairs: Sequence[tuple[str, str]],
    audio: Mapping[str, _Hashes],
    num_leaked: int,
    max_examples: int,
) -> Finding:
    facts, said, remedies = {}, [], []
    for known, scored in pairs:
        shared = _shared(audio[known], audio[scored])
        examples = [sets[scored][int(row)].id for row in shared.rows[:max_examples]]
        facts[f"{known}-{scored}"] = shared.facts() | {"examples": examples}
        if len(shared.rows):
            said.append(
                f"{len(shared.rows):,} {scored} clips ({percent(shared.share)}: {', '.join(examples)}) are also in "
                f"{known}"
            )
        if shared.share > SHARED_AUDIO_LIMIT:
            remedies.append(f"look at how {scored} was divided from {known}, --split_by speaker or sentence does it")
    if num_leaked:
        said.append(f"{num_leaked:,} training clips are left out for it")
    facts["left_out"] = num_leaked
    facts["repeated_in_train"] = repeated = _count_repeated(audio["train"])
    if repeated:
        said.append(f"{repeated:,} training clips repeat another one and stay")
    if repeated > REPEATED_AUDIO_LIMIT * len(sets["train"]):
        remedies.append("remove repeated rows from the corpus and prepare again: each weighs double")
    verdict: Verdict = "warning" if remedies else "ok"
    result = "; ".join(said) or "no two clips are the same"
    return Finding(SHARED_AUDIO, result, verdict, "; ".join(remedies), facts)


def _count_repeated(audio: _Hashes) -> int:
    return len(audio.of_known) - len(distinct(audio.of_known))


def _first_of_each(hashes: _Hashes, rows: np.ndarray) -> np.ndarray:
    """Of `rows` the first with each value, ascending."""
    return np.sort(rows[np.unique(hashes.values[rows], return_index=True)[1]])


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "\u2026"
