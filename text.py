"""Transcripts: normalisation, the vocabulary of a CTC head, and how well a vocabulary covers a text.

L: labels of one utterance.
"""

import json
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from errors import UsageError
from languages import APOSTROPHES, Language, find_language

if TYPE_CHECKING:
    from transformers import Wav2Vec2CTCTokenizer

Case = Literal["upper", "lower", "keep"]

# The vocabulary of facebook/wav2vec2-large-960h and of the demo.
LARGE_960H_VOCABULARY = {
    token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"|ETAONIHSRDLUMWCFGYPBVK'XJQZ"])
}
# Vocabularies in the field write the two tokens that every CTC head needs in one of these ways.
PAD_TOKENS = ("<pad>", "[PAD]")
UNKNOWN_TOKENS = ("<unk>", "[UNK]")
WORD_DELIMITER = "|"
# In a model folder: case, characters to ignore and languages of its training.
RULES_FILE = "text_rules.json"
# The list is that of a published English run, whose recipe is configs/english_large.yaml.
DEFAULT_RULES = {"characters_to_ignore": ',?.!-;:"', "case": "auto"}

# ’ ‘ ‛ ʼ ` ´ ′ ＇: what transcribers type where an apostrophe is meant.
APOSTROPHE_VARIANTS = "\u2019\u2018\u201b\u02bc\u0060\u00b4\u2032\uff07"
# Nobody hears or sees these: control characters that are no whitespace, soft hyphen, zero-width and bidi controls,
# variation selectors.
INVISIBLE_CHARACTERS = "".join(
    chr(code)
    for first, last in (
        (0x00, 0x08), (0x0E, 0x1B), (0x7F, 0x84), (0x86, 0x9F), (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C),
        (0x180E, 0x180E), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF),
    )
    for code in range(first, last + 1)
)  # fmt: skip
# What transformers replaces when a tokenizer's clean_up_tokenization_spaces is on (PreTrainedTokenizerBase).
SPACE_CLEAN_UPS = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


