"""What evaluate.py leaves in a folder: names of files and columns, and how utterances are grouped.

Nothing here imports torch, which writing results needs and reading them does not.
"""

UTTERANCES_FILE = "utterances.csv"
RESULTS_FILE = "results.json"
DROPS_FILE = "drop_list.csv"
COMPARISON_FILE = "comparison.json"
# Of evaluate.py --rank_train.
RANKING_FILE, RANKING_FACTS_FILE = "train_ranking.csv", "train_ranking.json"
RANKING_COLUMNS = (
    *("rank", "id", "score", "suggested", "heard", "ctc_loss_per_label", "best_path_agreement", "labels_per_second"),
    *("rate_deviation", "seconds", "reference", "hypothesis"),
)
TEXT_COLUMNS = ("id", "reference", "hypothesis", "seconds", "speaker")
# Of each utterance: its word errors, then its character errors.
COUNT_COLUMNS = tuple(
    f"{unit}_{part}" for unit in ("word", "character") for part in ("insertions", "deletions", "substitutions", "hits")
)
# A rate of fewer utterances says more about these than about their kind.
MIN_UTTERANCES = 30
# A column with more values than these names utterances rather than kinds of them.
MAX_GROUPS = 20
