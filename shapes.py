"""What the files of a run and of an evaluation must look like for a report to show them.

Another version wrote them, another program has a results.json too, or somebody edited them: a value of another kind is
found when a file is read, not in the middle of a page.

A shape is a kind (`str`, `NUMBER`), a dict of the names that must be there, a list with the shape of each element, a
tuple with that of each of so many elements, or one of the classes below.
"""

from dataclasses import dataclass
from typing import Any

from clock import PHASE_COLUMNS

Shape = Any
NUMBER = int | float
TEXTS = str | list
KINDS = {
    str: "text",
    NUMBER: "a number",
    int: "a whole number",
    bool: "true or false",
    dict: "a set of names and values",
}
KINDS |= {list: "a list", TEXTS: "a text or a list"}


@dataclass(frozen=True)
class OrNone:
    """A value that may be unknown."""

    shape: Shape


@dataclass(frozen=True)
class Known:
    """Names that may be missing, `needed` ones aside; None stands for a missing one, the others have these shapes."""

    shapes: dict[str, Shape]
    needed: tuple[str, ...] = ()


@dataclass(frozen=True)
class EachOf:
    """Any names, with values of one shape."""

    shape: Shape


def check_shape(value: Any, shape: Shape, place: str = "") -> None:
    """Compare a value of a JSON or YAML file with its shape.

    Raises:
        ValueError: the place that differs, and how.
    """
    if isinstance(shape, OrNone):
        if value is not None:
            check_shape(value, shape.shape, place)
        return
    _check_kind(value, _kind(shape), place)
    if isinstance(shape, tuple) and len(value) != len(shape):
        raise ValueError(f"{place or 'the whole'} has {len(value)} elements, not {len(shape)}")
    for name, inner in _inner_shapes(value, shape):
        if isinstance(value, dict) and name not in value:
            raise ValueError(f"{place} has no {name}" if place else f"no {name}")
        check_shape(value[name], inner, f"{place}: {name}" if place else str(name))


def _inner_shapes(value: Any, shape: Shape) -> list[tuple[str | int, Shape]]:
    """The parts of a value that have a shape, by name or place."""
    if isinstance(shape, Known):
        known = [name for name in shape.shapes if name in shape.needed or value.get(name) is not None]
        return [(name, shape.shapes[name]) for name in known]
    if isinstance(shape, EachOf):
        return [(name, shape.shape) for name in value]
    if isinstance(shape, dict):
        return list(shape.items())
    if isinstance(shape, tuple):
        return list(enumerate(shape))
    return [(place, shape[0]) for place in range(len(value))] if isinstance(shape, list) else []


def _kind(shape: Shape) -> Any:
    if isinstance(shape, (dict, Known, EachOf)):
        return dict
    return list if isinstance(shape, (list, tuple)) else shape


def _check_kind(value: Any, kind: Any, place: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{place or 'the whole'} is a {type(value).__name__}, {KINDS[kind]} is needed")


_UNIT_COUNTS = {"insertions": int, "deletions": int, "substitutions": int, "hits": int}
_INTERVAL = {"rate": NUMBER, "low": OrNone(NUMBER), "high": OrNone(NUMBER)}
_SLICE = {
    "slice": str, "group": str, "utterances": int, "wer": NUMBER, "wer_low": OrNone(NUMBER),
    "wer_high": OrNone(NUMBER), "cer": OrNone(NUMBER), "is_small": bool,
}  # fmt: skip
_LETTER = Known(
    {"occurrences": int, "recall": NUMBER, "written": int, "taken_for": str, "times": int, "in_training": int},
    needed=("occurrences", "recall"),
)
_RATES = ("wer", "cer", "sentence_error_rate")

RESULTS = Known(
    {f"{name}{end}": NUMBER for name in _RATES for end in ("", "_low", "_high")}
    | dict.fromkeys(("utterances", "utterances_of_split", "frames", "near_ties"), int)
    | dict.fromkeys(("seconds", "seconds_taken", "raw_wer"), NUMBER)
    | dict.fromkeys(("model", "data", "data_fingerprint"), str)
    | {
        "interval": {"unit": str, "units": int},
        "words": _UNIT_COUNTS,
        "unknown_characters": EachOf(int),
        "text_rules": EachOf(str),
        "slices": [_SLICE],
        "worst_slice": _SLICE | {"is_beyond_chance": bool},
        "processes": Known({"mixed_precision": str}),
        "letters": EachOf(_LETTER),
        "rare_in_training": EachOf(int),
    },
    needed=("wer",),
)
COMPARISON = {
    "other_model": str,
    "utterances": int,
    "left_out": int,
    "other": (_INTERVAL, _INTERVAL),
    "own": (_INTERVAL, _INTERVAL),
    "differences": ({"interval": _INTERVAL}, {"interval": _INTERVAL}),
    "is_clear": (bool, bool),
}
TRAIN_RESULTS = Known(
    {f"{prefix}_{name}": NUMBER for prefix in ("best_eval", "average_eval", "eval_full", "test")
     for name in ("wer", "wer_low", "wer_high", "cer")}
    | dict.fromkeys(("train_runtime", "eval_wer_before", "test_wer_before", "elapsed_seconds"), NUMBER)
    | dict.fromkeys((*PHASE_COLUMNS, "audio_hours_per_hour", "padding_fraction"), NUMBER)
    | dict.fromkeys(("kept", "stopped_early_because"), str)
    | {"best_step": int, "eval_full_slices": [_SLICE], "test_slices": [_SLICE]}
)  # fmt: skip
CONFIG = Known(
    {
        "max_steps": NUMBER,
        "num_train_epochs": NUMBER,
        "data_dir": TEXTS,
        "eval_split": str,
        "metric_for_best_model": str,
    }
)
PREFLIGHT = Known({"left_out": EachOf(int), "findings": [dict.fromkeys(("check", "result", "verdict", "remedy"), str)]})
ENVIRONMENT = Known({})
