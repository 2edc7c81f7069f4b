"""transformers' Trainer, adapted to fine-tuning a chat model: batches, predictions, saving, and when to stop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, Seq2SeqTrainer
from transformers.trainer_utils import rotate_checkpoints

from chatglm.checkpoints.atomic import whole_folder
from chatglm.language import choose_language

from . import methods
from .batches import StepSampler, WithFillers, divide_evenly
from .checkpoints import OLD, STATE, CheckpointError, last_checkpoint, reading
from .losses import learned, mean_loss, row_losses
from .messages import text
from .packing import first_example
from .pictures import one_by_one, pictures_in
from .resuming import hyperparameters, keep_hyperparameters, write_arguments
from .speed import Speed
from .watching import Watch

ZEROS = 10  # micro-batches in a row with a loss of exactly 0


class TrainingError(RuntimeError):
    """Training cannot continue; the message is a diagnosis."""


class Tuner(Seq2SeqTrainer):  # type: ignore[misc, unused-ignore]
    """A Seq2SeqTrainer for a decoder: predictions from `prompt_ids`, the loss from `input_ids` and `labels`.

    Args:
        method: ptuning, lora or full: determines what a checkpoint holds.
        base: name of the base model, written into the checkpoint.
        stop_ids: ids of the tokens that end an answer.
        max_new_tokens, generation: tokens of an answer, and other arguments of `generate`.
    """

    train_dataset: Any
    data_collator: Any

    def __init__(
        self,
        *,
        method: str,
        base: str,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        generation: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.method, self.base, self.stop_ids = method, base, list(stop_ids)
        self.max_new_tokens, self.generation = max_new_tokens, {"num_beams": 1, "do_sample": False} | (generation or {})
        self.interrupted = False
        # Kept on the device, as fetching them would make a GPU wait after every micro-batch: (sum, zeros in a row).
        self.watched: torch.Tensor | None = None
        self.last_batch: tuple[Any, ...] | None = None
        self.speed = Speed()
        self.loss_only = False
        self.row_losses: list[torch.Tensor] = []
        super().__init__(compute_loss_func=mean_loss, **kwargs)
        self.add_callback(Watch(self))

    # Batches ----------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        data = data.data if isinstance(data, WithFillers) else data
        strategy = self.args.train_sampling_strategy
        if strategy == "sequential":
            return SequentialSampler(data)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * max(1, self.args.world_size)
        lengths = list(data["length"]) if strategy == "group_by_length" else None
        self.sampler = StepSampler(len(data), step, lengths, self.args.data_seed or self.args.seed)
        return self.sampler

    def get_train_dataloader(self) -> Any:
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        data = self.train_dataset
        self.train_dataset = WithFillers(data)
        try:
            loader = super().get_train_dataloader()
        finally:
            self.train_dataset = data
        divide_evenly(loader)
        return loader

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._unpacked():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._unpacked():
            return super().get_test_dataloader(*args, **kwargs)

    @contextlib.contextmanager
    def _unpacked(self) -> Iterator[None]:
        """Evaluation needs the loss of every row."""
        collator: Any = self.data_collator
        self.data_collator = dataclasses.replace(collator, packer=None)
        try:
            yield
        finally:
            self.data_collator = collator

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset)  # predictions are written in the order of the file

    # Steps ------------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        inputs = dict(inputs)
        self.speed.count(inputs.pop("tokens", None))
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.last_batch = inputs, num_items_in_batch
        value = loss.detach().float()
        total, zeros = value.new_zeros(2) if self.watched is None else self.watched
        self.watched = torch.stack((total + value, (zeros + 1) * (value == 0)))
        if self.accelerator.sync_gradients:
            self._check_losses()
        return loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, with logits only where something is learned: they are a good part of a step."""
        return super().compute_loss(model, inputs | {"logits_to_keep": learned(inputs["labels"])}, *args, **kwargs)

    def _check_losses(self) -> None:
        """Once per step. Stops all processes at the same one: if one stopped alone, the others would wait forever."""
        assert self.watched is not None
        losses = self.watched.to(self.args.device)[None]
        if self.args.world_size > 1:
            losses = self.accelerator.gather(losses)
        self.watched = self.watched * self.watched.new_tensor([0, 1])
        found = losses.tolist()
        bad = [total for total, _ in found if not math.isfinite(total)]
        if bad:
            raise TrainingError(self._diagnosis(f"the loss is {bad[0]}"))
        if min(zeros for _, zeros in found) >= ZEROS:
            raise TrainingError(
                f"step {self.state.global_step + 1}: the loss was exactly 0 for {ZEROS} batches: the data is "
                "memorised, or the answers are empty; use more data or fewer steps (--show_example shows the labels)"
            )

    def check_step(self) -> None:
        """Raises TrainingError if the last step has damaged the weights, which no loss has shown yet."""
        if self.last_batch is None:
            return
        (inputs, count), self.last_batch = self.last_batch, None  # once per step: the end of an epoch calls this again
        self.model_wrapped.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            inputs = first_example(self._prepare_inputs(inputs))  # one shows it, too
            loss = float(self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=count))
        self.model_wrapped.train()
        finite = all(bool(torch.isfinite(one).all()) for one in self.model.parameters() if one.requires_grad)
        value = torch.tensor([loss if finite else math.nan], device=self.args.device)
        if self.args.world_size > 1:
            value = self.accelerator.gather(value)
        if not torch.isfinite(value).all():
            what = f"the loss after it is {loss}" if finite else "the trained weights are not finite after it"
            raise TrainingError(self._diagnosis(what, self.state.global_step))

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        # float16's scaler skips such a step by itself and tries a smaller scale.
        if norm is not None and self.accelerator.scaler is None and not torch.isfinite(torch.as_tensor(norm)).all():
            raise TrainingError(self._diagnosis("a gradient is not finite"))
        return norm

    def _diagnosis(self, what: str, step: int | None = None) -> str:
        step = self.state.global_step + 1 if step is None else step
        rate, dtype = self.args.learning_rate, self.model.dtype
        if dtype == torch.float16:
            advice = "float16 overflows at 65504: use --dtype bfloat16 if the GPU supports it, or float32"
        else:
            advice = f"lower --learning_rate (it is {rate:g}), or warm up longer (--warmup_steps)"
        return f"step {step}: {what}: {advice}. Earlier checkpoints are good"

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        """(loss, ids generated from `prompt_ids`, target ids); ids are (batch, tokens), padded with -100."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(input_ids=inputs["input_ids"], use_cache=False, **pictures_in(inputs)).logits
        sums, learned = row_losses(logits, inputs["labels"])
        del logits
        # Row by row, so that the rows that fill up the last batch of several processes can be dropped.
        self.row_losses.append(self.accelerator.gather_for_metrics(torch.stack((sums, learned), 1)).cpu().double())
        loss = sums.sum() / learned.sum()
        if prediction_loss_only or self.loss_only or not self.args.predict_with_generate:
            return loss, None, None
        return loss, self._generate(inputs), inputs["target_ids"]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, but averages the loss over all learned tokens, independent of batches and processes."""
        self.gather_function = self.accelerator.gather_for_metrics  # Seq2SeqTrainer's keeps duplicated rows
        self.row_losses = []
        with self.speed.pause():
            found = super().evaluation_loop(*args, **kwargs)
        if not self.is_in_train:
            # accelerate would take an evaluated model for one that is prepared for training, and each process would
            # train alone.
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            self.model.__dict__.pop("_is_accelerate_prepared", None)
        if self.row_losses:
            sums, learned = torch.cat(self.row_losses).sum(0).tolist()
            prefix = kwargs.get("metric_key_prefix", "eval")
            loss = found.metrics[f"{prefix}_loss"] = sums / max(learned, 1)
            if not math.isfinite(loss):
                raise TrainingError(
                    f"the loss on these rows is {loss}, so their answers mean nothing: the weights are damaged (take "
                    f"an earlier checkpoint), or overflow in {self.model.dtype} (take --dtype bfloat16 or float32)"
                )
        return found

    def _generate(self, inputs: dict[str, Any]) -> torch.Tensor:
        if pictures_in(inputs):
            return one_by_one(inputs, self._generate_from)
        return self._generate_from(inputs["prompt_ids"], inputs["prompt_mask"])

    def _generate_from(self, prompt: torch.Tensor, mask: torch.Tensor, **more: Any) -> torch.Tensor:
        zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        with torch.no_grad(), self.compute_loss_context_manager():
            tokens = self.model.generate(
                input_ids=prompt,
                attention_mask=mask,
                **more,
                eos_token_id=self.stop_ids,
                pad_token_id=self.processing_class.pad_token_id,
                max_length=prompt.shape[1] + self.max_new_tokens,
                use_cache=True,
                synced_gpus=self.args.world_size > 1 and (zero3 or self.is_fsdp_enabled),
                **self.generation,
            )
        answer: torch.Tensor = tokens[:, prompt.shape[1] :]
        ended = torch.isin(answer, torch.tensor(self.stop_ids, device=answer.device)).cumsum(-1) > 0
        return answer.masked_fill(ended, -100)

    def baseline(self, dataset: Any) -> float | None:
        """The loss of the untuned model; None if its weights are distributed before they can be used."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return None
        untuned = self.model.adapter(None) if self.method != "full" else contextlib.nullcontext()
        self.loss_only = True
        try:
            with untuned:
                return float(self.evaluate(dataset, metric_key_prefix="baseline")["baseline_loss"])
        finally:
            self.loss_only = False

    # Training, interrupted or not -------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.world_size > 1:
            set_seed(self.args.seed, device_specific=True)  # each process has its own dropout masks
        with self._stopping_gently():
            return super().train(*args, **kwargs)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # a resumed run logs, saves and evaluates as its command says
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience = self.args.early_stopping
        self.speed.begin(self.state.global_step)
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_in_train:
            logs |= self.speed.measure(self.state.global_step, self.state.max_steps, max(1, self.args.world_size))
        super().log(logs, start_time)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # the Trainer would take one step too many
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    @contextlib.contextmanager
    def _stopping_gently(self) -> Iterator[None]:
        """The first Ctrl-C (or SIGTERM) ends training after the step, with a checkpoint; the second one at once."""
        first = 0.0

        def stop(number: int, frame: Any) -> None:
            nonlocal first
            if self.interrupted:
                if self.args.world_size > 1 and time.monotonic() - first < 1:
                    return  # torchrun forwards the Ctrl-C that this process already got from the terminal
                raise KeyboardInterrupt
            self.interrupted, first = True, time.monotonic()
            if self.is_world_process_zero():
                print(text("stopping", choose_language()), flush=True)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        whole = Path(self.args.output_dir) / "all_results.json"
        if self.is_world_process_zero() and whole.is_file():
            try:
                json.loads(whole.read_bytes())
            except ValueError:  # left by a run whose disk was full
                whole.unlink()
        super().save_metrics(split, metrics, combined)

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            model = self.accelerator.unwrap_model(self.model)
            model.config.use_cache, before = True, model.config.use_cache  # off while training, and only then
            methods.save(model, self.method, folder, self.base, state_dict)
            model.config.use_cache = before
            if self.method == "full" and self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            write_arguments(self.args, folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes aside and renames, so that a folder `checkpoint-N` is always complete."""
        output_dir = Path(self.args.output_dir)
        final = output_dir / f"checkpoint-{self.state.global_step}"
        aside, old = output_dir / f"tmp-{final.name}", output_dir / f"{OLD}{final.name}"
        self.store_flos()
        try:
            with self.speed.pause(), whole_folder(final, aside=aside, old=old, writes=self.args.should_save):
                self._fill_checkpoint(aside)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' when the disk is full
            last = last_checkpoint(output_dir)
            kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
            reason = " ".join(str(error).split())
            raise CheckpointError(f"cannot write {final} ({reason}): is the disk full? {kept}") from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(output_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _fill_checkpoint(self, folder: Path) -> None:
        """All processes write into the folder, which the first one creates."""
        self.accelerator.wait_for_everyone()
        self.save_model(str(folder), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(folder / STATE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.method == "full" or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            methods.restore(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer: Any
        scheduler: Any
        optimizer, scheduler = (getattr(one, kind, one) for one, kind in
                                ((self.optimizer, "optimizer"), (self.lr_scheduler, "scheduler")))  # fmt: skip
        with reading(checkpoint):
            wanted = hyperparameters(optimizer) if checkpoint is not None else []
            super()._load_optimizer_and_scheduler(checkpoint)
            if wanted and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                keep_hyperparameters(optimizer, scheduler, wanted)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