@dataclass(frozen=True)
class TextNormalizer:
    """A transcript as found -> the text that is learned and scored: NFC, one case, single spaces.

    Apostrophe variants become "'", invisible characters go, and so does each of `characters_to_ignore`; a combining
    mark among them is also taken off composed letters. Case mapping is Unicode's. A language has its own rules for
    apostrophes, case (Turkish dotless i) and spellings. Normalising twice changes nothing.
    """

    characters_to_ignore: str = ""
    case: Case = "keep"
    letters: frozenset[str] = frozenset()
    """Characters of the vocabulary, never taken for an apostrophe variant or for invisible (U+02BC in Breton, the
    zero-width non-joiner in Persian). `characters_to_ignore` goes before it."""
    language: Language | None = None
    """Whose rules to follow; its apostrophe is written as the vocabulary has it, where that has another one."""
    of_sets: tuple[tuple[str, Language], ...] = ()
    """Languages of prepared sets by their names, where each has its own; see `for_set`."""

    @classmethod
    def for_vocabulary(
        cls,
        vocabulary: "Vocabulary",
        characters_to_ignore: str,
        case: str,
        language: Language | None = None,
        of_sets: tuple[tuple[str, Language], ...] = (),
    ) -> "TextNormalizer":
        """The normalizer whose texts fit `vocabulary`; `case` may be "auto".

        Raises:
            UsageError: the checkpoint's tokenizer writes lower case only, and another case or a language with a case
                mapping of its own is asked for.
        """
        if vocabulary.lowercases:
            if case not in ("auto", "lower"):
                raise UsageError(f"--case {case}: this checkpoint's tokenizer writes lower case; use --case auto")
            for own in (language, *(of_set for _, of_set in of_sets)):
                if own is not None and own.upper:
                    raise UsageError(
                        f"--language {own.code}: this checkpoint's tokenizer changes case without the language's "
                        "rules; use --vocabulary train"
                    )
            case = "lower"
        letters = frozenset(token for token in vocabulary.token_ids if len(token) == 1)
        return cls(characters_to_ignore, resolve_case(case, vocabulary.token_ids), letters, language, of_sets)

    def for_set(self, name: str) -> "TextNormalizer":
        """The rules for the texts of one of several prepared sets, by its name; "" where there is one set."""
        return self._for_sets.get(name, self)

    def __call__(self, text: str) -> str:
        """Normalise one transcript."""
        return " ".join(self._map(text).split())

    def normalize_many(self, texts: Sequence[str]) -> list[str]:
        """`[normalizer(text) for text in texts]`, a fifth faster: each step is taken once for all of them.

        No step looks beyond a line feed: nothing composes with it, and for the final sigma it ends a word.
        """
        block = "\n".join(texts)
        if block.count("\n") != len(texts) - 1 or "\n" in self._table:
            return [self(text) for text in texts]  # none, or one of several lines
        return [" ".join(text.split()) for text in self._map(block).split("\n")]

    @property
    def digraphs(self) -> tuple[str, ...]:
        """Letters of several characters, for tables of letters; with several languages those of all."""
        return tuple(dict.fromkeys(digraph for own in self.languages for digraph in own.digraphs))

    @property
    def languages(self) -> list[Language]:
        """All whose rules are followed."""
        return list(dict.fromkeys(filter(None, (self.language, *(own for _, own in self.of_sets)))))

    def _map(self, text: str) -> str:
        """All but the spaces."""
        text = composed(text)
        if self.case != "keep":
            text = _replace_all(text, self._cased)
            text = text.upper() if self.case == "upper" else text.lower()
        if self._ignores_marks:
            text = self._replace(unicodedata.normalize("NFD", text))
        # Again, since a change of case or a removed joiner can leave a letter and its mark side by side.
        text = composed(self._replace(text))
        if self.language is None:
            return text
        if self._apostrophe and not self.language.apostrophe_at_edges:
            text = re.sub(f"(?<!\\S){self._apostrophe}+|{self._apostrophe}+(?!\\S)", "", text)
        return composed(_replace_all(text, self._spellings))

    def _replace(self, text: str) -> str:
        # A search for what is to change is three times as fast as str.translate outside ASCII.
        return self._pattern.sub(self._replacement, text)

    def _replacement(self, match: re.Match[str]) -> str:
        return self._table[match[0]]

    @cached_property
    def _for_sets(self) -> dict[str, "TextNormalizer"]:
        return {name: replace(self, language=own, of_sets=()) for name, own in self.of_sets}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(f"[{re.escape(''.join(self._table))}]")

    @cached_property
    def _table(self) -> dict[str, str]:
        """What each character that does not stay becomes."""
        ignored = set(self.characters_to_ignore + (self.language.ignore if self.language else ""))
        if self.case != "keep":
            ignored |= {character.upper() if self.case == "upper" else character.lower() for character in ignored}
        if self._apostrophe is None:
            apostrophe = "" if "'" in ignored else "'"
            table = {character: apostrophe for character in APOSTROPHE_VARIANTS if character not in self.letters}
        else:
            apostrophe = "" if self._apostrophe in ignored else self._apostrophe
            table = {character: apostrophe for character in APOSTROPHES if character != apostrophe}
        table |= {character: "" for character in INVISIBLE_CHARACTERS if character not in self.letters}
        return table | {character: "" for character in ignored if len(character) == 1}

    @cached_property
    def _apostrophe(self) -> str | None:
        """How apostrophes are written by the language's rules; None without any."""
        own = None if self.language is None else self.language.apostrophe
        if not own or own in self.letters:
            return own
        return next((character for character in APOSTROPHES if character in self.letters), own)

    @cached_property
    def _cased(self) -> dict[str, str]:
        """Letters whose case the language changes otherwise than Unicode."""
        if self.language is None:
            return {}
        return dict(self.language.upper if self.case == "upper" else self.language.lower)

    @cached_property
    def _spellings(self) -> dict[str, str]:
        """The language's spellings that mean the same, as they are written here."""
        own = {} if self.language is None else dict(self.language.replace)
        if self._apostrophe is not None and self.language.apostrophe:
            own = {key.replace(self.language.apostrophe, self._apostrophe): value for key, value in own.items()}
        cased = {"upper": (str.upper,), "lower": (str.lower,), "keep": (str.upper, str.title, str)}[self.case]
        spellings = {change(key): change(value) for change in cased for key, value in own.items()}
        if not self.letters:
            return spellings
        # A model that can write the one and not the other keeps what it can write.
        return {key: value for key, value in spellings.items() if self._writes(value) or not self._writes(key)}

    def _writes(self, text: str) -> bool:
        return all(character in self.letters or character == " " for character in text)

    @cached_property
    def _ignores_marks(self) -> bool:
        return any(unicodedata.combining(character) for character in self.characters_to_ignore)


