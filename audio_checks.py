"""Checks of the audio from what prepare.py measured: no clip is read again.

N: utterances of a split. A warning is for what a user should act on; the rest is said and passes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from audio import SAMPLE_RATE_HZ
from corpora import SPLITS
from data import ShardDataset
from findings import Finding, Verdict, percent

# -80 dB of full scale, three steps of 16 bits: dither and rounding, no speech.
SILENT_RMS = 1e-4
# -60 dB: speech in five of 16 bits. The quietest clip of a real corpus (Free Spoken Digits) has -54 dB.
QUIET_RMS = 1e-3
# Real clips whose peaks only touch full scale stay below it; speech amplified 6 dB too far has 0.9 % in the median.
CLIPPED_SAMPLES_SHARE = 0.002
# A converter at fault; sound ones, the worst voice of Free Spoken Digits (0.8 %) included, stay below it.
DC_OFFSET_LIMIT = 0.02
# Half of a telephone's 8 kHz, with the slope of a resampler.
NARROW_BAND_HZ = 4_200
# A few silent clips teach nothing bad; one in 1,000 is a fault in the making of the corpus.
SILENT_SHARE_LIMIT = 0.001
# More than half of the training clips without sound: nothing can be learned from what is left.
SILENT_SHARE_REFUSED = 0.5
# Bad recordings are part of every corpus; from a tenth on they are the corpus.
BAD_SHARE_LIMIT = 0.1
# Bands of training and test that differ for half of the clips are another task, not other recordings.
BAND_DIFFERENCE_LIMIT = 0.5
# A third of the computation, and blanks where nothing is said; read speech (Common Voice) has 2 to 8 %.
EDGE_SILENCE_LIMIT = 1 / 3


def check_audio(sets: Mapping[str, ShardDataset], max_examples: int = 3) -> list[Finding]:
    """Judge the clips of train, dev and test (those of them in `sets`) by the stored columns.

    Args:
        sets: dataset by split name.
        max_examples: ids named per split and finding, the worst first.
    """
    sets = {split: sets[split] for split in SPLITS if split in sets}
    findings = [_apply(rule, sets, max_examples) for rule in RULES]
    return [*findings, _band(sets), _edge_silence(sets, max_examples), _longest(sets, max_examples)]


def is_silent(dataset: ShardDataset) -> np.ndarray:
    """Silent and constant clips, bool [N]."""
    return dataset.numpy_column("rms") < SILENT_RMS


@dataclass(frozen=True)
class _Rule:
    """Clips whose `badness` [N] is positive are bad; in `splits` a share over `limit` is worth a warning."""

    check: str
    name: str
    badness: Callable[[ShardDataset], np.ndarray]
    limit: float
    splits: tuple[str, ...]
    remedy: str
    refused_limit: float = 1.0
    """A larger share of the training clips is refused."""


RULES = (
    _Rule(
        "audio silence",
        "silent or constant",
        lambda dataset: np.float32(SILENT_RMS) - dataset.numpy_column("rms"),
        SILENT_SHARE_LIMIT,
        SPLITS,
        "listen to the clips named, take such rows out of the corpus and prepare again: they teach to write words "
        "where nothing is heard, and each one scored is an error",
        SILENT_SHARE_REFUSED,
    ),
    _Rule(
        "audio level",
        "very quiet (under -60 dB)",
        lambda dataset: QUIET_RMS - np.where(is_silent(dataset), 1.0, dataset.numpy_column("rms")),
        BAD_SHARE_LIMIT,
        ("train",),
        "convert them again from the originals at a higher level: 16 bits keep little of them",
    ),
    _Rule(
        "audio clipping",
        f"clipped (over {percent(CLIPPED_SAMPLES_SHARE)} of the samples)",
        lambda dataset: dataset.numpy_column("clipping_fraction") - np.float32(CLIPPED_SAMPLES_SHARE),
        BAD_SHARE_LIMIT,
        ("train",),
        "if a conversion amplified them, convert the originals again without; if they were recorded so, expect more "
        "errors on clean speech",
    ),
    _Rule(
        "audio offset",
        f"DC offset (over {percent(DC_OFFSET_LIMIT)} of full scale)",
        lambda dataset: np.abs(dataset.numpy_column("dc_offset")) - np.float32(DC_OFFSET_LIMIT),
        BAD_SHARE_LIMIT,
        ("train",),
        "filter it out (`sox IN OUT highpass 20`) and prepare again, or use a checkpoint with do_normalize, which "
        "takes the mean away",
    ),
)


def _apply(rule: _Rule, sets: Mapping[str, ShardDataset], max_examples: int) -> Finding:
    facts, said = {}, []
    for split, dataset in sets.items():
        badness = rule.badness(dataset)
        count = int((badness > 0).sum())
        share = count / len(dataset)
        examples = _ids(dataset, badness, min(count, max_examples))
        facts[split] = {"count": count, "share": share, "examples": examples}
        if count:
            said.append(f"{split} {count:,} of {len(dataset):,} ({percent(share)}): {_listed(examples, count)}")
    shares = {split: facts[split]["share"] for split in facts}
    verdict: Verdict = "warning" if any(shares.get(split, 0) > rule.limit for split in rule.splits) else "ok"
    if shares.get("train", 0) > rule.refused_limit:
        verdict = "refused"
    result = f"{rule.name}: {'; '.join(said) or 'none'}"
    return Finding(rule.check, result, verdict, "" if verdict == "ok" else rule.remedy, facts)


def _band(sets: Mapping[str, ShardDataset]) -> Finding:
    """Where the recordings really end, against the rate that their files declare."""
    facts, said = {}, []
    for split, dataset in sets.items():
        highest = dataset.numpy_column("highest_frequency_hz")
        highest = highest[~is_silent(dataset)]
        rates, counts = np.unique(dataset.numpy_column("source_rate_hz"), return_counts=True)
        rate_hz = int(rates[np.argmax(counts)])
        median_hz = float(np.median(highest)) if len(highest) else 0.0
        narrow = float((highest < NARROW_BAND_HZ).mean()) if len(highest) else 0.0
        facts[split] = {"declared_rate_hz": rate_hz, "highest_hz": median_hz, "narrow_band_share": narrow}
        said.append(f"{split} up to {median_hz / 1000:.1f} kHz in files of {rate_hz / 1000:g} kHz")
        if narrow and rate_hz / 2 > NARROW_BAND_HZ:
            said[-1] += f" ({percent(narrow)} of the clips are 8 kHz speech stored at a higher rate)"
    result = f"sound in the median clip: {', '.join(said)}"
    train = facts.get("train")
    if train and train["narrow_band_share"] > 0.5:
        result += "; the model learns from telephone-band speech (below 4 kHz) and fits such recordings best"
    differing = [
        split
        for split in facts
        if train and abs(facts[split]["narrow_band_share"] - train["narrow_band_share"]) > BAND_DIFFERENCE_LIMIT
    ]
    if not differing:
        return Finding("audio band", result, facts=facts)
    remedy = (
        f"{' and '.join(differing)} and training differ in band: the WER is that of the change; resample the wider "
        "recordings to 8 kHz (`ffmpeg -i IN -ar 8000 OUT`) and prepare again, or test on recordings of the same kind"
    )
    return Finding("audio band", result, "warning", remedy, facts)


def _edge_silence(sets: Mapping[str, ShardDataset], max_examples: int) -> Finding:
    facts, said = {}, []
    for split, dataset in sets.items():
        edges = np.where(is_silent(dataset), 0.0, sum(dataset.numpy_column(name) for name in EDGE_COLUMNS))
        share = float(edges.sum() / dataset.seconds)
        examples = _ids(dataset, edges, min(max_examples, int((edges > 0).sum())))
        facts[split] = {"seconds": float(edges.sum()), "share": share, "examples": examples}
        said.append(f"{split} {percent(share)}")
    result = f"silence before and after speech: {', '.join(said)} of the audio"
    if facts.get("train", {}).get("share", 0) <= EDGE_SILENCE_LIMIT:
        return Finding("audio edges", result, facts=facts)
    remedy = (
        f"trim the clips (`sox IN OUT silence 1 0.1 0.1% reverse silence 1 0.1 0.1% reverse`) and prepare again; most "
        f"in {', '.join(facts['train']['examples'])}"
    )
    return Finding("audio edges", result, "warning", remedy, facts)


EDGE_COLUMNS = ("leading_silence_seconds", "trailing_silence_seconds")


def _longest(sets: Mapping[str, ShardDataset], max_examples: int) -> Finding:
    facts, said = {}, []
    for split, dataset in sets.items():
        rows = np.argsort(-dataset.num_samples, kind="stable")[:max_examples]
        seconds = [float(dataset.num_samples[row]) / SAMPLE_RATE_HZ for row in rows]
        facts[split] = [{"id": dataset[int(row)].id, "seconds": s} for row, s in zip(rows, seconds, strict=True)]
        said.append(f"{split} " + ", ".join(f"{entry['id']} {entry['seconds']:.1f} s" for entry in facts[split]))
    return Finding("audio length", f"longest clips: {'; '.join(said)}", facts=facts)


def _ids(dataset: ShardDataset, badness: np.ndarray, count: int) -> list[str]:
    worst = np.argsort(-badness, kind="stable")[:count]
    return [dataset[int(row)].id for row in worst]


def _listed(examples: list[str], count: int) -> str:
    return ", ".join(examples) + (", ..." if count > len(examples) else "")
