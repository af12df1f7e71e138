"""transformers' Trainer on Wav2Vec2ForCTC as its CTC example script sets it up; a process of vs_trainer.py.

Follows examples/pytorch/speech-recognition/run_speech_recognition_ctc.py: `prepare_dataset` by `datasets.map` stores
the waveforms as lists of floats, `DataCollatorCTCWithPadding` pads waveforms and labels apart, the feature encoder is
frozen, `preprocess_logits_for_metrics` takes the argmax, and WER and CER come from decoded ids. The audio column holds
samples instead of files, since the clips are prepared on both sides; WER is jiwer's, which `evaluate` calls too.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path[:0] = [str(REPOSITORY)]

import datasets
import jiwer
import numpy as np
import torch
from transformers import AutoProcessor, Trainer, TrainerCallback, TrainingArguments, Wav2Vec2ForCTC

from audio import SAMPLE_RATE_HZ


def main() -> None:
    """Convert clips, or train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "clips", "dataset", "output", "events"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--convert", action="store_true")
    parser.add_argument("--grouped", action="store_true")
    parser.add_argument("--order", type=Path, help="a file with the rows in the order in which to train on them")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    for name in ("steps", "save_steps", "batch_size"):
        parser.add_argument(f"--{name}", type=int)
    arguments = parser.parse_args()
    if arguments.convert:
        convert(arguments.clips, arguments.checkpoint, arguments.dataset)
    else:
        train(arguments)


def convert(clips: Path, checkpoint: Path, folder: Path) -> None:
    """What `datasets.map` with the script's prepare_dataset leaves behind, for each split."""
    from data import ShardDataset

    processor = AutoProcessor.from_pretrained(checkpoint)

    def prepare_dataset(row: dict[str, Any]) -> dict[str, Any]:
        audio = np.asarray(row["audio"], np.float32) / 2**15
        inputs = processor.feature_extractor(audio, sampling_rate=SAMPLE_RATE_HZ)
        return {
            "input_values": inputs.input_values[0],
            "input_length": len(audio),
            "labels": processor.tokenizer(row["text"]).input_ids,
        }

    for split in ("train", "dev"):
        shards = ShardDataset(clips / split)
        rows = [{"audio": shards[row].audio, "text": shards[row].text} for row in range(len(shards))]
        table = datasets.Dataset.from_list(rows)
        table.map(prepare_dataset, remove_columns=table.column_names).save_to_disk(folder / split)


class Collator:
    """The script's DataCollatorCTCWithPadding, and a count of what it pads."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.samples = self.padded_samples = 0

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Padded `input_values`, `attention_mask`, and `labels` with -100 behind their ends."""
        waves = [{"input_values": feature["input_values"]} for feature in features]
        batch = self.processor.pad(waves, padding="longest", return_tensors="pt", return_attention_mask=True)
        label_rows = [{"input_ids": feature["labels"]} for feature in features]
        labels = self.processor.pad(labels=label_rows, padding="longest", return_tensors="pt")
        batch["labels"] = labels["input_ids"].masked_fill(labels.attention_mask.ne(1), -100)
        self.samples += sum(len(wave["input_values"]) for wave in waves)
        self.padded_samples += batch["input_values"].numel()
        return batch


class Events(TrainerCallback):
    """Writes the time of every update, and the loss, as lines of JSON."""

    def __init__(self, path: Path, collate: Collator) -> None:
        self.path, self.collate = path, collate

    def write(self, **event: Any) -> None:
        """One line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"time": time.time(), **event}) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An update is done."""
        collate = self.collate
        self.write(step=state.global_step, samples=collate.samples, padded_samples=collate.padded_samples)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Loss of the updates since the last one."""
        if "loss" in logs:
            self.write(loss_step=state.global_step, loss=logs["loss"])


class InOrder(Trainer):
    """Trains on the rows in a given order, with the loss that train.py has: summed, divided by the update's labels."""

    order: list[int]

    def _get_train_sampler(self, *_: Any) -> list[int]:
        return self.order

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *_: Any, **__: Any) -> torch.Tensor:
        """Of a batch that is an update."""
        return model(**inputs).loss / (inputs["labels"] >= 0).sum()


def train(arguments: argparse.Namespace) -> None:
    """The script's training and evaluation."""
    sets = {split: datasets.load_from_disk(arguments.dataset / split) for split in ("train", "dev")}
    processor = AutoProcessor.from_pretrained(arguments.checkpoint)
    reduction = "sum" if arguments.order else "mean"
    model = Wav2Vec2ForCTC.from_pretrained(
        arguments.checkpoint, ctc_loss_reduction=reduction, ctc_zero_infinity=True, pad_token_id=0
    )
    model.freeze_feature_encoder()
    collate = Collator(processor)
    events = Events(arguments.events, collate)
    settings = TrainingArguments(
        output_dir=arguments.output, per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size, max_steps=arguments.steps, learning_rate=1e-4,
        logging_steps=1 if arguments.order else 10, save_steps=arguments.save_steps or arguments.steps + 1,
        save_strategy="steps" if arguments.save_steps else "no", report_to=[], use_cpu=not torch.cuda.is_available(),
        bf16=arguments.bf16, length_column_name="input_length", disable_tqdm=True, max_grad_norm=1.0,
        train_sampling_strategy="group_by_length" if arguments.grouped else "random",
    )  # fmt: skip

    def compute_metrics(predicted: Any) -> dict[str, float]:
        label_ids = np.where(predicted.label_ids == -100, processor.tokenizer.pad_token_id, predicted.label_ids)
        hypotheses = processor.batch_decode(predicted.predictions[0])
        references = processor.batch_decode(label_ids, group_tokens=False)
        return {"wer": jiwer.wer(references, hypotheses), "cer": jiwer.cer(references, hypotheses)}

    kind = InOrder if arguments.order else Trainer
    trainer = kind(
        model=model, args=settings, data_collator=collate, train_dataset=sets["train"], eval_dataset=sets["dev"],
        compute_metrics=compute_metrics, processing_class=processor, callbacks=[events],
        preprocess_logits_for_metrics=lambda logits, labels: (torch.argmax(logits, dim=-1), labels),
    )  # fmt: skip
    if arguments.order:
        trainer.order = json.loads(arguments.order.read_text())
    trainer.train(resume_from_checkpoint=True if arguments.resume else None)
    if not arguments.order:
        events.write(evaluation=trainer.evaluate()["eval_runtime"])


if __name__ == "__main__":
    main()
