"""Beam search over CTC log-probabilities, with a language model or without; the model is built and tuned here too.

    python decoding.py build-lm --text train.tsv more.txt --data_dir data/en --model_name_or_path RUN/model --out lm
    python decoding.py tune --model_name_or_path RUN/model --data_dir data/en --lm lm
    python evaluate.py --model_name_or_path RUN/model --data_dir data/en --lm lm

`--unit word` writes words of its list only and knows which follow which; `--unit character` spells freely. `build-lm
--help` and `tune --help` list all flags.

T: frames, V: outputs of the recogniser's head, L: labels of a text, C: columns that the search sees.
"""

from errors import UsageError, exit_status

# isort: split

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from config import BuildLMConfig, TuneConfig, parse_arguments
from language_model import (
    SPACE_TOKEN,
    LanguageModel,
    can_spell,
    check_spelling,
    open_language_model,
)
from text import Vocabulary

if TYPE_CHECKING:
    from torchaudio.models.decoder import CTCDecoder

INSTALL = "pip install -e '.[lm]'"
BLANK_TOKEN, UNKNOWN_WORD = "<blank>", "<unk>"
# Of a column that no hypothesis may take: the search drops what falls so far behind.
IMPOSSIBLE = -1e4
DEFAULT_BEAM_SIZE = 50
# Hypotheses this much (nats) behind the best are dropped.
BEAM_THRESHOLD = 30.0


@dataclass(frozen=True)
class BeamSettings:
    """How the search weighs things."""

    lm_weight: float = 1.0
    """Nats per log10 probability of the language model."""
    word_score: float = 0.0
    """Nats for each word; without a word list, for each frame of the word delimiter."""
    beam_size: int = DEFAULT_BEAM_SIZE
    """Hypotheses kept at each frame."""


@dataclass(frozen=True)
class Decoded:
    """One text, with its labels (ids of the recogniser's vocabulary), [L], and the frame each begins at, [L]."""

    text: str
    labels: np.ndarray
    frames: np.ndarray


class BeamDecoder:
    """torchaudio's `ctc_decoder` for one recogniser.

    The search sees the blank, the word delimiter and the characters, whatever else the head has: `<s>`, `</s>` and
    `<unk>` cannot be written. With beam 1 and no language model the text is the greedy one, but for those. Paths that
    give the same text are added up, as in A. Hannun et al., https://arxiv.org/abs/1408.2873.

    Args:
        vocabulary: of the recogniser.
        model: a word model writes words of its list only, a character model and None any text.
        settings: weights and beam.

    Raises:
        UsageError: the extra `lm` is not installed, or the model does not suit the vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary, model: LanguageModel | None, settings: BeamSettings) -> None:
        self.vocabulary, self.settings = vocabulary, settings
        self.has_word_list = model is not None and model.unit == "word"
        characters = sorted(vocabulary.characters - {" "})
        delimiter = vocabulary.delimiter_id
        self._labels = np.array(
            [vocabulary.blank_id, -1 if delimiter is None else delimiter, *map(vocabulary.token_ids.get, characters)]
        )
        if model is not None:
            check_spelling(model, vocabulary)
        if self.has_word_list and delimiter is None:
            raise UsageError(f"{model.folder} is of words, which this vocabulary does not divide; use --unit character")
        # As the language model's texts are written, which is what the vocabulary decodes its labels to.
        written = [character.lower() if vocabulary.lowercases else character for character in characters]
        self._decoder = _make_decoder([BLANK_TOKEN, SPACE_TOKEN, *written], vocabulary, model, settings)

    @classmethod
    def open(cls, folder: Path | str, vocabulary: Vocabulary, **weights: float | None) -> "BeamDecoder":
        """The decoder of a language model's folder, with the weights that `tune` found there; those given go first."""
        model = open_language_model(Path(folder))
        return cls(vocabulary, model, choose_settings(model, **weights))

    def __call__(self, log_probs: Iterable[np.ndarray]) -> list[Decoded]:
        """Decode utterances one by one.

        Args:
            log_probs: natural logarithms over the head's outputs, float32 [T, V] each, the utterance's own frames.
        """
        return [self._decode(log_probs_TV) for log_probs_TV in log_probs]

    def _decode(self, log_probs_TV: np.ndarray) -> Decoded:
        if not len(log_probs_TV):
            return Decoded("", np.zeros(0, np.int64), np.zeros(0, np.int64))
        found = self._decoder(torch.from_numpy(self._columns(log_probs_TV)[None]))[0]
        if not found:
            return Decoded("", np.zeros(0, np.int64), np.zeros(0, np.int64))
        # The search puts a delimiter before the first frame, which counts as frame 0, and one behind the last.
        columns, frames = found[0].tokens.numpy()[1:-1], found[0].timesteps.numpy()[1:-1] - 1
        if self.has_word_list:
            # Between words the delimiter may come again and again.
            keep = np.append(columns[1:] != columns[:-1], True) | (columns != 1) if len(columns) else slice(None)
            columns, frames = columns[keep], frames[keep]
        labels = self._labels[columns]
        return Decoded(self.vocabulary.decode_labels(labels), labels, frames)

    def _columns(self, log_probs_TV: np.ndarray) -> np.ndarray:
        """What the search sees, [T, C]; one frame more with a word list, in which the last word ends."""
        rows = len(log_probs_TV) + self.has_word_list
        columns_TC = np.full((rows, len(self._labels)), IMPOSSIBLE, np.float32)
        is_real = self._labels >= 0
        columns_TC[: len(log_probs_TV), is_real] = log_probs_TV[:, self._labels[is_real]]
        if self.has_word_list:
            columns_TC[-1, 1] = 0.0
        return columns_TC


