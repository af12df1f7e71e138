"""Fine-tune a Wav2Vec2-style CTC speech recogniser on shards made by prepare.py.

The demo, nothing else needed:     accelerate launch train.py
One GPU:                           accelerate launch --mixed_precision fp16 train.py --config configs/english_large.yaml
Several GPUs:                      accelerate launch --config_file accelerate_config.yaml --num_processes 4 train.py ...
Debugging, without the launcher:   python train.py --config ... --max_train_samples 8 --max_steps 20
                                   --dataloader_num_workers 0
"""

from errors import RunFailed, exit_status

# isort: split

import allocator  # noqa: F401 - before torch
import collector  # before torch
import launched  # noqa: F401 - before torch

# isort: split

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

import card
from audio import SAMPLE_RATE_HZ
from best_model import EMA, TRAINED
from clock import describe_cost
from config import PrepareConfig, RunSettings, TrainConfig, parse_arguments
from data import Batch, ShardDataset, Update, evaluation_loader, training_loader
from hosts import check_hosts_agree, check_shared_folder
from joined import CORPUS
from letters import describe_letters, find_rare, letter_lines
from processes import RankStatus, naming_lost_processes, start_processes
from progress import Progress, format_seconds
from recovery import failing_by_name
from run import Run
from runlog import report_line
from scoring import OTHER_IS_OUT_OF_MEMORY, Evaluation, describe_limits, evaluate, rates, score_in_cuts
from sharding import whole
from slices import describe_slice
from stopping import end_loaders
from training_run import TrainingRun, choose_beginning
from transcripts import measure_letters

collector.wake()

DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.yaml"
Evaluates = Callable[[TrainingRun, Progress], None]
# How a rank's try at an update went; the worst of all ranks counts.
DONE, TRIES_AGAIN, GIVES_UP = range(3)
# Outside the passes through the model, which are done again in smaller cuts.
OUT_OF_MEMORY_REMEDY = "give --gradient_checkpointing, or use a smaller model"
# Groups of the slice `speaker_in_train`, and what the results call them.
VOICES = {"yes": "seen", "no": "unseen"}
# Figures of the whole, and where the results have those of each of several prepared sets.
OF_SETS = {"best_eval_wer": "best_eval_sets", "eval_full_wer": "eval_full_slices", "test_wer": "test_slices"}


def main() -> None:
    """Parse, set up, train, sum up."""
    arguments = sys.argv[1:] or ["--config", str(DEMO_CONFIG)]
    config = parse_arguments(TrainConfig, arguments, __doc__)
    conduct(config, Run, train_and_finish)


def conduct(
    config: RunSettings,
    make_run: Callable[[RunSettings, Accelerator], TrainingRun],
    work: Callable[[TrainingRun], None],
    may_shard: bool = True,
) -> None:
    """A whole run, of train.py or pretrain.py: its processes, its beginning, its work, and whatever ends it."""
    accelerator = start_processes(config.report_to, config.output_dir, config.ddp_timeout, may_shard=may_shard)
    try:
        with naming_lost_processes():
            chosen = begin(config, accelerator)
            if chosen is None:
                return
            run = make_run(chosen, accelerator)
        with failing_by_name(OUT_OF_MEMORY_REMEDY), run.stop:
            work(run)
    finally:
        end_loaders()
        accelerator.end_training()


def train_and_finish(run: Run) -> None:
    """The work of this command."""
    train(run, evaluate_and_log, score_before_training)
    finish(run)


def begin(config: RunSettings, accelerator: Accelerator) -> RunSettings | None:
    """The settings with what is resumed decided, and the demo's data made; None for a run that is finished already.

    Raises:
        UsageError: hosts that were started differently or do not share --output_dir; an occupied folder.
    """
    status, is_first = RankStatus(accelerator, config.ddp_timeout), accelerator.is_main_process
    check_hosts_agree(status, config)
    check_shared_folder(status, is_first, Path(config.output_dir))
    beginning = status.decide_first(is_first, lambda: choose_beginning(config))
    if beginning.is_finished:
        if is_first:
            print(f"finished already: {config.output_dir} holds train_results.json and model/")
        return None
    if config.demo_corpus:
        prepare_demo(config, accelerator)
    return dataclasses.replace(config, resume_from_checkpoint=beginning.resume_from_checkpoint)


