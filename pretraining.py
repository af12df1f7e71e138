"""Pre-training on speech without text: wav2vec 2.0's objective (https://arxiv.org/abs/2006.11477), exact for every cut.

A masked frame must be told apart, by the code that its own sound was quantised to, from other masked frames of its
utterance (the contrastive loss); all codes shall be used (the diversity loss).

Dimension letters: B utterances, S samples, T frames, M masked frames of an utterance, K distractors, G groups of codes,
V codes of a group, C channels of the convolutions, D dimensions in which prediction and code are compared.

The contrastive loss is a sum over utterances. The diversity loss is not: it is D(p), of the mean p over all masked
frames of an update of the probabilities of codes. For a known p it has the same gradient as a sum, however: with N
masked frames and s_b the sum of an utterance's probabilities, p = sum_b s_b / N, so d(N D(p)) = sum_b <dD/dp, d s_b>.
An update that is cut therefore takes p from a pass without gradients before (`code_prob_sum`), and its parts then add
up to the gradient of the whole (promise 1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import EncoderModel
from pretraining_data import PretrainingBatch

# log of a probability that has underflowed stays finite; p log p is 0 there either way.
SMALLEST = torch.finfo(torch.float32).tiny
# Rows of the log, one behind the other, and updates that they must stretch over, to show a collapse.
COLLAPSED_ROWS, COLLAPSED_UPDATES = 5, 20
# Codes per group: up to so many only one is in use, but for noise; from so many on several are; up to so many the
# distractors that are left say little.
DEAD_CODES, ALIVE_CODES, FEW_CODES = 1.1, 2.0, 4.0
# A group that began with one code should use a second one by then; or at least be on its way, by this factor.
STEPS_TO_WAKE, RISE = 1_000, 1.02
# Share of the most codes that an evaluation has seen in use, which a model must still use to be kept.
SOUND_SHARE = 0.25
# Of those few codes nothing is left to learn.
TRIVIAL_LOSS, TRIVIAL_ACCURACY = 0.05, 0.98


def gumbel_temperature(step: int, highest: float, lowest: float, decay: float) -> float:
    """Of update `step` (from 0): highest x decay^step, but not below `lowest`.

    As in transformers' script and fairseq (2, 0.5 and 0.999995 for base models).
    """
    return max(highest * decay**step, lowest)


@dataclass(frozen=True)
class Prediction:
    """What the loss needs of a micro-batch, all of the masked frames; rows behind num_masked_B mean nothing.

    Attributes:
        predicted_BMD: what the layers say about each masked frame.
        codes_BMD: the code of each, in the same space.
        chosen_BMG: which code of each group that is.
        code_prob_sum_BGV: probabilities of the codes summed over an utterance's masked frames, fp32; in evaluation
            how often each was chosen.
    """

    predicted_BMD: Tensor
    codes_BMD: Tensor
    chosen_BMG: Tensor
    code_prob_sum_BGV: Tensor


class PretrainingModel(EncoderModel):
    """A transformers `*ForPreTraining` of wav2vec 2.0's kind whose predictions do not depend on neighbours.

    Codes are chosen for masked frames alone, the only ones that anything is asked about.
    """

    masks_in_evaluation = True

    def _masks_time(self) -> bool:
        return True  # whatever the configuration says about fine-tuning

    def forward(self, batch: PretrainingBatch, gumbel_temperature: float | None = None) -> Prediction:
        """Predict the masked frames and choose their codes.

        Args:
            batch: on the model's device.
            gumbel_temperature: of the choice of codes in training; in evaluation the most probable one is taken.
        """
        encoder, masked = self.hf.base_model, batch.masked_frames_BM
        inputs = batch.input_values_BS, batch.sample_lengths_B, batch.time_mask_BT, batch.feature_mask_BH
        with self._passing_batch(*inputs) as (input_values_BS, _):
            heard = encoder(input_values_BS)
        # Few frames and few layers; in fp32, codes do not depend on the precision of a product.
        with torch.autocast(masked.device.type, enabled=False):
            predicted_BMD = self.hf.project_hid(_take(heard.last_hidden_state, masked))
            features_BMC = self.hf.dropout_features(_take(heard.extract_features, masked))
            codes_BMGV, code_probs_BMGV = self._choose(features_BMC, batch, gumbel_temperature)
            codes_BMD = self.hf.project_q(self._look_up(codes_BMGV))
        sums_BGV = self._sum_masked(code_probs_BMGV, batch)
        return Prediction(predicted_BMD, codes_BMD, codes_BMGV.argmax(dim=-1), sums_BGV)

    @torch.no_grad()
    def code_prob_sum(self, batch: PretrainingBatch) -> Tensor:
        """`Prediction.code_prob_sum_BGV` summed over the rows of training, [G, V] fp32, by the convolutions alone.

        Divided by the masked frames of all micro-batches on all ranks, their sum is the marginal of an update.
        """
        encoder, masked = self.hf.base_model, batch.masked_frames_BM
        with self._passing_batch(batch.input_values_BS, batch.sample_lengths_B) as (input_values_BS, _):
            features_BTC = encoder.feature_extractor(input_values_BS).transpose(1, 2)
            features_BTC = encoder.feature_projection.layer_norm(features_BTC)
        with torch.autocast(masked.device.type, enabled=False):
            logits_BMGV = self._code_logits(_take(features_BTC, masked))
        return self._sum_masked(logits_BMGV.softmax(dim=-1), batch).sum(dim=0)

    @property
    def num_groups(self) -> int:
        """G: the least that the perplexity can be, where each group uses one code."""
        return self.hf.quantizer.num_groups

    @property
    def num_codes(self) -> int:
        """G x V: the most that it can be, where all are used alike."""
        return self.hf.quantizer.num_groups * self.hf.quantizer.num_vars

    def _code_logits(self, features_BMC: Tensor) -> Tensor:
        return self.hf.quantizer.weight_proj(features_BMC).unflatten(-1, (self.num_groups, -1))

    def _choose(
        self, features_BMC: Tensor, batch: PretrainingBatch, gumbel_temperature: float | None
    ) -> tuple[Tensor, Tensor]:
        """One-hot choices with the gradient of a soft one, and the probabilities that diversity is about, [B, M, G, V].

        transformers' straight-through choice rounds its ones, so that equal codes need not be equal bit for bit.
        """
        logits_BMGV = self._code_logits(features_BMC)
        if not self.training:
            hard_BMGV = _most_probable(logits_BMGV)
            return hard_BMGV, hard_BMGV
        assert gumbel_temperature is not None and batch.gumbel_seeds is not None, "a batch of evaluation in training"
        noise_BMGV = draw_gumbel_noise(batch, logits_BMGV)
        soft_BMGV = ((logits_BMGV + noise_BMGV) / gumbel_temperature).softmax(dim=-1)
        return _most_probable(soft_BMGV) + (soft_BMGV - soft_BMGV.detach()), logits_BMGV.softmax(dim=-1)

    def _look_up(self, codes_BMGV: Tensor) -> Tensor:
        codebook_GVE = self.hf.quantizer.codevectors[0].unflatten(0, (self.num_groups, -1))
        return torch.einsum("bmgv,gve->bmge", codes_BMGV, codebook_GVE).flatten(-2)

    def _sum_masked(self, values_BMGV: Tensor, batch: PretrainingBatch) -> Tensor:
        return values_BMGV.masked_fill(~_is_masked(batch)[..., None, None], 0.0).sum(dim=1)


def draw_gumbel_noise(batch: PretrainingBatch, logits_BMGV: Tensor) -> Tensor:
    """Noise of the Gumbel distribution for each row's masked frames from the row's own seed, [B, M, G, V]."""
    noise_BMGV = torch.zeros_like(logits_BMGV)
    generator = torch.Generator(logits_BMGV.device)
    for row_MGV, seed, count in zip(noise_BMGV, batch.gumbel_seeds, batch.num_masked_B.tolist(), strict=True):
        if count:
            generator.manual_seed(seed)
            row_MGV[:count] = -torch.empty_like(row_MGV[:count]).exponential_(generator=generator).log()
    return noise_BMGV


def contrastive_sum(
    prediction: Prediction, batch: PretrainingBatch, logits_temperature: float
) -> tuple[Tensor, Tensor]:
    """Cross entropy of each masked frame's own code against the distractors', in nats, summed over an utterance's.

    Equation 3 of the paper: cosine similarities over a temperature. A distractor with the very same code is left out.

    Returns:
        contrastive_B, and correct_B: the masked frames whose own code is the most similar one. fp32.
    """
    with torch.autocast(prediction.codes_BMD.device.type, enabled=False):
        predicted_BMD, codes_BMD = (
            F.normalize(one, dim=-1, eps=1e-8) for one in (prediction.predicted_BMD, prediction.codes_BMD)
        )
        # All frames against all: far less than a vector for each of the K distractors of each.
        logits_BMM = predicted_BMD @ codes_BMD.transpose(1, 2) / logits_temperature
        same_BMM = (prediction.chosen_BMG[:, :, None] == prediction.chosen_BMG[:, None]).all(dim=-1)
        distractors_BMK = batch.distractors_BMK.long()
        positive_BM = logits_BMM.diagonal(dim1=1, dim2=2)
        others_BMK = logits_BMM.masked_fill(same_BMM, -math.inf).gather(2, distractors_BMK)
        loss_BM = torch.cat([positive_BM[..., None], others_BMK], dim=-1).logsumexp(dim=-1) - positive_BM
        correct_BM = positive_BM > others_BMK.amax(dim=-1)
    is_masked_BM = _is_masked(batch)
    return loss_BM.masked_fill(~is_masked_BM, 0.0).sum(dim=1), (correct_BM & is_masked_BM).sum(dim=1).to(loss_BM.dtype)


def perplexity(marginal_GV: Tensor) -> Tensor:
    """How many codes are in use, from G to G x V: exp of the entropy of each group, summed over the groups."""
    return _exp_entropy(marginal_GV).sum()


def diversity(marginal_GV: Tensor) -> Tensor:
    """The diversity loss D: the share of codes that is not in use, as transformers defines it (equation 4: entropy)."""
    return (marginal_GV.numel() - perplexity(marginal_GV)) / marginal_GV.numel()


def diversity_gradient(marginal_GV: Tensor) -> Tensor:
    """dD/dp, [G, V], without a graph."""
    marginal_GV = marginal_GV.detach()
    slope_GV = _exp_entropy(marginal_GV)[:, None] * (marginal_GV.clamp_min(SMALLEST).log() + 1)
    return slope_GV / marginal_GV.numel()


def _exp_entropy(marginal_GV: Tensor) -> Tensor:
    return (-(marginal_GV * marginal_GV.clamp_min(SMALLEST).log()).sum(dim=-1)).exp()


@dataclass(frozen=True)
class PretrainingStatistics:
    """Sums of each utterance of a micro-batch, without a graph; all may be added up over batches and ranks.

    Attributes:
        contrastive_B: contrastive loss, nats.
        correct_B: masked frames whose own code was the most similar one.
        masked_B: masked frames.
        code_prob_sum_BGV: see `Prediction`.
    """

    contrastive_B: Tensor
    correct_B: Tensor
    masked_B: Tensor
    code_prob_sum_BGV: Tensor


def pretraining_losses(
    model: PretrainingModel,
    batch: PretrainingBatch,
    marginal_GV: Tensor | None = None,
    gumbel_temperature: float | None = None,
) -> tuple[Tensor, Tensor, PretrainingStatistics]:
    """One micro-batch through the model, on whose device it lies; the caller divides by the update's masked frames.

    Args:
        model: in training or evaluation mode; its configuration has the weight of the diversity loss.
        batch: one micro-batch.
        marginal_GV: mean probabilities of the codes over all masked frames of the update (see `code_prob_sum`). None
            where this batch is the whole update: they are then its own.
        gumbel_temperature: in training, see `gumbel_temperature()`.

    Returns:
        loss_B: contrastive loss + weight x D x masked frames, of each utterance; a loss of the update when summed over
            it and divided. objective_B: what to call backward on; its gradient, summed over the update's utterances,
            is that of the loss. And the statistics.
    """
    config = model.hf.config
    prediction = model(batch, gumbel_temperature)
    contrastive_B, correct_B = contrastive_sum(prediction, batch, config.contrastive_logits_temperature)
    masked_B = batch.num_masked_B.to(contrastive_B, non_blocking=True)
    sums_BGV, weight = prediction.code_prob_sum_BGV, config.diversity_loss_weight
    if marginal_GV is None:
        marginal_GV = sums_BGV.sum(dim=0) / masked_B.sum().clamp_min(1.0)
        loss_B = objective_B = contrastive_B + weight * diversity(marginal_GV) * masked_B
    else:
        loss_B = contrastive_B + weight * diversity(marginal_GV) * masked_B
        objective_B = contrastive_B + weight * (sums_BGV * diversity_gradient(marginal_GV)).sum(dim=(1, 2))
    statistics = PretrainingStatistics(contrastive_B.detach(), correct_B, masked_B, sums_BGV.detach())
    return loss_B, objective_B, statistics


def _most_probable(scores_BMGV: Tensor) -> Tensor:
    """One-hot, without the look at the values that F.one_hot takes."""
    return torch.zeros_like(scores_BMGV).scatter(-1, scores_BMGV.argmax(dim=-1, keepdim=True), 1.0)


def _take(hidden_BTC: Tensor, frames_BM: Tensor) -> Tensor:
    """The masked frames, [B, M, C], in fp32 or more."""
    taken_BMC = hidden_BTC.gather(1, frames_BM[..., None].expand(-1, -1, hidden_BTC.shape[-1]))
    return taken_BMC.to(torch.promote_types(taken_BMC.dtype, torch.float32))


def _is_masked(batch: PretrainingBatch) -> Tensor:
    """True for the masked frames of each row, False behind its last, bool [B, M]."""
    places_M = torch.arange(batch.masked_frames_BM.shape[1], device=batch.masked_frames_BM.device)
    return places_M < batch.num_masked_B.to(places_M.device, non_blocking=True)[:, None]


# --- Collapse ------------------------------------------------------------------------------------------------------


def collapse_reason(
    history: Sequence[Mapping[str, float]], num_groups: int, num_codes: int, warmup_steps: int = 0
) -> str | None:
    """Why a run teaches nothing any more, in one line; None while it may.

    Two ways are known. Every group uses one code (transformers#14387: perplexity 2 for good), and the codes that are
    left can be told from a few frames, so that the task has become trivial (transformers#12934: loss 0). A run that
    begins with few codes and finds more is none of them, so that a low perplexity alone counts where it was higher
    before, or has not risen in a long time.

    Args:
        history: rows of the log, in order, with step, code_perplexity, contrastive_loss and accuracy of training; rows
            without them (NaN) are passed over.
        num_groups: G, the lowest perplexity.
        num_codes: G x V, the highest.
        warmup_steps: of the learning rate, in which codes may sleep.
    """
    rows = [row for row in history if math.isfinite(row.get("code_perplexity", math.nan))]
    if len(rows) < COLLAPSED_ROWS or rows[-1]["step"] - rows[0]["step"] < COLLAPSED_UPDATES:
        return None
    newest = range(len(rows) - COLLAPSED_ROWS, len(rows))
    recent = [
        row
        for number, row in enumerate(rows)
        if number in newest or row["step"] >= rows[-1]["step"] - COLLAPSED_UPDATES
    ]
    used = [row["code_perplexity"] for row in recent]
    is_dead = max(used) <= DEAD_CODES * num_groups
    is_trivial = max(used) <= FEW_CODES * num_groups and all(
        row["contrastive_loss"] < TRIVIAL_LOSS and row["accuracy"] > TRIVIAL_ACCURACY for row in recent
    )
    last = recent[-1]
    if is_trivial:
        found = f"the contrastive loss is {last['contrastive_loss']:.4f} and the accuracy {last['accuracy']:.1%}"
        because = "so few codes are in use that the task has become trivial"
    elif is_dead and (_was_alive(rows, num_groups) or _has_long_been_dead(rows, num_groups, warmup_steps)):
        found = f"and no row since step {recent[0]['step']:.0f} has more than {max(used):.2f}"
        because = f"each of the {num_groups} groups uses one code"
    else:
        return None
    return (
        f"pre-training has collapsed at step {last['step']:.0f}: the code perplexity is {last['code_perplexity']:.2f} "
        f"of {num_codes}, {found}: {because} (seen in transformers#14387, #12934); begin again with a lower "
        "--learning_rate, longer --warmup_steps or a higher --diversity_loss_weight, or with larger updates"
    )


def is_sound(code_perplexity: float, highest_before: float, num_groups: int) -> bool:
    """Whether an evaluation may be the best: not of a model that is losing its codes.

    Distractors with the code of the frame itself are left out of the contrastive loss, so that a model with few codes
    has a low one: 0 where all frames have one code.

    Args:
        code_perplexity: of this evaluation.
        highest_before: of all evaluations before it; 0.0 for none.
        num_groups: G.
    """
    return code_perplexity > max(ALIVE_CODES * num_groups, highest_before * SOUND_SHARE)


def _was_alive(rows: Sequence[Mapping[str, float]], num_groups: int) -> bool:
    return max(row["code_perplexity"] for row in rows) > ALIVE_CODES * num_groups


def _has_long_been_dead(rows: Sequence[Mapping[str, float]], num_groups: int, warmup_steps: int) -> bool:
    """Whether it never rose: all rows, until long behind the warm-up, and the last one no higher."""
    used = [row["code_perplexity"] for row in rows]
    is_long = len(rows) >= 2 * COLLAPSED_ROWS and rows[-1]["step"] >= max(STEPS_TO_WAKE, 2 * warmup_steps)
    return is_long and max(used) <= ALIVE_CODES * num_groups and used[-1] <= RISE * min(used[-2 * COLLAPSED_ROWS :])
