"""Fine-tune a Wav2Vec2-style CTC speech recogniser on shards made by prepare.py.

The demo, nothing else needed:     accelerate launch train.py
One GPU:                           accelerate launch --mixed_precision fp16 train.py --config configs/english_large.yaml
Several GPUs:                      accelerate launch --config_file accelerate_config.yaml --num_processes 4 train.py ...
Debugging, without the launcher:   python train.py --config ... --max_train_samples 8 --max_steps 20
                                   --dataloader_num_workers 0
"""

from errors import RunFailed, UsageError, exit_status

# isort: split

import allocator  # noqa: F401 - before torch

# isort: split

import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

import card
from audio import SAMPLE_RATE_HZ
from config import PrepareConfig, TrainConfig, parse_arguments
from data import Batch, ShardDataset, Update, evaluation_loader, training_loader
from metrics import Score, score_batch, score_inputs
from processes import describe_loss, is_lost_process, start_processes
from progress import Progress, format_seconds
from recovery import is_out_of_memory
from run import Run, choose_beginning
from schedule import learning_rate_at
from stopping import end_loaders
from text import required_frames

DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
# How a rank's try at an update went; the worst of all ranks counts.
DONE, TRIES_AGAIN, GIVES_UP = range(3)
OTHER_IS_OUT_OF_MEMORY = "another process of the run is out of memory; its own message says where"


def main() -> None:
    """Parse, set up, train, sum up."""
    arguments = sys.argv[1:] or ["--config", str(DEMO_CONFIG)]
    config = parse_arguments(TrainConfig, arguments, __doc__)
    accelerator = start_processes(config.report_to, config.output_dir, config.ddp_timeout)
    try:
        chosen = choose_beginning(config)
        if chosen is None:
            if accelerator.is_main_process:
                print(f"finished already: {config.output_dir} holds train_results.json and model/")
            return
        config = chosen
        if config.demo_corpus:
            prepare_demo(config, accelerator)
        run = Run(config, accelerator)
        with failing_by_name(), run.stop:
            train(run)
            finish(run)
    finally:
        end_loaders()
        accelerator.end_training()


def train(run: Run) -> None:
    """The loop: one update, then what is due at this step."""
    state = run.state
    loader = training_loader(
        run.train_set, run.plan, run.num_labels, run.collate, run.cut, state.step, run.total_steps,
        run.config.dataloader_num_workers,
    )  # fmt: skip
    with Progress("training", run.total_steps, "updates", run.is_main, start=state.step) as progress, run.stopping():
        run.meter.start()
        finish_step(run, progress)  # Step 0, or what a resumed run was stopped from doing.
        for update in loader:
            loss_sum, grad_norm = train_step(run, update)
            state.step += 1
            run.meter.add(update, loss_sum, grad_norm)
            finish_step(run, progress)
            progress.advance(note=run.meter.note)


def finish_step(run: Run, progress: Progress) -> None:
    """Evaluate, log and save, as is due at this step and not done yet."""
    config, step = run.config, run.state.step
    run.stop.check()
    if run.state.finished_step == step:
        return
    is_last = step == run.total_steps
    if step == 0:
        if run.head_fits:
            score_before_training(run, progress)
    elif step % config.eval_steps == 0 or is_last:
        evaluate_and_log(run, progress)
    elif step % config.logging_steps == 0:
        run.log_training(progress)
    run.state.finished_step = step
    if step > 0 and (step % config.save_steps == 0 or is_last):
        run.save_checkpoint()