def _replace_all(text: str, table: Mapping[str, str]) -> str:
    """Each key that stands in the text by its value; the longest one where several begin at a place."""
    if not any(key in text for key in table):
        return text
    longest_first = sorted(table, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda match: table[match[0]], text)


def visible(token: str) -> str:
    """The token itself, or its code point where nobody would see it or it would join its neighbour."""
    if len(token) != 1 or (token.isprintable() and not unicodedata.combining(token) and not token.isspace()):
        return token
    return f"U+{ord(token):04X}"


def composed(text: str) -> str:
    """NFC: a head may write a letter and its mark one by one, and canonically equivalent texts are the same text."""
    return unicodedata.normalize("NFC", text)


def resolve_case(case: str, vocabulary: Mapping[str, int]) -> Case:
    """`case`, or for "auto" the one that the letters of `vocabulary` have; "keep" when they have both or none."""
    if case != "auto":
        return case
    letters = [token for token in vocabulary if len(token) == 1 and token.lower() != token.upper()]
    has_upper = any(letter != letter.lower() for letter in letters)
    has_lower = any(letter != letter.upper() for letter in letters)
    if has_upper == has_lower:
        return "keep"
    return "upper" if has_upper else "lower"


def write_rules(folder: Path, normalizer: TextNormalizer) -> None:
    """Write the rules of a training into its model folder, for `read_rules`."""
    rules = {"characters_to_ignore": normalizer.characters_to_ignore, "case": normalizer.case}
    rules |= {"languages": [own.facts() for own in normalizer.languages]}
    (folder / RULES_FILE).write_text(json.dumps(rules, ensure_ascii=False, indent=1), encoding="utf-8")


