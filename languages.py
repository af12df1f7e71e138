"""How languages write: apostrophes, case and digraphs, and which letter is nearest to which; the data: languages.yaml.

Nothing here is code for one language: a language is added by a few lines of that file.
"""

import difflib
import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from errors import UsageError

LANGUAGES_FILE = Path(__file__).parent / "languages.yaml"
# Every way to type an apostrophe or a letter that looks like one: ' ’ ‘ ‛ ʼ ʻ ` ´ ′ ＇ ꞌ
APOSTROPHES = "'\u2019\u2018\u201b\u02bc\u02bb\u0060\u00b4\u2032\uff07\ua78c"

# What a key of languages.yaml must be.
KINDS = {
    "apostrophe": f"it must be empty or one of {APOSTROPHES}",
    "apostrophe_at_edges": "it must be true or false",
    "replace": "a mapping of texts to texts is needed",
    "lower": "a mapping of single letters to texts is needed",
    "upper": "a mapping of single letters to texts is needed",
    "digraphs": "a list of texts of several characters is needed",
}


@dataclass(frozen=True)
class Language:
    """The rules of one language; each field is a key of languages.yaml, `code` apart."""

    code: str
    name: str = ""
    apostrophe: str | None = None
    """The character that every kind of apostrophe becomes, "" where it is no letter and goes; None: no rule."""
    apostrophe_at_edges: bool = True
    """Whether one that begins or ends a word stays; where not, it is taken for a quotation mark."""
    ignore: str = ""
    """Characters removed, besides those of the run."""
    replace: tuple[tuple[str, str], ...] = ()
    """Spellings and what they become, in lower case; other cases follow."""
    lower: tuple[tuple[str, str], ...] = ()
    """Letters whose lower case is not Unicode's."""
    upper: tuple[tuple[str, str], ...] = ()
    """Letters whose upper case is not Unicode's."""
    digraphs: tuple[str, ...] = ()
    """Letters of several characters, in lower case."""

    def facts(self) -> dict[str, Any]:
        """As JSON gives them back, for a model folder: a model is read by the rules that it was trained by."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_facts(cls, values: Mapping[str, Any], source: object) -> "Language":
        """The inverse of `facts`, also of what JSON makes of it, and of the lines of languages.yaml.

        Raises:
            UsageError: a key that no language has, or a value of another kind.
        """
        known = [one.name for one in fields(cls)]
        problems = [
            f"unknown key {name}, nearest is {difflib.get_close_matches(str(name), known, 1, 0.0)[0]}"
            for name in values
            if name not in known
        ]
        lists = {name: _pairs_of(value) for name, value in values.items() if name in ("replace", "lower", "upper")}
        for name in {"lower", "upper"} & lists.keys():
            if any(len(_composed(letter)) != 1 for letter, _ in lists[name] or ()):
                lists[name] = None
        lists |= {name: _units_of(value) for name, value in values.items() if name == "digraphs"}
        problems += [
            f"{name} cannot be {values[name]!r}: {KINDS[name]}" for name, found in lists.items() if found is None
        ]
        for name, value in values.items():
            if name in known and name not in lists and not _is_right(name, value):
                problems.append(f"{name} cannot be {value!r}: {KINDS.get(name, 'a text is needed')}")
        if problems:
            raise UsageError(f"{source}: " + "; ".join(problems))
        return cls(**{name: _composed(lists.get(name, value)) for name, value in values.items()})


def find_language(code: str) -> Language:
    """The rules of a language by its code.

    Raises:
        UsageError: languages.yaml has none by it, or cannot be read.
    """
    known = _read().languages
    if code not in known:
        named = ", ".join(f"{one.code} ({one.name})" for one in known.values())
        raise UsageError(f"--language {code}: {LANGUAGES_FILE.name} has {named}; add its rules there, or leave it out")
    return known[code]


def nearest_letters() -> Mapping[str, str]:
    """The letters to try in turn, for each lower-case letter that does not decompose into a simpler one."""
    return _read().nearest_letters


@dataclass(frozen=True)
class _Languages:
    languages: dict[str, Language]
    nearest_letters: dict[str, str]


@functools.cache
def _read(path: Path = LANGUAGES_FILE) -> _Languages:
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    parts = ("languages", "nearest_letters")
    if not isinstance(content, dict) or set(content) != set(parts):
        raise UsageError(f"{path} must hold the keys {' and '.join(parts)}, and no other")
    for part in parts:
        if not isinstance(content[part], dict):
            raise UsageError(f"{path}: {part} must be a mapping, it is {content[part]!r}")
    languages = {}
    for code, rules in content["languages"].items():
        if not isinstance(rules, dict):
            raise UsageError(f"{path}: {code} must be a mapping, it is {rules!r}")
        languages[code] = Language.from_facts({"code": code, **rules}, f"{path}: {code}")
    nearest = {}
    for letter, others in content["nearest_letters"].items():
        if not (isinstance(letter, str) and isinstance(others, str) and len(_composed(letter)) == 1 and others):
            raise UsageError(f"{path}: nearest_letters must give letters for one letter, found {letter!r}: {others!r}")
        nearest[_composed(letter)] = _composed(others)
    return _Languages(languages, nearest)


class _Loader(yaml.SafeLoader):
    """All text but `true` and `false`: `no` is Norwegian and `on` a French vowel. Refuses a key that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        times = Counter(key.value for key, _ in node.value)
        for key, _ in node.value:
            if times[key.value] > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given {times[key.value]} times", key.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|false)$"), list("tf"))


def _is_right(name: str, value: object) -> bool:
    if name == "apostrophe":
        return value is None or value == "" or (isinstance(value, str) and value in list(APOSTROPHES))
    return isinstance(value, bool if name == "apostrophe_at_edges" else str)


def _pairs_of(value: object) -> tuple[tuple[str, str], ...] | None:
    """Pairs of texts from a mapping or from what JSON makes of them, or None for anything else."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) for pair in pairs):
        return None
    is_right = all(len(pair) == 2 and all(isinstance(text, str) for text in pair) and pair[0] for pair in pairs)
    return tuple((pair[0], pair[1]) for pair in pairs) if is_right else None


def _units_of(value: object) -> tuple[str, ...] | None:
    is_right = isinstance(value, list | tuple) and all(isinstance(one, str) and len(one) > 1 for one in value)
    return tuple(value) if is_right else None


def _composed(value: Any) -> Any:
    """NFC of a text, also inside of tuples: the file may have been typed either way."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    return tuple(map(_composed, value)) if isinstance(value, tuple) else value
