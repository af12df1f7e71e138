"""What fine-tuning is made of before its first step: a recogniser, its texts, its losses. Nothing here writes."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from audio_checks import check_audio
from augment import Augmenter
from config import TrainConfig
from coverage import check_coverage, check_round_trip
from data import Batch, Collator, Update
from errors import UsageError
from findings import Finding
from foundation import Foundation
from integrity import require_texts
from joined import name_sets
from languages import Language, find_language
from memory import Shape, evaluation_mode
from metrics import score_batch
from model import Objective, forward_with_loss, is_of_head, masked_axes
from overlap import find_overlap
from pretrained import load_model, text_rules
from processes import main_first
from selection import select_training_rows
from sharding import asks_for_sharding, whole
from text import TextNormalizer
from transcripts import measure_texts, normalised_texts


class Assembly(Foundation):
    """Everything that fine-tuning works with, ready for the first step.

    Raises:
        UsageError: data, model or settings that cannot work at all; what can be judged is left to preflight.py.
    """

    config: TrainConfig

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        require_texts(config.data_dirs)
        super().__init__(config, accelerator)
        if self.is_sharded and config.freeze_encoder_steps:
            raise UsageError("--freeze_encoder_steps with FSDP is not possible: leave it out, or train without FSDP")

    def _find_languages(self) -> tuple[Language | None, tuple[tuple[str, Language], ...]]:
        """The language of all data, or those of the sets by name."""
        languages = list(map(find_language, self.config.languages))
        if len(languages) > 1:
            return None, tuple(zip(name_sets(self.config.data_dirs), languages, strict=True))
        return (languages[0] if languages else None), ()

    def _training_texts(self, of_sets: tuple[tuple[str, Language], ...]) -> Iterator[str]:
        """For a vocabulary: as found, but where each set has its language, whose rules only the set knows."""
        if not of_sets:
            return self.train_set.column("text")
        return normalised_texts(self.train_set, replace(text_rules(self.config), of_sets=of_sets))

    def _load_model(self) -> None:
        config = self.config
        language, of_sets = self._find_languages()
        self.loaded = load_model(config, lambda: self._training_texts(of_sets))
        self.vocabulary, self.head_fits = self.loaded.vocabulary, self.loaded.head_fits
        self.hf_config = self.loaded.model.hf.config
        self.normalizer = TextNormalizer.for_vocabulary(
            self.vocabulary, config.characters_to_ignore, config.case, language, of_sets
        )
        self.collate = Collator(
            self.normalizer,
            self.vocabulary,
            self.loaded.processor.feature_extractor.do_normalize,
            self.hf_config,
            config.seed,
            num_views=2 if config.consistency_weight > 0 else 1,
        )
        if config.trains_parts and asks_for_sharding():
            raise UsageError(
                "FSDP divides moments and gradients, of which --train_adapters and --lora_rank leave few: train "
                "without FSDP (--multi_gpu)"
            )
        self._place_model(self.loaded.model)
        if config.consistency_weight > 0 and not any(masked_axes(self.hf_config)):
            raise UsageError(
                "--consistency_weight compares two differently masked views, and nothing is masked: set "
                "--mask_time_prob, 0.1 or more"
            )
        self.objective = Objective(config.label_smoothing, config.consistency_weight)
        head_lr_scale = (config.head_learning_rate or config.learning_rate) / config.learning_rate
        self._make_optimizer(config.layer_lr_decay, head_lr_scale)
        self._is_encoder_frozen = False

    def _select(self) -> None:
        config = self.config
        # The others find in the cache what the first process has found.
        with main_first(self.accelerator):
            self.texts = {
                split: measure_texts(dataset, self.normalizer, self.vocabulary, self.cache)
                for split, dataset in self.sets.items()
            }
            self.overlap = find_overlap(self.sets, self.cache)
        self.selection = select_training_rows(self.train_set, config, self.texts["train"], self.overlap, self.hf_config)
        augmenter = Augmenter.of(
            config,
            config.seed,
            self.train_set,
            self.selection.rows,
            self.texts["train"].required_frames,
            self.hf_config,
        )
        self.collate = replace(self.collate, augmenter=augmenter)

    def check_data(self) -> tuple[list[Finding], list[str]]:
        """What the preflight finds in texts and clips, and the first utterances as text, ids and text again."""
        coverages = {split: texts.coverage for split, texts in self.texts.items()}
        shown = self.selection.rows if len(self.selection.rows) else np.arange(len(self.train_set))
        utterances, round_trip = check_round_trip(self.train_set, shown, self.normalizer, self.vocabulary)
        findings = [
            *check_coverage(self.sets, coverages, self.normalizer, self.vocabulary),
            round_trip,
            *self.selection.findings,
            *self.check_sampling(),
            *check_audio(self.sets),
            *self.overlap.findings,
        ]
        return findings, utterances

    def begin_step(self, update: Update) -> None:
        """The encoder thaws when its time has come."""
        self.freeze_encoder(update.step < self.config.freeze_encoder_steps)

    def freeze_encoder(self, is_frozen: bool) -> None:
        """Let the output layer alone learn, or all that is trained (again)."""
        if is_frozen != self._is_encoder_frozen:
            head = {parameter for name, parameter in self.model.named_parameters() if is_of_head(name)}
            self.gradients.freeze(lambda parameter: is_frozen and parameter not in head)
            self._is_encoder_frozen = is_frozen

    @property
    def keeps_trained_alone(self) -> bool:
        """Adapters and LoRA: the rest is read again from the model that the run began with, if there was one."""
        return self.config.trains_parts and self.config.model_name_or_path is not None

    @property
    def training_lengths(self) -> np.ndarray:
        """Samples that training utterances can have: [N], or where augmentation changes them N for each way."""
        augmenter = self.collate.augmenter
        return self.plan.num_samples if augmenter is None else augmenter.possible_lengths(self.plan.num_samples)

    def probe_batch(self, batch: Batch) -> Batch:
        """In as many views as a training step takes."""
        others = {"other_time_mask_BT": batch.time_mask_BT, "other_feature_mask_BH": batch.feature_mask_BH}
        return replace(batch, num_views=self.collate.num_views, **others)

    def pass_nothing(self) -> None:
        """A forward and a backward pass that add nothing: a process with less to do than another goes along (FSDP)."""
        self.model.train()
        batch = self.passes.make_batch(Shape(1, self.model.receptive_field))
        self.accelerator.backward(0.0 * self.forward(batch)[0].sum())

    def _evaluation_pass(self, batch: Batch) -> None:
        with whole(self.model), evaluation_mode(self.model):
            logits_BTV, frame_lengths_B, _ = self.forward(batch)
            score_batch(logits_BTV, frame_lengths_B, self.vocabulary, batch.texts, batch.raw_texts)

    def training_losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The CTC loss per utterance, loss_B, and what is minimised, objective_B."""
        logits_BTV, frame_lengths_B, loss_B = self.forward(batch)
        return loss_B, self.objective.of(logits_BTV, frame_lengths_B, loss_B)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """logits_BTV, frame_lengths_B and the CTC loss per utterance, loss_B, in the launcher's precision."""
        with self.accelerator.autocast():
            return forward_with_loss(self.model, batch.to(self.accelerator.device), self.vocabulary.blank_id)