def read_rules(folder: Path | None, language: str | None = None, **given: str | None) -> dict[str, Any]:
    """The arguments of `TextNormalizer.for_vocabulary`: what is given, else that of the model's training, else
    train.py's defaults.

    Args:
        folder: of the model; None for no model.
        language: by its code. A model that was trained in several needs it.
        given: `case`, `characters_to_ignore`; None where the user says nothing.

    Raises:
        UsageError: the model's text_rules.json is damaged; the language is not known, or not said where it must be.
    """
    rules, languages = dict(DEFAULT_RULES), []
    path = None if folder is None else folder / RULES_FILE
    if path is not None and path.is_file():
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            rules = {name: str(saved[name]) for name in rules}
            languages = [Language.from_facts(one, path) for one in saved.get("languages", [])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged ({error!r}): give --case and --characters_to_ignore") from error
    rules |= {name: value for name, value in given.items() if value is not None}
    of_model = {one.code: one for one in languages}
    if language is not None:
        return rules | {"language": of_model[language] if language in of_model else find_language(language)}
    if len(of_model) > 1:
        raise UsageError(f"{folder} was trained in {', '.join(of_model)}: say with --language which of them this is")
    return rules | {"language": next(iter(of_model.values()), None)}


def describe_rules(rules: Mapping[str, Any]) -> dict[str, str]:
    """What `read_rules` gives, as JSON values: a language by its code, and no word of it where there is none."""
    own = rules["language"]
    others = {name: value for name, value in rules.items() if name != "language"}
    return others if own is None else others | {"language": own.code}


def count_characters(texts: Iterable[str]) -> Counter[str]:
    """How often each character stands in normalised texts."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    return counts


def build_vocabulary(texts: Iterable[str] | Counter[str], minimum_count: int = 1) -> dict[str, int]:
    """Tokens and ids for normalised training texts: `<pad>` 0, `<unk>` 1, `|` 2, then characters by code point.

    No `<s>` and `</s>`: CTC never emits them, and the head would carry two dead outputs. Characters seen less than
    `minimum_count` times stay unknown, and so does a literal "|", which would end words.

    Args:
        texts: or their characters, counted.
        minimum_count: of a character that gets an output.

    Raises:
        UsageError: no character is left to learn.
    """
    counts = texts if isinstance(texts, Counter) else count_characters(texts)
    characters = sorted(
        character for character, count in counts.items() if count >= minimum_count and character not in " |"
    )
    if not characters:
        raise UsageError(
            f"the training texts hold no character at least {minimum_count} times: check the text column, "
            "--characters_to_ignore and --vocabulary_min_count"
        )
    return {token: index for index, token in enumerate([PAD_TOKENS[0], UNKNOWN_TOKENS[0], WORD_DELIMITER, *characters])}


@dataclass(frozen=True)
class Vocabulary:
    """Labels of a CTC head: text to ids, and ids to the very text that `Wav2Vec2CTCTokenizer.decode` gives."""

    token_ids: dict[str, int]
    pad_token: str = PAD_TOKENS[0]
    """The CTC blank."""
    unknown_token: str = UNKNOWN_TOKENS[0]
    delimiter_token: str = WORD_DELIMITER
    delimiter_text: str = " "
    """What the delimiter becomes in a decoded text."""
    lowercases: bool = False
    """The tokenizer's `do_lower_case`: upper-case labels, lower-case text."""
    cleans_up_spaces: bool = False
    """The tokenizer's `clean_up_tokenization_spaces`: `WE 'RE` becomes `WE'RE`."""

    def __post_init__(self) -> None:
        missing = [token for token in (self.pad_token, self.unknown_token) if token not in self.token_ids]
        if missing:
            raise UsageError(f"the vocabulary has no {' and no '.join(missing)}: add it (blank and unknown are needed)")

    @classmethod
    def from_tokenizer(cls, tokenizer: "Wav2Vec2CTCTokenizer") -> "Vocabulary":
        """What a Hugging Face CTC tokenizer does; of a nested one (MMS) the language that is set."""
        return cls(
            token_ids=tokenizer.get_vocab(),
            pad_token=tokenizer.pad_token,
            unknown_token=tokenizer.unk_token,
            delimiter_token=tokenizer.word_delimiter_token,
            delimiter_text=tokenizer.replace_word_delimiter_char,
            lowercases=tokenizer.do_lower_case,
            cleans_up_spaces=bool(tokenizer.clean_up_tokenization_spaces),
        )

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def blank_id(self) -> int:
        """Id of the CTC blank."""
        return self.token_ids[self.pad_token]

    @property
    def unknown_id(self) -> int:
        """Label of every character that the vocabulary lacks."""
        return self.token_ids[self.unknown_token]

    @property
    def delimiter_id(self) -> int | None:
        """Label of the space between words; None when the vocabulary has none."""
        return self.token_ids.get(self.delimiter_token)

    def encode(self, text: str) -> np.ndarray:
        """Normalised text -> int32 labels_L, one per character.

        Unlike the tokenizer's, no text can name a token: a literal `|`, `<s>` or `<pad>` becomes unknown characters,
        not a word end or a blank. A token of several characters is never used.
        """
        codes = np.frombuffer(self._as_labelled(text).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        return self._ids_by_code[np.minimum(codes, len(self._ids_by_code) - 1)]

    def encode_many(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`encode` of each text: their labels one behind the other, [sum of L], and the number of each, [len(texts)].

        Ten times as fast as one by one. The texts are normalised: none holds a line feed.
        """
        joined = "".join(f"{self._as_labelled(text)}\n" for text in texts)
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ends = np.flatnonzero(codes == ord("\n"))
        assert len(ends) == len(texts), "a text with a line feed is not normalised"
        labels = self._ids_by_code[np.minimum(codes, len(self._ids_by_code) - 1)]
        return np.delete(labels, ends), np.diff(ends, prepend=-1) - 1

    def without_unknown(self, text: str) -> str:
        """A normalised text less the characters that have no label."""
        kept = (character for character in text if self.characters.issuperset(self._as_labelled(character)))
        return " ".join("".join(kept).split())

    def decode_labels(self, ids_L: Iterable[int]) -> str:
        """Labels -> text, without the collapse of repeats that CTC frames need; blanks vanish.

        Special tokens appear as they are spelled and an id that the vocabulary lacks as the unknown token, which is
        what `transformers.pipeline` writes too.
        """
        last = len(self._texts) - 1
        text = "".join([self._texts[min(index, last)] for index in np.asarray(ids_L).tolist()]).strip()
        if self.lowercases:
            text = text.lower()
        if self.cleans_up_spaces:
            for before, after in SPACE_CLEAN_UPS:
                text = text.replace(before, after)
        return text

    def known_ids(self, ids: np.ndarray) -> np.ndarray:
        """`ids` of any shape, those that the vocabulary lacks (a head larger than it) replaced by `unknown_id`."""
        return self._known_ids[np.minimum(ids, len(self._known_ids) - 1)]

    @cached_property
    def characters(self) -> frozenset[str]:
        """Every character of a normalised text that has a label, the space included."""
        special = (self.pad_token, self.unknown_token, self.delimiter_token)
        spaces = {" "} if self.delimiter_id is not None else set()
        return frozenset({token for token in self.token_ids if len(token) == 1 and token not in special} | spaces)

    def _as_labelled(self, text: str) -> str:
        return text.upper() if self.lowercases else text

    @cached_property
    def _ids_by_code(self) -> np.ndarray:
        """Label by code point; the last entry stands for every code point above."""
        size = max(map(ord, self.characters), default=0) + 2
        ids = np.full(size, self.unknown_id, dtype=np.int32)
        for character in self.characters:
            ids[ord(character)] = self.delimiter_id if character == " " else self.token_ids[character]
        return ids

    @cached_property
    def _texts(self) -> list[str]:
        """What each id adds to a decoded text; the last entry stands for every id above."""
        texts = [self.unknown_token] * (max(self.token_ids.values()) + 2)
        for token, index in self.token_ids.items():
            texts[index] = {self.pad_token: "", self.delimiter_token: self.delimiter_text}.get(token, token)
        return texts

    @cached_property
    def _known_ids(self) -> np.ndarray:
        known = np.full(max(self.token_ids.values()) + 2, self.unknown_id)
        own = list(self.token_ids.values())
        known[own] = own
        return known


@dataclass
class Coverage:
    """Which characters of some texts a vocabulary lacks. Spaces are not counted."""

    characters: int = 0
    unknown: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first text that holds each unknown character."""

    @property
    def unknown_fraction(self) -> float:
        """Share of unknown characters; 0 for no text."""
        return self.unknown.total() / self.characters if self.characters else 0.0

    def add(self, other: "Coverage") -> None:
        """Count the texts of `other` too."""
        self.characters += other.characters
        self.unknown.update(other.unknown)
        self.examples = other.examples | self.examples


def measure_coverage(texts: Iterable[str], vocabulary: Vocabulary) -> Coverage:
    """Count the characters of normalised `texts` that `vocabulary` has no label for (trap 20)."""
    coverage = Coverage()
    known = vocabulary.characters | {" "}
    for text in texts:
        labelled = vocabulary._as_labelled(text)
        coverage.characters += len(labelled) - labelled.count(" ")
        for character in set(labelled) - known:
            coverage.unknown[character] += labelled.count(character)
            coverage.examples.setdefault(character, text)
    return coverage


def required_frames(labels_L: np.ndarray) -> int:
    """Frames that CTC needs at least: one per label, and a blank between two equal neighbours (trap 17)."""
    return len(labels_L) + int(np.count_nonzero(labels_L[1:] == labels_L[:-1]))


def required_frames_many(labels: np.ndarray, num_labels: np.ndarray) -> np.ndarray:
    """`required_frames` of texts whose labels lie one behind the other, as `encode_many` gives them, [len(num_labels)].

    Args:
        labels: of all texts, [sum of num_labels].
        num_labels: of each text.
    """
    if not len(labels):
        return num_labels
    # repeats[i] counts the equal neighbours up to label i; those inside a text are between its first and last label.
    repeats = np.concatenate(([0], np.cumsum(labels[1:] == labels[:-1])))
    ends = np.cumsum(num_labels)
    first, last = np.minimum(ends - num_labels, len(labels) - 1), np.maximum(ends - 1, 0)
    return num_labels + np.where(num_labels > 0, repeats[last] - repeats[first], 0)


def build_tokenizer(vocabulary: dict[str, int]) -> "Wav2Vec2CTCTokenizer":
    """A tokenizer with exactly the tokens of `vocabulary`, no `<s>` and `</s>` added (trap 19).

    Raises:
        UsageError: ids that are not 0 .. n-1, or a token that CTC needs is missing.
    """
    from transformers import Wav2Vec2CTCTokenizer

    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise UsageError(f"the ids of the {len(vocabulary)} vocabulary tokens must be 0 .. {len(vocabulary) - 1}")
    found = [[token for token in names if token in vocabulary] for names in (PAD_TOKENS, UNKNOWN_TOKENS, ("|",))]
    if not all(found):
        raise UsageError("the vocabulary needs <pad> (or [PAD]), <unk> (or [UNK]) and | (between words)")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(vocabulary), encoding="utf-8")
        tokenizer = Wav2Vec2CTCTokenizer(
            str(path),
            pad_token=found[0][0],
            unk_token=found[1][0],
            bos_token="<s>" if "<s>" in vocabulary else None,
            eos_token="</s>" if "</s>" in vocabulary else None,
        )
    assert len(tokenizer) == len(vocabulary)
    return tokenizer
