"""What transcribe.py's confidence of a word is worth: how often words are right that have it.

    python benchmarks/word_confidence.py --model_name_or_path runs/yoruba/model --data_dir data/yo --split dev

Words of greedy decoding, right where the alignment with the reference leaves them unchanged; the area under the ROC
curve is the chance that a right word has more confidence than a wrong one. Beside the product of the probabilities of
a word's characters, which transcribe.py gives: the least of them, and their geometric mean.
"""

import argparse
import itertools
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

import numpy as np
from rapidfuzz.distance import Levenshtein
from transformers.utils import logging

from config import DEFAULT_CHARACTERS_TO_IGNORE, TranscribeConfig
from data import ShardDataset
from recognition import Recogniser
from text import TextNormalizer
from timing import LabelPath, Word, find_words

EDGES = (0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99, 1.01)
MEASURES = {
    "product": np.prod,
    "least": np.min,
    "geometric mean": lambda values: np.exp(np.log(values).mean()),
}


def main() -> None:
    """Print the table of the product, then the area of each measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--characters_to_ignore", default=DEFAULT_CHARACTERS_TO_IGNORE)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    recogniser = Recogniser(TranscribeConfig(model_name_or_path=arguments.model_name_or_path))
    normalise = TextNormalizer.for_vocabulary(recogniser.vocabulary, arguments.characters_to_ignore, "auto")
    words, is_right = [], []
    dataset = ShardDataset(Path(arguments.data_dir) / arguments.split)
    for row in range(len(dataset)):
        (log_probs_TV,) = recogniser.log_probs([dataset[row].audio])
        found = find_words(LabelPath.greedy(log_probs_TV), recogniser.vocabulary, recogniser.grid.seconds)
        words += found
        is_right += right_words(normalise(dataset[row].text).split(), [word.text for word in found])
    print_table(words, np.array(is_right))


def right_words(reference: list[str], hypothesis: list[str]) -> list[bool]:
    """Of each word of the hypothesis."""
    found = np.zeros(len(hypothesis), bool)
    for block in Levenshtein.opcodes(reference, hypothesis):
        if block.tag == "equal":
            found[block.dest_start : block.dest_end] = True
    return found.tolist()


def print_table(words: list[Word], is_right: np.ndarray) -> None:
    """Confidence against the share of right words, and how well each measure divides right from wrong."""
    given = np.array([word.confidence for word in words])
    print(f"{len(words)} words, {is_right.mean():.1%} of them right")
    print(f"{'confidence':>12}{'words':>8}{'mean':>8}{'right':>8}")
    for low, high in itertools.pairwise(EDGES):
        inside = (given >= low) & (given < high)
        if inside.any():
            span = f"{low:g} to {min(high, 1):g}"
            print(f"{span:>12}{inside.sum():>8}{given[inside].mean():>8.2f}{is_right[inside].mean():>8.2f}")
    for name, measure in MEASURES.items():
        values = np.array([measure([one.confidence for one in word.characters]) for word in words])
        print(f"area under the ROC curve, {name}: {area(values, is_right):.3f}")


def area(values: np.ndarray, is_right: np.ndarray) -> float:
    """The chance that a right word has the greater value; a tie counts half."""
    right, wrong = values[is_right], values[~is_right]
    return float((right[:, None] > wrong).mean() + 0.5 * (right[:, None] == wrong).mean())


if __name__ == "__main__":
    main()