def train_step(run: Run, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over all micro-batches of `update` on this rank.

    The loss is the sum over the update's utterances divided by the update's label count over all ranks, so it does not
    depend on the cut (promise 1).

    Returns:
        CTC loss summed over this rank's utterances (float64 scalar), NaN on every rank where the update's loss is not
        finite, and the gradient norm before clipping.
    """
    accelerator, config = run.accelerator, run.config
    losses = accumulate_gradients(run, update)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for _, loss_B in losses:
        loss_sum += loss_B.sum()
    loss = run.gradients.sum_over_processes(accelerator, loss_sum / update.num_labels)
    loss_sum += 0.0 * loss  # NaN on every rank where it is on one
    grad_norm = accelerator.clip_grad_norm_(run.gradients.parameters, config.max_grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate_at(
            update.step, config.lr_scheduler_type, config.learning_rate, config.warmup_steps, run.total_steps
        )
    if accelerator.scaler is None:
        # The scaler's own way to leave an update out, for fp32 and bf16: no weight ever becomes NaN.
        run.leave_out_next_step((~torch.isfinite(grad_norm)).float())
    run.optimizer.step()
    run.bad_updates.watch(update.step, losses, grad_norm, loss, run.write_bad_batches)
    return loss_sum, grad_norm


def accumulate_gradients(run: Run, update: Update) -> list[tuple[Batch, torch.Tensor]]:
    """Forward and backward of this rank's micro-batches; again, in smaller cuts, when memory runs out (trap 29).

    The ranks agree before any of them goes on: one that needs another try keeps the others waiting, with their
    gradients as they are, and one that can never fit its share stops them all.

    Returns:
        The micro-batches with the loss of each utterance, loss_B.
    """
    losses, failure = None, None
    while True:
        if losses is None:
            retries = run.cuts.retries
            try:
                losses = run.cuts.attempt(lambda: pass_micro_batches(run, update))
            except RunFailed as error:
                failure = error
            run.meter.count("oom_retries", run.cuts.retries - retries)
        own_status = GIVES_UP if failure else TRIES_AGAIN if losses is None else DONE
        status, run.stop.agreed = run.status.worst(own_status, run.stop.requested)
        if status == GIVES_UP:
            raise failure or RunFailed(OTHER_IS_OUT_OF_MEMORY)
        if status == DONE:
            return losses


def pass_micro_batches(run: Run, update: Update) -> list[tuple[Batch, torch.Tensor]]:
    """One try at an update, from zero gradients and from the same random state every time."""
    # Dropout and layerdrop are a function of (seed, step, rank), so a resume needs no random state.
    draws = np.random.SeedSequence([run.config.seed, update.step, run.accelerator.process_index])
    torch.manual_seed(int(draws.generate_state(1)[0]))
    run.model.train()
    run.gradients.zero()
    losses = []
    for batch in run.cuts.divide(update.micro_batches):
        with run.memory_limit.watch():
            loss_B = run.forward(batch)[2]
            run.accelerator.backward(loss_B.sum() / update.num_labels)
        losses.append((batch, loss_B.detach()))
    return losses


@torch.no_grad()
def evaluate(run: Run, dataset: ShardDataset, rows: np.ndarray, description: str) -> Score:
    """Score `rows` of `dataset`, each once on one rank; scores of the ranks are added, and no logits are kept.

    Raises:
        Stopped: a rank was asked to.
    """
    run.model.eval()
    score = Score()
    loader = evaluation_loader(dataset, rows, run.collate, run.eval_cut, run.config.dataloader_num_workers)
    with Progress(description, len(loader), "batches", run.is_main) as progress:
        failure = None
        for batch in loader:
            if run.stop.requested:
                break
            try:
                score += score_in_cuts(run, batch)[0]
            except RunFailed as error:
                failure = error
                break
            progress.advance(audio_seconds=batch.num_samples / SAMPLE_RATE_HZ)
    status, run.stop.agreed = run.status.worst(GIVES_UP if failure else DONE, run.stop.requested)
    if status == GIVES_UP:
        raise failure or RunFailed(OTHER_IS_OUT_OF_MEMORY)
    run.stop.check()
    vectors = run.accelerator.gather(score.to_vector().to(run.accelerator.device)[None])
    return sum(map(Score.from_vector, vectors.cpu()), Score())


def score_in_cuts(run: Run, batch: Batch) -> tuple[Score, list[str]]:
    """Score and hypotheses of one batch, in smaller cuts when memory runs out: the scores are the same."""
    retries = run.eval_cuts.retries
    while (results := run.eval_cuts.attempt(lambda: score_pieces(run, batch))) is None:
        pass
    run.meter.count("oom_retries", run.eval_cuts.retries - retries)
    return sum((score for score, _ in results), Score()), [text for _, texts in results for text in texts]


def score_pieces(run: Run, batch: Batch) -> list[tuple[Score, list[str]]]:
    """`score_one` of every piece that the limit makes of a batch."""
    return [score_one(run, piece) for piece in run.eval_cuts.divide([batch])]


def score_one(run: Run, batch: Batch) -> tuple[Score, list[str]]:
    """Decode and count one batch; returns the hypotheses too."""
    with run.memory_limit.watch():
        logits_BTV, frame_lengths_B, loss_B = run.forward(batch)
    # A row with more labels than frames has no CTC loss; its words are counted, its labels do not thin the loss out.
    labels = batch.labels_L.split(batch.label_lengths_B.tolist())
    has_loss = [
        frames >= required_frames(row.numpy()) for frames, row in zip(frame_lengths_B.tolist(), labels, strict=True)
    ]
    score, hypotheses = score_batch(
        logits_BTV, frame_lengths_B, run.vocabulary, batch.texts, batch.raw_texts,
        loss_sum=float(loss_B.sum()), labels=int(batch.label_lengths_B[torch.tensor(has_loss)].sum()),
    )  # fmt: skip
    return score + score_inputs(batch.input_values_BS, batch.sample_lengths_B), hypotheses


def evaluate_and_log(run: Run, progress: Progress) -> None:
    """Evaluate on the dev set, and write the same few utterances out as text."""
    run.meter.pause()
    started_at = time.perf_counter()
    score = evaluate(run, run.eval_set, run.eval_rows, "evaluating")
    run.log_evaluation(score, time.perf_counter() - started_at, transcribe_samples(run), progress)
    run.meter.start()


@torch.no_grad()
def transcribe_samples(run: Run) -> list[dict[str, object]]:
    """Rows for eval_samples.csv, made by the first rank alone: an utterance's text does not depend on its batch."""
    samples = []
    if run.is_main:
        alone = dataclasses.replace(run.eval_cut, rank=0, num_processes=1)
        for batch in evaluation_loader(run.eval_set, run.sample_rows, run.collate, alone, num_workers=0):
            hypotheses = score_in_cuts(run, batch)[1]
            for utterance_id, reference, hypothesis in zip(batch.ids, batch.texts, hypotheses, strict=True):
                samples.append(
                    {"step": run.state.step, "id": utterance_id, "reference": reference, "prediction": hypothesis}
                )
    return samples


def score_before_training(run: Run, progress: Progress) -> None:
    """The test set as it was before, and row 0 of the log: what the checkpoint can do without this run."""
    run.meter.pause()
    if run.test_set is not None and run.state.test_before is None:
        run.state.test_before = evaluate_test(run)
    evaluate_and_log(run, progress)


def evaluate_test(run: Run) -> dict[str, float]:
    """WER and CER of the test split; by speakers heard and not heard in training, where speakers are known."""
    trained = set(itertools.compress(run.train_set.column("speaker"), run.selection.reasons == 0))
    is_seen = np.array([speaker in trained for speaker in run.test_set.column("speaker")], bool)
    parts = {"seen": np.flatnonzero(is_seen), "unseen": np.flatnonzero(~is_seen)}
    scores = {name: evaluate(run, run.test_set, rows, "test set") for name, rows in parts.items() if len(rows)}
    total = sum(scores.values(), Score())
    results = {"test_wer": total.wer, "test_cer": total.cer, "test_raw_wer": total.raw_wer, "test_loss": total.loss}
    if trained != {""}:
        results |= {f"test_wer_{name}_speakers": score.wer for name, score in scores.items()}
    return results


def finish(run: Run) -> None:
    """Score the test split with the best model, write train_results.json and say what came out."""
    results = run.training_results()
    run.load_best()
    run.check_best()
    if run.test_set is not None:
        results |= evaluate_test(run)
        results |= {f"{name}_before": value for name, value in (run.state.test_before or {}).items()}
    if run.is_main:
        card.write_card(run.folder / "model", run, results)
        run.write_results(results)
        print("\n".join(summary(run, results)), flush=True)


def summary(run: Run, results: dict[str, float]) -> list[str]:
    """The lines at the end: figures, where things lie, how to use the model."""
    is_demo = run.config.demo_corpus
    lines = ["", f"finished: {run.state.step} updates in {format_seconds(results['train_runtime'])} of training"]
    for name, meaning in (
        ("best_eval_wer", f"{run.eval_set.folder.name} WER, best at step {run.state.best_step}"),
        ("test_wer", "test WER, best model"),
        ("test_wer_seen_speakers", "  unseen strings, known voices" if is_demo else "  voices heard in training"),
        ("test_wer_unseen_speakers", "  unseen strings, unseen voice" if is_demo else "  voices never heard"),
    ):
        if name in results:
            before = results.get(f"{name.replace('best_', '')}_before")
            behind = f"   (before training {before:.2%})" if before is not None else ""
            lines.append(f"  {meaning:<32} {results[name]:7.2%}{behind}")
    folder = run.folder
    clip = Path(run.config.data_dir) / "demo_corpus" / run.test_set[0].id if is_demo and run.test_set else "CLIP.wav"
    return [
        *lines,
        f"  log {folder / 'training_log.csv'}, plot {folder / 'training_curve.png'}, model {folder / 'model'}",
        f'use it: python -c "{"; ".join(card.usage(folder / "model", clip))}"',
    ]


@contextlib.contextmanager
def failing_by_name() -> Iterator[None]:
    """Once the run has begun, what goes wrong is a failed run (status 1), said by the rank that it happened to."""
    try:
        yield
    except UsageError as error:
        # DataLoader puts the trace of its worker before the message.
        raise RunFailed(str(error).strip().splitlines()[-1].removeprefix("errors.UsageError: ")) from error
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, RunFailed) and is_lost_process(error):
            raise RunFailed(f"another process of the run {describe_loss(error)}; its own message says why") from error
        if isinstance(error, RunFailed) or not is_out_of_memory(error):
            raise
        # Outside the passes through the model, which are done again in smaller cuts.
        raise RunFailed(
            f"out of memory ({str(error).strip().splitlines()[0]}): close other programs on the device, give "
            "--gradient_checkpointing, or use a smaller model"
        ) from error


def prepare_demo(config: TrainConfig, accelerator: Accelerator) -> None:
    """Make and prepare the built-in corpus where it is not there yet; the other ranks wait."""
    from prepare import prepare

    if accelerator.is_local_main_process:
        # Hosts may share the folder: one of them makes it, the others wait and find it.
        prepare(PrepareConfig(corpus="demo", data_dir=config.data_dir), is_waiting=True)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.exit(exit_status(main))
