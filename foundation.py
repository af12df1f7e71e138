"""What any training is made of before its first step: data, optimizer, plan. Nothing here writes into a run.

`assembly.py` makes it a recogniser, `pretraining_run.py` an encoder that learns from audio alone.
"""

import functools
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator

from averaging import MovingAverage
from cache import FactCache
from data import Batch, BatchPlan, Collator, CutSettings, Update, has_utterances
from errors import UsageError
from findings import Finding
from hosts import check_same
from joined import open_sets
from memory import Passes
from model import optimizer_groups
from processes import RankStatus, SharedGradients, check_same_on_all_ranks, choose_loading_processes
from sampling import check_column, check_sampling, plan_sampling
from schedule import Schedule
from selection import Selection, draw_subset
from sharding import PREFIX, ShardedGradients, asks_for_sharding, is_sharded, shard, state_of
from slices import Trained, draw_stratified

if TYPE_CHECKING:
    from model import EncoderModel

SAMPLE_UTTERANCES = 8


class Foundation:
    """Data, model, optimizer and plan of a run of any kind, ready for the first step.

    A kind of training says what its model is (`_load_model`), which utterances take part (`_select`), what it computes
    of a micro-batch (`training_losses`, `forward`), and what there is to check (`check_data`).

    Raises:
        UsageError: data, model or settings that cannot work at all; what can be judged is left to preflight.py.
    """

    model: "EncoderModel"
    collate: Collator
    selection: Selection
    hf_config: object

    def __init__(self, config: object, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.is_main = accelerator.is_main_process
        self.status = RankStatus(accelerator, config.ddp_timeout)
        self._open_data()
        self._load_model()
        self._select()
        self.sampling = plan_sampling(self.train_set, self.selection.rows, config)
        self._choose_evaluated_rows()
        if self.is_sharded and config.max_batch_seconds == "auto":
            raise UsageError(
                "--max_batch_seconds auto with FSDP: processes that run out of memory at different sizes would wait "
                "for each other; give a number of seconds"
            )
        self.use_budget(None if config.max_batch_seconds == "auto" else config.max_batch_seconds)

    # Of each kind of training

    def _load_model(self) -> None:
        """Make `model`, `hf_config` and `collate`, and call `_prepare_model`."""
        raise NotImplementedError

    def _select(self) -> None:
        """Make `selection`."""
        raise NotImplementedError

    def check_data(self) -> tuple[list[Finding], list[str]]:
        """What the preflight finds in the data, and lines that show the first utterances."""
        raise NotImplementedError

    def training_losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss per utterance, loss_B, as it is logged, and what is minimised, objective_B: sums over targets."""
        raise NotImplementedError

    def _evaluation_pass(self, batch: Batch) -> None:
        """What an evaluation does with a batch, for the probes of memory."""
        raise NotImplementedError

    @property
    def training_lengths(self) -> np.ndarray:
        """Samples that training utterances can have: [N], or where augmentation changes them N for each way."""
        return self.plan.num_samples

    @property
    def keeps_trained_alone(self) -> bool:
        """Whether a checkpoint holds only the weights that are trained."""
        return False

    def probe_batch(self, batch: Batch) -> Batch:
        """A batch of noise as a training step would get it."""
        return batch

    # Data

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

    @functools.cached_property
    def cache(self) -> FactCache:
        """Where what is found in the data is kept; of one set alone it is kept beside that, see identities.py."""
        return FactCache(self.config.data_dirs[0])

    def _choose_evaluated_rows(self) -> None:
        config = self.config
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

    # Model

    def _place_model(self, model: "EncoderModel") -> None:
        """`model` on its device, the same on every rank, and divided among them where the launcher says so."""
        self.model = model.to(self.accelerator.device)
        check_same_on_all_ranks(self.accelerator, self.model)
        if asks_for_sharding():
            shard(self.model, self.accelerator)

    def _make_optimizer(self, layer_lr_decay: float = 1.0, head_lr_scale: float = 1.0) -> None:
        config, device = self.config, self.accelerator.device
        groups = optimizer_groups(self.model, config.weight_decay, layer_lr_decay, head_lr_scale)
        # The fused step leaves weights and moments alone when `found_inf` says so, without waiting for the device.
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        named = self.model.named_parameters()
        self.trained_names = {name.removeprefix(PREFIX) for name, value in named if value.requires_grad}
        self.gradients = ShardedGradients(trained) if self.is_sharded else SharedGradients(trained)
        if self.accelerator.scaler is not None:
            # A rank whose cut is empty scales no loss, and unscaling needs the scale on its device.
            self.accelerator.scaler.scale(torch.zeros((), device=device))
        self.ema = None if config.ema_decay is None else MovingAverage(self.model, config.ema_decay)
        self.leave_out_next_step(torch.ones((), device=device))
        optimizer.step()  # Makes the moments, so that their memory is counted before step 1.

    def weights_to_keep(self) -> dict[str, torch.Tensor]:
        """Of a checkpoint, LoRA's additions by themselves; no buffer changes, since batch norm keeps its statistics."""
        weights = state_of(self.model)
        return {name: weights[name] for name in weights if not self.keeps_trained_alone or name in self.trained_names}

    def leave_out_next_step(self, is_left_out: torch.Tensor) -> None:
        """Make the fused optimizer skip its next step where `is_left_out` is 1, as a loss scaler would."""
        fused = self.optimizer.optimizer
        fused.grad_scale, fused.found_inf = None, is_left_out

    @property
    def is_sharded(self) -> bool:
        """Whether the model is divided among the processes (FSDP)."""
        return is_sharded(self.model)

    # Updates

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
    def num_labels(self) -> np.ndarray:
        """Labels of each utterance of the plan, [N]."""
        return self.selection.num_labels

    # Hooks of the loop

    def begin_step(self, update: Update) -> None:
        """Before an update's first try, on every rank."""

    def begin_passes(self, update: Update) -> None:
        """Before each try at an update, on this rank alone."""

    # Passes

    def check_sampling(self) -> list[Finding]:
        """What drawing by groups does to the data."""
        return check_sampling(self.sampling, math.ceil(self.total_steps / max(1, self.plan.updates_per_epoch)))

    @property
    def passes(self) -> Passes:
        """Forward and backward passes for the probes of memory."""
        return Passes(
            train=self._train_pass,
            evaluate=self._evaluation_pass,
            clean=self.gradients.zero,
            vocabulary_size=self.hf_config.vocab_size,
            blank_id=self.hf_config.pad_token_id or 0,
            hf_config=self.hf_config,
            device=self.accelerator.device,
            bytes_per_value=4 if self.accelerator.mixed_precision == "no" else 2,
            is_divided=self.is_sharded,
        )

    def _train_pass(self, batch: Batch) -> None:
        self.model.train()
        self.accelerator.backward(self.training_losses(self.probe_batch(batch))[1].sum())