def train(run: TrainingRun, evaluate: Evaluates, evaluate_before: Evaluates) -> None:
    """The loop: one update, then what is due at this step.

    Args:
        run: of train.py or pretrain.py.
        evaluate: makes an evaluation and its row of the log.
        evaluate_before: the same before the first update, of a model that can be scored already.
    """
    state = run.state
    loader = training_loader(
        run.train_set, run.plan, run.num_labels, run.collate, run.cut, state.step, run.total_steps,
        run.num_workers,
    )  # fmt: skip
    bar = Progress("training", run.total_steps, "updates", run.is_main, start=state.step, seconds_left=run.seconds_left)
    with bar as progress, run.stopping():
        run.meter.start()
        # Step 0, or what a resumed run was stopped from doing.
        finish_step(run, progress, evaluate, evaluate_before)
        for update in run.clock.waiting(loader):
            if run.is_over:  # Stopped early, now or before a resume.
                break
            with run.clock.phase("compute"):
                loss_sum, grad_norm = train_step(run, update)
            state.step += 1
            run.work_done.updates += 1
            run.count(update, loss_sum, grad_norm)
            finish_step(run, progress, evaluate, evaluate_before)
            progress.advance(note=run.meter.note)


def finish_step(run: TrainingRun, progress: Progress, evaluate: Evaluates, evaluate_before: Evaluates) -> None:
    """Evaluate, log and save, as is due at this step and not done yet."""
    config, step = run.config, run.state.step
    run.stop.check()
    if run.state.finished_step == step:
        return
    is_last = step == run.total_steps
    if step == 0:
        if run.is_scored_before:
            evaluate_before(run, progress)
    elif step % config.eval_steps == 0 or is_last:
        evaluate(run, progress)
    elif step % config.logging_steps == 0:
        run.log_training(progress)
    run.state.finished_step = step
    if step > 0 and (step % config.save_steps == 0 or run.is_over):
        run.save_checkpoint()


