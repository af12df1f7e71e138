"""A language model's folder.

lm.json      what it was made of, and how; written last
lm.arpa      the n-grams (lm.bin where KenLM's build_binary is there)
words.tsv    each word of the texts and how often it occurs
tuning.json  weights found on a dev split; by decoding.py tune
"""

import csv
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from errors import UsageError
from integrity import hash_file
from text import Vocabulary

MANIFEST_FILE, WORDS_FILE, TUNING_FILE = "lm.json", "words.tsv", "tuning.json"
MODEL_FILES = ("lm.arpa", "lm.bin")
UNITS = ("word", "character")
# A space among the tokens of a character model. No character is spelled like this.
SPACE_TOKEN = "<space>"
# Of the running words, that a recogniser must be able to spell.
MIN_SPELLABLE = 0.5


@dataclass(frozen=True)
class LanguageModel:
    """What `lm.json` says, and where it lies."""

    folder: Path
    unit: str
    """`word` or `character`."""
    order: int
    file: str
    sha256: str
    """Of `file`."""

    @property
    def path(self) -> Path:
        """The n-grams."""
        return self.folder / self.file

    def words(self) -> Counter[str]:
        """The words of the texts, and how often they occur; 0 for those of the training split that were added."""
        path = self.folder / WORDS_FILE
        try:
            with path.open(encoding="utf-8", newline="") as file:
                return Counter(
                    {row[0]: int(row[1]) for row in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}
                )
        except (OSError, ValueError, IndexError, csv.Error) as error:
            raise UsageError(f"{path} is damaged ({error!r}): run decoding.py build-lm again") from error

    def tuning(self) -> dict[str, object] | None:
        """What `tune` wrote; None where it has not been run."""
        path = self.folder / TUNING_FILE
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found | {name: float(found[name]) for name in ("lm_weight", "word_score")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is damaged ({error!r}): run decoding.py tune again") from error


def open_language_model(folder: Path) -> LanguageModel:
    """Read a folder that `build_language_model` wrote, and check the n-grams against their checksum.

    Raises:
        UsageError: it is none, or damaged.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise UsageError(f"{folder} holds no language model ({MANIFEST_FILE}): make one with decoding.py build-lm")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        found = LanguageModel(folder, facts["unit"], int(facts["order"]), facts["file"], facts["sha256"])
        is_known = found.unit in UNITS and found.file in MODEL_FILES
        is_whole = is_known and hash_file(found.path) == found.sha256
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder} is damaged ({error!r}): run decoding.py build-lm again") from error
    if not is_whole:
        raise UsageError(f"{found.path} differs from its checksum in {MANIFEST_FILE}: run decoding.py build-lm again")
    return found


def spellable_share(words: Counter[str], vocabulary: Vocabulary) -> float:
    """Share of the running words whose characters all have a label; 1 for no words."""
    known = sum(count for word, count in words.items() if can_spell(word, vocabulary))
    return known / words.total() if words.total() else 1.0


def can_spell(word: str, vocabulary: Vocabulary) -> bool:
    """Whether each character of a normalised word has a label."""
    return vocabulary.without_unknown(word) == word


def check_spelling(model: LanguageModel, vocabulary: Vocabulary) -> None:
    """The words must be written as the recogniser writes.

    Raises:
        UsageError: it cannot spell half of them: another case, other characters, another language.
    """
    words = model.words()
    share = spellable_share(words, vocabulary)
    if share < MIN_SPELLABLE:
        examples = ", ".join(word for word, _ in words.most_common(3))
        raise UsageError(
            f"{model.folder}: this recogniser can spell {share:.0%} of the language model's words ({examples}); build "
            "it again with the recogniser's own rules: decoding.py build-lm --model_name_or_path"
        )
