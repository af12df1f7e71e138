"""Reads an ARPA file as its definition says; the reference for what is written and for what a decoder makes of it."""

from dataclasses import dataclass

Gram = tuple[str, ...]


@dataclass(frozen=True)
class Arpa:
    probabilities: dict[Gram, float]
    backoffs: dict[Gram, float]

    def log10(self, context: Gram, word: str) -> float:
        """log10 P(word | context), by backing off."""
        word = word if (word,) in self.probabilities else "<unk>"
        if (*context, word) in self.probabilities:
            return self.probabilities[(*context, word)]
        if not context:
            raise KeyError(word)
        return self.backoffs.get(context, 0.0) + self.log10(context[1:], word)

    def score(self, words: list[str], has_end: bool = True) -> float:
        """log10 probability of a sentence."""
        order = max(map(len, self.probabilities))
        total, context = 0.0, ("<s>",)
        for word in [*words, *(["</s>"] if has_end else [])]:
            total += self.log10(context, word)
            known = word if (word,) in self.probabilities else "<unk>"
            context = (*context, known)[-(order - 1) :]
        return total


def read_arpa(text: str) -> Arpa:
    counts, probabilities, backoffs = {}, {}, {}
    for line in text.splitlines():
        cells = line.split("\t")
        if line.startswith("ngram "):
            order, count = line.removeprefix("ngram ").split("=")
            counts[int(order)] = int(count)
        elif len(cells) > 1:
            words = tuple(cells[1].split(" "))
            probabilities[words] = float(cells[0])
            if len(cells) > 2:
                backoffs[words] = float(cells[2])
    for order, count in counts.items():
        assert sum(len(words) == order for words in probabilities) == count, f"the header says {count} {order}-grams"
    return Arpa(probabilities, backoffs)
