"""A fine-tuned model with its text rules and a prepared split, ready to be scored.

T: frames, V: outputs of the head.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from cache import FactCache
from config import EvaluateConfig
from data import Batch, Collator, CutSettings, ShardDataset
from errors import UsageError
from hosts import check_same
from integrity import require_texts
from memory import MemoryLimit
from model import forward_with_loss
from pretrained import find_checkpoint_folder, load_recogniser
from processes import RankStatus, check_same_on_all_ranks, choose_loading_processes, main_first
from recovery import Cuts
from stopping import StopSignals
from text import TextNormalizer, Vocabulary, read_rules
from transcripts import measure_texts

# What a request to stop is answered with, and how it ends where that takes too long.
ANSWER_TO_STOP = ("ending behind this batch, earlier results are kept", "in the midst of a batch")


@dataclass(frozen=True)
class KnownTexts:
    """A normalizer whose texts hold no character that the vocabulary lacks (--unknown drop_character)."""

    normalizer: TextNormalizer
    vocabulary: Vocabulary

    def __call__(self, text: str) -> str:
        """Normalise one transcript."""
        return self.vocabulary.without_unknown(self.normalizer(text))


class ModelScorer:
    """A model with its text rules and a split: what `scoring.evaluate` needs.

    Args:
        config: the settings.
        accelerator: of this process.
        keeps_log_probs: of each batch, for a beam search; whoever looks at a batch takes them by `take_log_probs`.
    """

    def __init__(self, config: EvaluateConfig, accelerator: Accelerator, keeps_log_probs: bool = False) -> None:
        self.config, self.accelerator = config, accelerator
        self.forward_seconds = 0.0
        self._log_probs: dict[int, np.ndarray] | None = {} if keeps_log_probs else None
        self.status = RankStatus(accelerator, config.ddp_timeout)
        require_texts([Path(config.data_dir)])
        self.dataset = ShardDataset(Path(config.data_dir) / config.split)
        fingerprint = {f"the {config.split} data": self.dataset.fingerprint}
        check_same(self.status, fingerprint, "give every host the same data, or --data_dir on shared storage")
        name = config.model_name_or_path
        with main_first(accelerator):
            self.loaded = load_recogniser(name, config.target_lang)
            rules = {"case": config.case, "characters_to_ignore": config.characters_to_ignore}
            self.rules = read_rules(find_checkpoint_folder(name, config.target_lang), config.language, **rules)
        self.model = self.loaded.model.to(accelerator.device)
        check_same_on_all_ranks(accelerator, self.model)
        self.vocabulary = self.loaded.vocabulary
        self.normalizer = TextNormalizer.for_vocabulary(self.vocabulary, **self.rules)
        drops = config.unknown == "drop_character"
        self.collate = Collator(
            KnownTexts(self.normalizer, self.vocabulary) if drops else self.normalizer,
            self.vocabulary,
            self.loaded.processor.feature_extractor.do_normalize,
            self.model.hf.config,
            config.seed,
        )
        with main_first(accelerator):
            cache = FactCache(Path(config.data_dir))
            self.texts = measure_texts(self.dataset, self.normalizer, self.vocabulary, cache)
        self.eval_cut = CutSettings(
            accelerator.process_index,
            accelerator.num_processes,
            config.per_device_eval_batch_size,
            config.max_batch_seconds,
        )
        self.eval_cuts = Cuts("evaluation", "cut the clip, or use more memory", self._report)
        self.memory_limit = MemoryLimit(accelerator.device, config.memory_limit_mb)
        self.stop = StopSignals(None, time.monotonic(), *ANSWER_TO_STOP)
        self.num_workers = choose_loading_processes(config.dataloader_num_workers, accelerator.device)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """logits_BTV, frame_lengths_B and the CTC loss per utterance, loss_B, in the launcher's precision."""
        started_at = time.monotonic()
        with self.accelerator.autocast():
            found = forward_with_loss(self.model, batch.to(self.accelerator.device), self.vocabulary.blank_id)
        if self._log_probs is not None:
            for row, logits_TV, frames in zip(batch.rows.tolist(), *found[:2], strict=True):
                # A batch that ran out of memory comes again, in smaller cuts.
                self._log_probs[row] = logits_TV[:frames].float().log_softmax(dim=-1).cpu().numpy()
        self.forward_seconds += time.monotonic() - started_at
        return found

    def take_log_probs(self, row: int) -> np.ndarray:
        """Natural logarithms over the head's outputs for one utterance of the batch in hand, float32 [T, V]."""
        return self._log_probs.pop(row)

    def choose_rows(self) -> tuple[np.ndarray, list[tuple[str, str]]]:
        """The rows to score, and (id, unknown letters) of those that --unknown drop_utterance leaves out."""
        rows, dropped = np.arange(len(self.dataset)), []
        if self.config.unknown == "drop_utterance" and self.texts.coverage.unknown:
            is_kept = np.ones(len(rows), bool)
            columns = zip(self.dataset.column("id"), self.dataset.column("text"), strict=True)
            for row, (utterance_id, text) in enumerate(columns):
                normalised = self.normalizer(text)
                if lacking := sorted(set(normalised) - set(self.vocabulary.without_unknown(normalised)) - {" "}):
                    is_kept[row] = False
                    dropped.append((utterance_id, "".join(lacking)))
            rows = rows[is_kept]
        if not len(rows):
            raise UsageError("--unknown drop_utterance leaves no utterance: every text holds letters without a label")
        return rows, dropped

    def _report(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)