def train_step(run: TrainingRun, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over all micro-batches of `update` on this rank.

    The loss is the sum over the update's utterances divided by the update's label count over all ranks, so it does not
    depend on the cut (promise 1).

    Returns:
        CTC loss summed over this rank's utterances (float64 scalar), NaN on every rank where the update's loss is not
        finite, and the gradient norm before clipping.
    """
    accelerator, config = run.accelerator, run.config
    run.begin_step(update)
    losses = accumulate_gradients(run, update)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for _, loss_B in losses:
        loss_sum += loss_B.sum()
    with run.clock.phase("communication"):
        loss = run.gradients.sum_over_processes(accelerator, loss_sum / update.num_labels)
    loss_sum += 0.0 * loss  # NaN on every rank where it is on one
    grad_norm = run.gradients.clip(accelerator, config.max_grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = run.schedule.rate_at(update.step) * group["lr_scale"]
    if accelerator.scaler is None:
        # The scaler's own way to leave an update out, for fp32 and bf16: no weight ever becomes NaN.
        run.leave_out_next_step((~torch.isfinite(grad_norm)).float())
    run.optimizer.step()
    if run.ema is not None:
        run.ema.update(torch.isfinite(grad_norm))
    run.bad_updates.watch(update.step, losses, grad_norm, loss, run.write_bad_batches)
    return loss_sum, grad_norm


def accumulate_gradients(run: TrainingRun, update: Update) -> list[tuple[Batch, torch.Tensor]]:
    """Forward and backward of this rank's micro-batches; again, in smaller cuts, when memory runs out (trap 29).

    The ranks agree before any of them goes on: one that needs another try keeps the others waiting, with their
    gradients as they are, and one that can never fit its share stops them all.

    Returns:
        The micro-batches with the loss of each utterance, loss_B.
    """
    losses, failure = None, None
    while True:
        if losses is None:
            try:
                losses = try_update(run, update)
            except RunFailed as error:
                failure = error
        own_status = GIVES_UP if failure else TRIES_AGAIN if losses is None else DONE
        with run.clock.phase("communication"):
            status, run.stop.agreed = run.status.worst(own_status, run.stop.requested)
        if status == GIVES_UP:
            raise failure or RunFailed(OTHER_IS_OUT_OF_MEMORY)
        if status == DONE:
            return losses


def try_update(run: TrainingRun, update: Update) -> list[tuple[Batch, torch.Tensor]] | None:
    """The update's passes, or None when memory ran out and smaller cuts may do."""
    if not run.is_sharded:
        return run.cuts.attempt(lambda: pass_micro_batches(run, update))
    # No second try: the others wait in the midst of a pass for this process, whose passes must be theirs.
    (most,) = run.status.worst(len(update.micro_batches))
    losses = pass_micro_batches(run, update)
    for _ in range(most - len(losses)):
        run.pass_nothing()
    return losses


def pass_micro_batches(run: TrainingRun, update: Update) -> list[tuple[Batch, torch.Tensor]]:
    """One try at an update, from zero gradients and from the same random state every time."""
    # Dropout and layerdrop are a function of (seed, step, rank), so a resume needs no random state.
    draws = np.random.SeedSequence([run.config.seed, update.step, run.accelerator.process_index])
    torch.manual_seed(int(draws.generate_state(1)[0]))
    run.model.train()
    run.gradients.zero()
    losses = []
    run.begin_passes(update)
    for batch in run.cuts.divide(update.micro_batches):
        with run.memory_limit.watch():
            loss_B, objective_B = run.training_losses(batch)
            run.accelerator.backward(objective_B.sum() / update.num_labels)
        losses.append((batch, loss_B.detach()))
    return losses


def evaluate_and_log(run: Run, progress: Progress) -> None:
    """Evaluate on the dev set, and write the same few utterances out as text."""
    run.meter.pause()
    started_at = time.perf_counter()
    evaluations = {TRAINED: score(run, run.eval_set, run.eval_rows, "evaluating")}
    if run.ema is not None and run.state.step:  # Before training it is the same weights.
        with run.best.in_place(EMA):
            evaluations[EMA] = score(run, run.eval_set, run.eval_rows, "evaluating the moving average")
    with run.clock.phase("evaluation"):
        with whole(run.model):
            samples = transcribe_samples(run)
        run.log_evaluation(evaluations, started_at, samples, progress)
    run.meter.start()


def score(run: Run, dataset: ShardDataset, rows: np.ndarray, description: str) -> Evaluation:
    """`scoring.evaluate` on the run's clock."""
    with run.clock.phase("evaluation"), whole(run.model):
        evaluation = evaluate(run, dataset, rows, description)
    run.work_done.eval_seconds += float(dataset.num_samples[rows].sum(dtype=np.int64)) / SAMPLE_RATE_HZ
    return evaluation


@torch.no_grad()
def transcribe_samples(run: Run) -> list[dict[str, object]]:
    """Rows for eval_samples.csv, made by the first rank alone: an utterance's text does not depend on its batch."""
    samples = []
    if run.is_main:
        alone = dataclasses.replace(run.eval_cut, rank=0, num_processes=1)
        for batch in evaluation_loader(run.eval_set, run.sample_rows, run.collate, alone, num_workers=0):
            for utterance_id, reference, text in zip(batch.ids, batch.texts, score_in_cuts(run, batch)[1], strict=True):
                samples.append(
                    {"step": run.state.step, "id": utterance_id, "reference": reference, "prediction": text.hypothesis}
                )
    return samples


def score_before_training(run: Run, progress: Progress) -> None:
    """The test set as it was before, and row 0 of the log: what the checkpoint can do without this run."""
    run.meter.pause()
    if run.test_set is not None and run.state.test_before is None:
        run.state.test_before = evaluate_test(run)
    evaluate_and_log(run, progress)


def evaluate_test(run: Run) -> dict[str, object]:
    """The test split's rates with their limits, and those of its slices; known and new voices apart."""
    evaluation = score(run, run.test_set, np.arange(len(run.test_set)), "test set")
    results = rates(evaluation, run.test_breakdown.speakers, "test_")
    results |= {"test_raw_wer": evaluation.score.raw_wer, "test_loss": evaluation.score.loss}
    slices = run.test_breakdown.score(evaluation.counts)
    for one in slices:
        if one.name == "speaker_in_train" and one.group in VOICES:
            results[f"test_wer_{VOICES[one.group]}_speakers"] = one.wer.rate
    letters = describe_letters(evaluation.letters)
    return results | {"test_slices": list(map(describe_slice, slices)), "test_letters": letters}


def evaluate_all_of_dev(run: Run) -> dict[str, object]:
    """The dev split as a whole, where training looked at a subset of it."""
    if run.config.eval_split == "train" or len(run.eval_rows) == len(run.eval_set):
        return {}
    rows = np.arange(len(run.eval_set))
    evaluation, breakdown = score(run, run.eval_set, rows, "all of dev"), run.breakdown(run.eval_set, rows)
    slices = breakdown.score(evaluation.counts)
    return rates(evaluation, breakdown.speakers, "eval_full_") | {"eval_full_slices": list(map(describe_slice, slices))}


def try_average(run: Run) -> dict[str, object]:
    """Score the mean of the best evaluations' weights on dev; it becomes model/ where it is better than the best."""
    steps = run.best.averaged_steps
    if len(steps) < 2:
        if run.is_main:
            print(f"nothing to average: {len(steps)} evaluation with a finite {run.config.metric_for_best_model}")
        return {"average_of_steps": steps, "kept": "best"}
    run.best.load_average()
    return run.best.keep_better(score(run, run.eval_set, run.eval_rows, "average of the best"))


def finish(run: Run) -> None:
    """Score the test split with the best model, write train_results.json and say what came out."""
    results = run.training_results()
    run.best.load()
    if run.config.average_best is not None:
        results |= try_average(run)
    run.best.check()
    results |= evaluate_all_of_dev(run)
    if run.test_set is not None:
        results |= evaluate_test(run)
        results |= {f"{name}_before": value for name, value in (run.state.test_before or {}).items()}
    if run.is_main:
        results = run.eval_of_sets() | results | run.cost() | describe_alphabet(run)
        card.write_card(run.folder / "model", run, run.best.figures_of_model(results))
        run.write_results(results)
        print("\n".join(summary(run, results)), flush=True)


def describe_alphabet(run: Run) -> dict[str, object]:
    """The letters of the best dev evaluation, and those that the training text hardly has."""
    in_training = measure_letters(run.train_set, run.normalizer, run.cache)
    return {"best_eval_letters": run.state.best_eval_letters, "rare_in_training": find_rare(in_training)}


def summary(run: Run, results: dict[str, float]) -> list[str]:
    """The lines at the end: figures, where things lie, how to use the model."""
    is_demo = run.config.demo_corpus
    lines = ["", f"finished: {run.state.step} updates in {format_seconds(results['train_runtime'])} of training"]
    if run.state.stopped_early_because:
        lines.append(
            f"  stopped early, {run.total_steps - run.state.step} updates before the end: "
            f"{run.state.stopped_early_because}"
        )
    for name, meaning in (
        ("best_eval_wer", describe_best(run, results)),
        ("average_eval_wer", f"  mean of the best, {'kept' if results.get('kept') == 'average' else 'not kept'}"),
        ("eval_full_wer", f"  all {len(run.eval_set):,} utterances of it"),
        ("test_wer", "test WER, best model"),
        ("test_wer_seen_speakers", "  unseen strings, known voices" if is_demo else "  voices heard in training"),
        ("test_wer_unseen_speakers", "  unseen strings, unseen voice" if is_demo else "  voices never heard"),
    ):
        if name in results:
            before = results.get(f"{name.replace('best_', '')}_before")
            behind = f"   (before training {before:.2%})" if before is not None else ""
            lines.append(f"  {meaning:<32} {results[name]:7.2%}{describe_limits(results, name)}{behind}")
            lines += summary_of_sets(run, results.get(OF_SETS.get(name), []))
    found = results.get("test_letters") or results["best_eval_letters"]
    lines += [f"  {line}" for line in letter_lines(found, results["rare_in_training"], "train_results.json")]
    lines.append(f"  {describe_cost(results)}")
    folder = run.folder
    clip = run.config.data_dirs[0] / "demo_corpus" / run.test_set[0].id if is_demo and run.test_set else "CLIP.wav"
    return [
        *lines,
        f"  log {folder / 'training_log.csv'}, plot {folder / 'training_curve.png'}, model {folder / 'model'}",
        report_line(folder),
        f'use it: python -c "{"; ".join(card.usage(folder / "model", clip))}"',
    ]


def describe_best(run: Run, results: dict[str, object]) -> str:
    """What the best evaluation's WER is, in a few words."""
    dev, step, metric = run.eval_set.folder.name, run.state.best_step, run.config.metric_for_best_model
    best = f"{dev} WER, best at step {step}" if metric == "eval_wer" else f"{dev} WER, best {metric} at step {step}"
    return f"{best}, averaged" if results["best_weights"] == EMA else best


def summary_of_sets(run: Run, slices: list[dict[str, object]]) -> list[str]:
    """The WER of each of several prepared sets."""
    sets = [one for one in slices if one.get("slice", CORPUS) == CORPUS] if len(run.config.data_dirs) > 1 else []
    return [f"    {one['group']:<30} {one['wer']:7.2%}{describe_limits(one, 'wer')}" for one in sets]


def prepare_demo(config: TrainConfig, accelerator: Accelerator) -> None:
    """Make and prepare the built-in corpus where it is not there yet; the other ranks wait."""
    from prepare import prepare

    if accelerator.is_local_main_process:
        # Hosts may share the folder: one of them makes it, the others wait and find it.
        prepare(PrepareConfig(corpus="demo", data_dir=str(config.data_dirs[0])), is_waiting=True)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.exit(exit_status(main))
