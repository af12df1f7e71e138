"""Building a language model: texts by a recogniser's own rules, without the sentences that it is judged by."""

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from atomic import UNFINISHED, nearest_existing, replace_folder, reporting_disk_errors, write_atomically
from config import BuildLMConfig
from corpora import read_texts, sentence_key
from data import ShardDataset, has_utterances
from errors import UsageError
from integrity import hash_file
from language_model import MANIFEST_FILE, MODEL_FILES, SPACE_TOKEN, TUNING_FILE, WORDS_FILE
from ngram import SPECIAL_WORDS, possible_order, write_model
from progress import Progress
from text import TextNormalizer, read_rules, resolve_case

SENTENCES_FILE = "sentences.txt"  # While the model is made.
HELD_OUT_SPLITS = ("dev", "test")
DEFAULT_ORDERS = {"word": 4, "character": 6}
LINES_PER_ADVANCE = 1_000
BYTES_PER_READ = 1_000_000


def build_language_model(config: BuildLMConfig) -> dict[str, object]:
    """Make the folder `config.out`; an older language model there is replaced.

    Returns:
        What `lm.json` says.

    Raises:
        UsageError: a text cannot be read, or no sentence is left; the folder holds something else.
        RunFailed: no room on the disk, or KenLM's program failed.
    """
    out = Path(config.out)
    _check_output(out)
    normalizer = make_normalizer(config)
    held_out = {split: _keys(config.data_dir, split, normalizer) for split in HELD_OUT_SPLITS}
    new = out.with_name(out.name + UNFINISHED)
    with reporting_disk_errors(out):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    try:
        with reporting_disk_errors(out):
            facts = _fill(new, config, normalizer, held_out)
        replace_folder(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return facts


def _check_output(out: Path) -> None:
    own = {MANIFEST_FILE, WORDS_FILE, TUNING_FILE, *MODEL_FILES}
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file: name a folder")
    foreign = sorted({path.name for path in out.iterdir()} - own) if out.is_dir() else []
    if foreign:
        raise UsageError(f"--out {out} holds {', '.join(foreign[:3])}: name a folder of its own")
    if not nearest_existing(out).is_dir():
        raise UsageError(f"--out {out}: {nearest_existing(out)} is a file")


def make_normalizer(config: BuildLMConfig) -> TextNormalizer:
    """The rules of a recogniser, or those that the flags give.

    Raises:
        UsageError: the recogniser cannot be read.
    """
    given = {"case": config.case, "characters_to_ignore": config.characters_to_ignore}
    if config.model_name_or_path is None:
        rules = read_rules(None, config.language, **given)
        # Without a vocabulary `auto` is what train.py makes of a text: lower case.
        case = "lower" if rules["case"] == "auto" else resolve_case(rules["case"], {})
        return TextNormalizer(rules["characters_to_ignore"], case, language=rules["language"])
    from pretrained import find_checkpoint_folder, read_vocabulary  # transformers takes 8 s to import.

    folder = find_checkpoint_folder(config.model_name_or_path)
    return TextNormalizer.for_vocabulary(read_vocabulary(folder), **read_rules(folder, config.language, **given))


def _keys(data_dir: str, split: str, normalizer: TextNormalizer) -> set[int]:
    """Hashes of the sentences of a split; none where it was not prepared."""
    folder = Path(data_dir) / split
    if not has_utterances(folder):
        return set()
    return {hash(sentence_key(normalizer(text))) for text in ShardDataset(folder).column("text")}


def _fill(
    folder: Path, config: BuildLMConfig, normalizer: TextNormalizer, held_out: dict[str, set[int]]
) -> dict[str, object]:
    """Sentences, words, n-grams and, last, the manifest."""
    sentences_file = folder / SENTENCES_FILE
    words, counts = _write_sentences(sentences_file, config, normalizer, held_out)
    if not counts["kept"]:
        raise UsageError(_describe_nothing(config, counts))
    distinct, running = len(words), words.total()
    if config.add_training_words:
        for word in _training_words(config.data_dir, normalizer):
            words.setdefault(word, 0)
    with (folder / WORDS_FILE).open("w", encoding="utf-8", newline="") as file:
        ordered = sorted(words.items(), key=lambda pair: (-pair[1], pair[0]))
        file.writelines(f"{word}\t{count}\n" for word, count in ordered)
    asked = config.order or DEFAULT_ORDERS[config.unit]
    order = possible_order(_tokenised(sentences_file, config.unit), asked)
    name, made_by = write_model(lambda: _tokenised(sentences_file, config.unit), order, folder)
    sentences_file.unlink()
    facts = {
        "unit": config.unit,
        "order": order,
        "text": config.text,
        "sentences": counts["kept"],
        "removed": {split: counts[split] for split in HELD_OUT_SPLITS},
        "empty": counts["empty"],
        "words": running,
        "distinct_words": distinct,
        "added_training_words": len(words) - distinct,
        "text_rules": {
            "characters_to_ignore": normalizer.characters_to_ignore,
            "case": normalizer.case,
            "letters": "".join(sorted(normalizer.letters)),
            "languages": [own.facts() for own in normalizer.languages],
        },
        "recogniser": config.model_name_or_path,
        "estimated_by": made_by,
        "file": name,
        "sha256": hash_file(folder / name),
    }
    write_atomically(folder / MANIFEST_FILE, json.dumps(facts, indent=1, ensure_ascii=False))
    return facts


def _write_sentences(
    path: Path, config: BuildLMConfig, normalizer: TextNormalizer, held_out: dict[str, set[int]]
) -> tuple[Counter[str], Counter[str]]:
    """The normalised sentences that stay, a line each; their words, and how many rows were `kept` and why not."""
    words: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    with path.open("w", encoding="utf-8") as file:
        for text in _with_progress(config):
            sentence = _without_special(normalizer(text)) if text else ""
            verdict = _judge(sentence, held_out)
            counts[verdict] += 1
            if verdict == "kept":
                words.update(sentence.split())
                file.write(sentence + "\n")
    return words, counts


def _judge(sentence: str, held_out: dict[str, set[int]]) -> str:
    """`kept`, `empty`, or the split that holds the sentence too."""
    key = hash(sentence_key(sentence))
    split = next((split for split, keys in held_out.items() if key in keys), None)
    return "empty" if not sentence else split or "kept"


def _without_special(sentence: str) -> str:
    """Words that an ARPA file means something else by cannot be in it."""
    if "<" not in sentence:
        return sentence
    return " ".join(word for word in sentence.split() if word.lower() not in SPECIAL_WORDS)


def _describe_nothing(config: BuildLMConfig, counts: Counter[str]) -> str:
    listed = ", ".join(config.text)
    if held := sum(counts[split] for split in HELD_OUT_SPLITS):
        return f"--text {listed}: all {held:,} sentences are in dev or test of {config.data_dir}; give other texts"
    return f"--text {listed} holds no sentence ({counts['empty']:,} empty rows): give a text, or name its column"


def _training_words(data_dir: str, normalizer: TextNormalizer) -> Iterator[str]:
    for text in ShardDataset(Path(data_dir) / "train").column("text"):
        yield from _without_special(normalizer(text)).split()


def _with_progress(config: BuildLMConfig) -> Iterator[str | None]:
    """The texts of all files in turn."""
    paths = [Path(name) for name in config.text]
    with Progress("reading texts", sum(map(_count_lines, paths)), "lines") as progress:
        for path in paths:
            for number, text in enumerate(read_texts(path, config.text_column_name), 1):
                yield text
                if number % LINES_PER_ADVANCE == 0:
                    progress.advance(LINES_PER_ADVANCE)


def _count_lines(path: Path) -> int:
    lines = 0
    # What cannot be read is said by `read_texts`.
    with contextlib.suppress(OSError), path.open("rb") as file:
        while block := file.read(BYTES_PER_READ):
            lines += block.count(b"\n")
    return lines


def _tokenised(sentences: Path, unit: str) -> Iterable[str]:
    """Each sentence as the tokens of the model, with spaces between."""
    with sentences.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            sentence = line.rstrip("\n")
            yield sentence if unit == "word" else spell(sentence)


def spell(sentence: str) -> str:
    """A sentence as the tokens of a character model."""
    return " ".join(SPACE_TOKEN if character == " " else character for character in sentence)


def describe_build(out: Path, facts: dict[str, object]) -> list[str]:
    """The screen of build-lm."""
    removed = facts["removed"]
    lines = [
        f"{facts['sentences']:,} sentences, {facts['words']:,} words, {facts['distinct_words']:,} distinct",
        f"removed because dev holds them: {removed['dev']:,}, because test does: {removed['test']:,}; empty rows: "
        f"{facts['empty']:,}",
        f"{facts['unit']} model of order {facts['order']} ({facts['estimated_by']})",
        f"written to {out}: {facts['file']}, {WORDS_FILE}, {MANIFEST_FILE}",
    ]
    if facts["added_training_words"]:
        lines.insert(1, f"added from the training split, unseen in the texts: {facts['added_training_words']:,} words")
    return lines
