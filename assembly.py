"""What a run is made of before its first step: data, model, optimizer, plan. Nothing here writes into a run."""

import functools
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from augment import Augmenter
from averaging import MovingAverage
from cache import FactCache
from config import TrainConfig
from data import Batch, BatchPlan, Collator, CutSettings, has_utterances
from errors import UsageError
from hosts import check_same
from joined import open_sets
from memory import Passes, Shape, evaluation_mode
from metrics import score_batch
from model import Objective, forward_with_loss, is_of_head, masked_axes, optimizer_groups
from overlap import find_overlap
from pretrained import load_model
from processes import RankStatus, SharedGradients, check_same_on_all_ranks, choose_loading_processes, main_first
from sampling import check_column, plan_sampling
from schedule import Schedule
from selection import draw_subset, select_training_rows
from sharding import ShardedGradients, asks_for_sharding, is_sharded, shard, whole
from slices import Trained, draw_stratified
from text import TextNormalizer
from transcripts import measure_texts

SAMPLE_UTTERANCES = 8


class Assembly:
    """Everything that the loop works with, ready for the first step.

    Raises:
        UsageError: data, model or settings that cannot work at all; what can be judged is left to preflight.py.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.is_main = accelerator.is_main_process
        self.status = RankStatus(accelerator, config.ddp_timeout)
        self._open_data()
        self._load_model()
        self._select_utterances()
        if self.is_sharded and config.max_batch_seconds == "auto":
            raise UsageError(
                "--max_batch_seconds auto with FSDP: processes that run out of memory at different sizes would wait "
                "for each other; give a number of seconds"
            )
        if self.is_sharded and config.freeze_encoder_steps:
            raise UsageError("--freeze_encoder_steps with FSDP is not possible: leave it out, or train without FSDP")
        self.use_budget(None if config.max_batch_seconds == "auto" else config.max_batch_seconds)

    def _open_data(self) -> None:
        data_dirs = self.config.data_dirs
        self.train_set = open_sets(data_dirs, "train")
        check_column(self.train_set, self.config.sample_by)
        self.eval_set = self.train_set if self.config.eval_split == "train" else open_sets(data_dirs, "dev")
        self.sets = {"train": self.train_set}
        if self.eval_set is not self.train_set:
            self.sets["dev"] = self.eval_set
        if any(has_utterances(one / "test") for one in data_dirs):
            # Checked, and kept out of training, also where it is not scored: someone will score it one day.
            self.sets["test"] = open_sets(data_dirs, "test")
        self.test_set = self.sets.get("test") if self.config.do_predict else None
        fingerprints = {f"the {name} data": dataset.fingerprint for name, dataset in self.sets.items()}
        check_same(self.status, fingerprints, "give every host the same data, or --data_dir on shared storage")

    def _load_model(self) -> None:
        config, device = self.config, self.accelerator.device
        self.loaded = load_model(config, lambda: self.train_set.column("text"))
        self.vocabulary, self.head_fits = self.loaded.vocabulary, self.loaded.head_fits
        self.hf_config = self.loaded.model.hf.config
        self.normalizer = TextNormalizer.for_vocabulary(self.vocabulary, config.characters_to_ignore, config.case)
        self.collate = Collator(
            self.normalizer,
            self.vocabulary,
            self.loaded.processor.feature_extractor.do_normalize,
            self.hf_config,
            config.seed,
            num_views=2 if config.consistency_weight > 0 else 1,
        )
        self.model = self.loaded.model.to(device)
        check_same_on_all_ranks(self.accelerator, self.model)
        if asks_for_sharding():
            shard(self.model, self.accelerator)
        if config.consistency_weight > 0 and not any(masked_axes(self.hf_config)):
            raise UsageError(
                "--consistency_weight compares two differently masked views, and nothing is masked: set "
                "--mask_time_prob, 0.1 or more"
            )
        self.objective = Objective(config.label_smoothing, config.consistency_weight)
        head_lr_scale = (config.head_learning_rate or config.learning_rate) / config.learning_rate
        groups = optimizer_groups(self.model, config.weight_decay, config.layer_lr_decay, head_lr_scale)
        # The fused step leaves weights and moments alone when `found_inf` says so, without waiting for the device.
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.gradients = ShardedGradients(trained) if self.is_sharded else SharedGradients(trained)
        self._is_encoder_frozen = False
        if self.accelerator.scaler is not None:
            # A rank whose cut is empty scales no loss, and unscaling needs the scale on its device.
            self.accelerator.scaler.scale(torch.zeros((), device=device))
        self.ema = None if config.ema_decay is None else MovingAverage(self.model, config.ema_decay)
        self.leave_out_next_step(torch.ones((), device=device))
        optimizer.step()  # Makes the moments, so that their memory is counted before step 1.

    def freeze_encoder(self, is_frozen: bool) -> None:
        """Let the output layer alone learn, or all that is trained (again)."""
        if is_frozen != self._is_encoder_frozen:
            head = {parameter for name, parameter in self.model.named_parameters() if is_of_head(name)}
            self.gradients.freeze(lambda parameter: is_frozen and parameter not in head)
            self._is_encoder_frozen = is_frozen

    def leave_out_next_step(self, is_left_out: torch.Tensor) -> None:
        """Make the fused optimizer skip its next step where `is_left_out` is 1, as a loss scaler would."""
        fused = self.optimizer.optimizer
        fused.grad_scale, fused.found_inf = None, is_left_out

    def _select_utterances(self) -> None:
        config = self.config
        cache = FactCache(config.data_dirs[0])  # What is found in one set alone is kept beside that; see identities.py.
        # The others find in the cache what the first process has found.
        with main_first(self.accelerator):
            self.texts = {
                split: measure_texts(dataset, self.normalizer, self.vocabulary, cache)
                for split, dataset in self.sets.items()
            }
            self.overlap = find_overlap(self.sets, cache)
        self.selection = select_training_rows(self.train_set, config, self.texts["train"], self.overlap, self.hf_config)
        self.num_labels = self.selection.num_labels
        augmenter = Augmenter.of(
            config,
            config.seed,
            self.train_set,
            self.selection.rows,
            self.texts["train"].required_frames,
            self.hf_config,
        )
        self.collate = replace(self.collate, augmenter=augmenter)
        self.sampling = plan_sampling(self.train_set, self.selection.rows, config)
        candidates = self.selection.rows if config.eval_split == "train" else np.arange(len(self.eval_set))
        self.eval_rows = candidates
        if config.max_eval_samples is not None and config.max_eval_samples < len(candidates):
            trained = None if self.eval_set is self.train_set else self.trained
            self.eval_rows = draw_stratified(self.eval_set, candidates, trained, config.max_eval_samples, config.seed)
        self.sample_rows = draw_subset(self.eval_rows, SAMPLE_UTTERANCES, config.seed)

    @functools.cached_property
    def trained(self) -> Trained:
        """Speakers and sentences that training hears."""
        return Trained.of(self.train_set, self.selection.reasons == 0)

    @property
    def is_sharded(self) -> bool:
        """Whether the model is divided among the processes (FSDP)."""
        return is_sharded(self.model)

    @property
    def num_workers(self) -> int:
        """Loading processes of this rank, for training and evaluations alike."""
        return choose_loading_processes(self.config.dataloader_num_workers, self.accelerator.device)

    @property
    def utterances_per_update(self) -> int:
        """By the settings and the number of processes; a resumed run keeps the number that it began with."""
        config = self.config
        micro_steps = config.gradient_accumulation_steps * self.accelerator.num_processes
        return config.per_device_train_batch_size * micro_steps

    def plan_updates(self, utterances_per_update: int) -> None:
        """Lay the updates out: `plan` and `total_steps`."""
        rows, config = self.selection.rows, self.config
        lengths = self.train_set.num_samples[rows]
        self.plan = BatchPlan(rows, lengths, utterances_per_update, config.seed, self.sampling)
        self.total_steps = config.max_steps
        if self.total_steps == -1:
            self.total_steps = max(1, round(config.num_train_epochs * self.plan.updates_per_epoch))
        self.schedule = Schedule.of(config, self.total_steps)

    def use_budget(self, max_batch_seconds: float | None) -> None:
        """Cut updates and evaluations by padded seconds of audio, or by count (None): `cut` and `eval_cut`."""
        self.max_batch_seconds = max_batch_seconds
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.cut = CutSettings(rank, processes, self.config.per_device_train_batch_size, max_batch_seconds)
        self.eval_cut = CutSettings(rank, processes, self.config.per_device_eval_batch_size, max_batch_seconds)

    @property
    def passes(self) -> Passes:
        """Forward and backward passes for the probes of memory."""
        return Passes(
            train=self._train_pass,
            evaluate=self._evaluation_pass,
            clean=self.gradients.zero,
            vocabulary_size=len(self.vocabulary),
            blank_id=self.vocabulary.blank_id,
            hf_config=self.hf_config,
            device=self.accelerator.device,
            bytes_per_value=4 if self.accelerator.mixed_precision == "no" else 2,
            is_divided=self.is_sharded,
        )

    @property
    def training_lengths(self) -> np.ndarray:
        """Samples that training utterances can have: [N], or where augmentation changes them N for each way."""
        augmenter = self.collate.augmenter
        return self.plan.num_samples if augmenter is None else augmenter.possible_lengths(self.plan.num_samples)

    def _train_pass(self, batch: Batch) -> None:
        self.model.train()
        others = {"other_time_mask_BT": batch.time_mask_BT, "other_feature_mask_BH": batch.feature_mask_BH}
        batch = replace(batch, num_views=self.collate.num_views, **others)
        self.accelerator.backward(self.training_losses(batch)[1].sum())

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