def choose_settings(
    model: LanguageModel, lm_weight: float | None = None, word_score: float | None = None, beam_size: int | None = None
) -> BeamSettings:
    """Those given, else those that `tune` found for this language model, else the defaults."""
    tuned = model.tuning() or {}
    default = BeamSettings()
    return BeamSettings(
        lm_weight if lm_weight is not None else tuned.get("lm_weight", default.lm_weight),
        word_score if word_score is not None else tuned.get("word_score", default.word_score),
        beam_size if beam_size is not None else int(tuned.get("beam_size", default.beam_size)),
    )


def check_installed() -> None:
    """Whether the beam search can run.

    Raises:
        UsageError: with the command that installs it.
    """
    try:
        import flashlight.lib.text.decoder.kenlm  # noqa: F401
    except ImportError as error:
        raise UsageError(f"beam search needs flashlight-text ({error}): {INSTALL}") from error


def _make_decoder(
    tokens: list[str], vocabulary: Vocabulary, model: LanguageModel | None, settings: BeamSettings
) -> "CTCDecoder":
    check_installed()
    from torchaudio.models.decoder import ctc_decoder

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files: dict[str, str | None] = {"lexicon": None, "lm": None if model is None else str(model.path)}
        if model is not None and model.unit == "word":
            files["lexicon"] = str(_write_lexicon(folder / "lexicon.txt", tokens, vocabulary, model))
        elif model is not None:
            # In the order of the columns: without it torchaudio numbers the tokens by a hash, and the search asks the
            # language model for other characters than it writes.
            (folder / "tokens.txt").write_text("\n".join([*tokens, UNKNOWN_WORD]) + "\n", encoding="utf-8")
            files["lm_dict"] = str(folder / "tokens.txt")
        # A delimiter's score is per frame; a word's is per word, and without a word list there is none.
        score = "word_score" if files["lexicon"] else "sil_score"
        with _quiet_stderr(), _naming_unreadable(model):  # KenLM advises to make a binary file.
            return ctc_decoder(
                tokens=tokens,
                beam_size=settings.beam_size,
                beam_threshold=BEAM_THRESHOLD,
                lm_weight=settings.lm_weight,
                log_add=True,
                blank_token=BLANK_TOKEN,
                sil_token=SPACE_TOKEN,
                unk_word=UNKNOWN_WORD,
                **files,
                **{score: settings.word_score},
            )


def _write_lexicon(path: Path, tokens: list[str], vocabulary: Vocabulary, model: LanguageModel) -> Path:
    """Each word that the recogniser can spell, with its tokens; the delimiter ends it."""
    own = set(tokens)
    with path.open("w", encoding="utf-8") as file:
        for word in model.words():
            if own.issuperset(word) and can_spell(word, vocabulary):
                file.write(f"{word} {' '.join(word)} {SPACE_TOKEN}\n")
    return path


@contextlib.contextmanager
def _naming_unreadable(model: LanguageModel | None) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        said = str(error).splitlines()[-1][:200]
        name = "the search" if model is None else model.path
        raise UsageError(
            f"{name} cannot be opened by flashlight-text ({said}); a build_binary of another version? build it again "
            "without that on the PATH"
        ) from error


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def main() -> None:
    """`build-lm` or `tune`."""
    command, arguments = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    # Both import transformers, which takes 8 s and which a decoding process does not need.
    if command == "build-lm":
        from lm_building import build_language_model, describe_build

        config = parse_arguments(BuildLMConfig, arguments, BuildLMConfig.__doc__)
        print("\n".join(describe_build(Path(config.out), build_language_model(config))), flush=True)
    elif command == "tune":
        from tuning import tune

        tune(parse_arguments(TuneConfig, arguments, TuneConfig.__doc__))
    elif command in ("-h", "--help"):
        print(__doc__)
    else:
        raise UsageError(f"{' '.join(['decoding.py', command]).strip()}: say build-lm or tune; --help shows both")


if __name__ == "__main__":
    sys.exit(exit_status(main))
