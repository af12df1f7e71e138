"""Two models on the same utterances: how they differ, and whether chance explains it.

N: utterances that both have scored against the same reference.
"""

from dataclasses import asdict, dataclass

import numpy as np

from errors import UsageError
from intervals import Difference, Interval, rate_difference
from results import Utterances
from slices import error_intervals, errors_and_lengths


@dataclass(frozen=True)
class Comparison:
    """Of a model with another one.

    Attributes:
        utterances: that both have scored against the same reference.
        left_out: that only one of them has, or against another reference.
        other: WER and CER of the other model on them.
        own: of this model.
        differences: of WER and CER, this model's less the other one's.
    """

    utterances: int
    left_out: int
    other: tuple[Interval, Interval]
    own: tuple[Interval, Interval]
    differences: tuple[Difference, Difference]

    def facts(self) -> dict[str, object]:
        """For a JSON file."""
        return asdict(self) | {"is_clear": [bool(one.is_clear) for one in self.differences]}

    def lines(self, other_name: str, own_name: str) -> list[str]:
        """For the screen."""
        width = max(len(other_name), len(own_name), len("difference"))
        names = ("WER", "CER")
        lines = [f"compared on {self.utterances:,} utterances"]
        if self.left_out:
            lines[0] += f"; {self.left_out:,} left out, which one of the two has not scored, or against another text"
        for name, rates in ((other_name, self.other), (own_name, self.own)):
            said = (f"{kind} {rate}" for kind, rate in zip(names, rates, strict=True))
            lines.append(f"  {name:<{width}}  " + "   ".join(said))
        said = (f"{kind} {one.interval}" for kind, one in zip(names, self.differences, strict=True))
        lines.append(f"  {'difference':<{width}}  " + "   ".join(said))
        wer = self.differences[0]
        verdict = "chance does not explain the difference" if wer.is_clear else "the difference may be chance"
        lines.append(
            f"  WER: {verdict}; {wer.changed:,} utterances changed; a true difference of {wer.detectable:.2%} is what "
            "a set of this size shows in four of five cases"
        )
        return lines


def compare(own: Utterances, other: Utterances) -> Comparison:
    """Pair the utterances by id and compare.

    Raises:
        UsageError: no utterance is common to both.
    """
    shared = [(place, other.index[name]) for name, place in own.index.items() if name in other.index]
    pairs = np.array(shared, np.int64).reshape(-1, 2)
    pairs = pairs[own.references[pairs[:, 0]] == other.references[pairs[:, 1]]]
    if not len(pairs):
        why = "other references (other rules for case and punctuation)" if shared else "no utterance in common"
        raise UsageError(
            f"--compare: the two results have {why}: score the same split with the same --case, --characters_to_ignore "
            "and --unknown"
        )
    counts, other_counts = own.counts[pairs[:, 0]], other.counts[pairs[:, 1]]
    speakers = own.speakers[pairs[:, 0]]
    both = zip(errors_and_lengths(counts), errors_and_lengths(other_counts), strict=True)
    differences = tuple(rate_difference(theirs, ours, lengths, speakers) for (ours, lengths), (theirs, _) in both)
    left_out = len(set(own.index) | set(other.index)) - len(pairs)
    return Comparison(
        len(pairs), left_out, error_intervals(other_counts, speakers), error_intervals(counts, speakers), differences
    )
