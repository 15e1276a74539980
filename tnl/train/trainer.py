"""transformers.Trainer with our step and our checkpoints."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, TrainerState

from tnl.adapter.metadata import Metadata, write_metadata
from tnl.data.store import lengths_of
from tnl.errors import RecipeError
from tnl.evaluate import perplexity
from tnl.run_dir import RunDir, check_checkpoint, rotate
from tnl.storage import require_space, staged
from tnl.train import checkpoint, recomputation
from tnl.train.arguments import Settings
from tnl.train.graphed import Graphed
from tnl.train.guard import Guard
from tnl.train.lora import count_parameters
from tnl.train.order import Batch, StepSampler
from tnl.train.places import Where, at
from tnl.train.signals import StopSignals
from tnl.train.step import Rows, alone, seed_all, seed_of, step

Record = dict[str, Any]


LONG_STEP = 60
"""Seconds: a step that takes longer (a row of a million tokens) is saved at once, so that a killed run loses no other."""
SAVING = 20
"""And so many times as long as saving it takes."""


class Interrupted(Exception):
    """A signal asked to stop while held-out records were measured."""


class TnlTrainer(Trainer):
    """Trainer's order, schedule, logging, evaluation and callbacks around one optimizer step of ours. What is overridden, and why:

    - get_train_dataloader: the order is a function of seed and epoch (order.py); a batch is the plain records of one optimizer step.
    - get_batch_samples: randomness is seeded by seed and step before the step's records are fetched, so a resumed run repeats it;
      _save_rng_state and _load_rng_state have nothing left to do.
    - training_step: step.py, then guard.py: one flag (loss, gradients, optimizer state finite) decides on the optimizer's update.
    - _wrap_model: engines.py puts DDP, FSDP2 or DeepSpeed around the model, on CPUs as on GPUs; _move_model_to_device: a model that is to
      be shared out is never whole on a device.
    - _clip_grad_norm, _get_grad_norm: from the norms of that check.
    - evaluate: perplexity.py, no logits kept; _evaluate: a signal may end a measurement; _determine_best_metric: a new best is saved
      at once, and patience is counted.
    - _save_checkpoint: staged, sealed, synced, renamed; own rotation, which deletes nothing but what we sealed.
    - _load_from_checkpoint, _load_optimizer_and_scheduler: exact key sets and every file, or the run does not start.
    - _init_training_state: the best checkpoint is looked for beside the others, wherever the run's folder has been moved to.
    - _run_epoch: a run that has had all its steps trains no more (Trainer would go on to the end of the epoch).
    - _maybe_log_save_evaluate: a long step is saved at once; after a signal only the checkpoint is written; a measurement that was due
      is made on resuming.
    - create_optimizer, create_scheduler: what cannot be made is a recipe error; get_optimizer_cls_and_kwargs: AdamW in its one kernel.
    - log: real tokens and their speed; floating_point_ops, _track_num_input_tokens: counted from the records.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        settings: Settings,
        rows: Rows,
        train_records: Sequence[Record],
        eval_records: Sequence[Record],
        callbacks: Sequence[TrainerCallback] = (),
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        args.label_names = ["labels"]
        self.net, self.train_records, self.eval_records = model, train_records, eval_records
        super().__init__(
            model=model,
            args=args,
            train_dataset=self.train_records,  # type: ignore[arg-type]
            eval_dataset=self.eval_records if len(self.eval_records) else None,  # type: ignore[arg-type]
            callbacks=[TakeUp(self), *callbacks],
        )
        self.remove_callback(PrinterCallback)
        self.settings, self.rows, self.stop_requested = settings, rows, stop_requested
        self.run = RunDir(Path(str(args.output_dir)))
        self.engine = alone(model)
        self.graphed: Graphed | None = None
        self.stop: StopSignals | None = None
        self.units: list[list[int]] | None = None
        """What batch sizes count (order.units_of); None: single records."""
        self.guard = Guard(model)
        trained, everything = count_parameters(model)
        self.operations_a_token = 4 * everything + 2 * trained
        """Forward 2 and input gradients 2 for every weight, weight gradients 2 for those that are trained."""
        self.supervised = 0
        self.pending_evaluation = False
        self.saved_step: int | None = None
        self.saving, self.save_at_once = 0.0, False
        """Seconds that the last checkpoint took; whether the latest step was so long that it is saved, whatever save_steps says."""
        self.resumed: dict[str, Any] = {}
        self.where: Where = ""
        self.about: Metadata | None = None
        """What every checkpoint says of itself (tnl.json), so that it can be asked as it is being taught."""
        self.clock = Clock()

    # ---- data -----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        args, size = self.args, self.settings.records_per_step
        seed = args.seed if args.data_seed is None else args.data_seed
        lengths = lengths_of(self.train_records)
        sampler = StepSampler(lengths, size, seed, args.train_sampling_strategy, args.dataloader_drop_last, self.units)
        if not len(sampler):
            what = f"leaves no step ({len(sampler.units)} to train on, {size} a step)"
            raise RecipeError(at(self.where, "train.dataloader_drop_last"), what, "Leave it out.")
        return DataLoader(
            self.train_records,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=Batch,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        seed_all(self.step_seed)
        batch = next(epoch_iterator, None)
        return ([] if batch is None else [batch]), None

    @property
    def step_seed(self) -> int:
        """Where the random numbers of the step that comes begin."""
        return seed_of(self.args.seed, self.state.global_step)

    # ---- one step -------------------------------------------------------------------------------

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        wrapped, self.optimizer = self.engine.wrap(self.net, self.optimizer)
        return wrapped

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None: ...

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        if not self.net.training:
            self.net.train()
        self.optimizer_mode("train")
        began = time.monotonic()
        compute = partial(step, self.net, inputs.records, self.rows, self.step_seed, self.engine)
        result = compute(self.graphed)
        self.guard.check(result, inputs, self.optimizer, self.state.global_step + 1, compute, self.loss_of)
        seconds = time.monotonic() - began
        self.save_at_once = self.args.save_strategy == "steps" and seconds > max(LONG_STEP, SAVING * self.saving)
        self.agree()
        self.supervised += result.supervised
        self.clock.tokens += result.tokens
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            perplexity.release_memory()
        return result.loss

    def agree(self) -> None:
        """A signal that has reached any process stops all after the same step; a step that was long for one is saved by all."""
        if self.engine.crew.size > 1 and self.stop is not None:
            told = torch.tensor([self.stop.requested or 0, self.save_at_once], device=self.engine.device)
            number, self.save_at_once = self.engine.crew.most(told).tolist()
            self.stop.requested = number or None
            self.stop_requested = lambda: bool(number)

    def loss_of(self, record: Record) -> float:
        """Sum of one record's token losses, whatever it is."""
        return perplexity.loss_of(self.net, record, self.args.device, self.rows.chunk)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self.guard.norm
        self.engine.clip([p for _, p in self.guard.parameters], self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Tensor:
        return self.guard.norm if grad_norm is None else grad_norm

    def optimizer_mode(self, mode: str) -> None:
        """Schedule-free optimizers hold other weights for measuring than for training."""
        switch = getattr(getattr(self.optimizer, "optimizer", self.optimizer), mode, None)
        if callable(switch):
            switch()

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:  # type: ignore[override]
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if kind is torch.optim.AdamW and self.engine.crew.size == 1:
            options.setdefault("fused", True)
        return kind, options

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.engine.prepare(self.net)  # only now: questions were answered by the whole model
        try:
            return super().create_optimizer(model)
        except (ImportError, ValueError, TypeError, RuntimeError) as error:
            raise recipe_error(at(self.where, "train.optim"), error) from error

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup > num_training_steps:
            what = f"the warm-up is longer than the run ({warmup} steps; the run has {num_training_steps})"
            raise RecipeError(at(self.where, "train.warmup_steps"), what, "Lower it; a value below 1 is a share of all steps.")
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except (ValueError, TypeError) as error:
            raise recipe_error(at(self.where, "train.lr_scheduler_kwargs"), error) from error

    def floating_point_ops(self, inputs: Batch) -> int:  # type: ignore[override]
        return self.operations_a_token * inputs.tokens

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        self.state.num_input_tokens_seen += inputs.tokens

    # ---- measuring and logging ------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        start = time.monotonic()
        self.optimizer_mode("eval")
        with self.clock.paused():
            records = self.eval_records if eval_dataset is None else eval_dataset
            result = self.engine.measure(self.net, records, self.rows.budget, self.rows.chunk, self.stop_measuring)
        seconds = round(time.monotonic() - start, 3)
        named = {"loss": result.loss, "perplexity": result.value, "tokens": result.tokens, "seconds": seconds}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in named.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def stop_measuring(self) -> None:
        if self.stop_requested():
            raise Interrupted

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except Interrupted:
            self.control.should_training_stop = True
            if self.state.global_step:  # before the first step there is nothing to save, and it is measured again
                self.pending_evaluation = self.control.should_save = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = bool(metrics) and super()._determine_best_metric(metrics, trial)
        if is_best and self.settings.keep_best:
            self.control.should_save = True
        if self.patience_is_over():
            self.control.should_training_stop = True
        return is_best

    def patience_is_over(self) -> bool:
        """Whether early_stopping_patience measurements have brought no new best."""
        patience = self.settings.early_stopping_patience
        best = self.state.best_global_step
        since = [line for line in self.state.log_history if "eval_loss" in line and line["step"] > (best or 0)]
        return patience is not None and best is not None and len(since) >= patience

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if self.stop_requested():
            if self.saved_step == self.state.global_step:
                control.should_log = control.should_evaluate = control.should_save = False
                return
            at_epoch_end = self.args.eval_strategy == "epoch" and float(self.state.epoch or 0).is_integer()
            self.pending_evaluation = control.should_evaluate or at_epoch_end
            control.should_evaluate, control.should_save, control.should_training_stop = False, True, True
        control.should_save |= bool(self.save_at_once)
        if control.should_log or control.should_evaluate or control.should_save:
            self.guard.settle()  # of a step whose numbers are bad nothing is logged, measured or saved
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.pending_evaluation:  # with save_strategy best Trainer would save nothing where nothing was measured
            self._save_checkpoint(self.net, None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {"tokens": self.state.num_input_tokens_seen, "supervised_tokens": self.supervised}
            logs |= {"tokens_per_second": self.clock.tokens_per_second()}
        super().log(logs, start_time)

    # ---- checkpoints ----------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.saved_step == self.state.global_step:
            return
        began = time.monotonic()
        with self.clock.paused():
            self.store_flos()
            extra = {
                "step": self.state.global_step,
                "rows": self.rows.state(self.net),
                "supervised": self.supervised,
                "loss_sum": float(self._tr_loss),
                "last_logged": self._globalstep_last_logged,
                "pending_evaluation": self.pending_evaluation,
            }
            self.write_checkpoint(extra)
            self.saved_step = self.state.global_step
        self.saving = time.monotonic() - began

    def write_checkpoint(self, extra: dict[str, Any]) -> None:
        """Gather what is shared out, and let those who save write it; all go on once it is there."""
        weights = self.engine.whole(lambda: checkpoint.trained_tensors(self.net))
        optimizer = self.engine.optimizer_state(self.optimizer)
        with self.engine.crew.together():
            if not self.engine.crew.saves:
                return
            with staged(self.run.checkpoint(self.state.global_step), extra, checkpoint.estimate_bytes(self.net)) as folder:
                checkpoint.save_weights(self.net, folder, weights=weights)
                if self.about is not None:
                    write_metadata(folder, self.about)
                checkpoint.save_training_state(folder, optimizer, self.lr_scheduler, self.portable_state())
            for line in rotate(self.run, self.settings.save_total_limit, self.best_checkpoint):
                self.rows.say(line)

    def portable_state(self) -> TrainerState:
        """Trainer's state without the path of the best checkpoint, which is known by its step."""
        callbacks = [one for one in [*self.callback_handler.callbacks, self.control] if isinstance(one, ExportableState)]
        state: Any = {type(one).__name__: one.state() for one in callbacks}
        return dataclasses.replace(self.state, best_model_checkpoint=None, stateful_callbacks=state)

    @property
    def best_checkpoint(self) -> Path | None:
        """The folder of the best measurement's checkpoint, whether or not it has been written yet."""
        return self.run.checkpoint(self.state.best_global_step) if self.state.best_global_step else None

    def preflight(self) -> None:
        """Raise StorageError unless there is room for all the checkpoints that will lie there at once."""
        kept = max(self.settings.save_total_limit or 3, 2) + 1 + self.settings.keep_best
        require_space(self.run.path, kept * checkpoint.estimate_bytes(self.net))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        with self.engine.crew.together():
            self.resumed = check_checkpoint(folder, int(folder.name.rpartition("-")[2]))
            checkpoint.load_weights(self.net, folder)
        self.rows.restore(self.resumed["rows"], self.net)
        if recomputation.why_not_recorded(self.net):  # since memory ran out before the stop
            self.graphed = None
        self.supervised = self.resumed["supervised"]

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is not None:
            checkpoint.load_training_state(Path(checkpoint_folder), self.optimizer, self.lr_scheduler, self.engine)
            checkpoint.load_exact(self.net, Path(checkpoint_folder), self.engine)

    def _save_rng_state(self, output_dir: str) -> None: ...

    def _load_rng_state(self, checkpoint: str | None) -> None: ...

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        result = super()._init_training_state(*args, **kwargs)
        best = self.best_checkpoint
        self.state.best_model_checkpoint = str(best) if best is not None and best.is_dir() else None
        return result

    def take_up(self) -> None:
        """Before the first step: what a resumed run left to be done."""
        self.clock = Clock()
        if self.engine.crew.size > 1:
            self.guard = Guard(self.net, self.engine)
        if not self.resumed:
            return
        self.args.eval_on_start = False  # measured when the run began
        self._tr_loss += self.resumed["loss_sum"]
        self._globalstep_last_logged = self.resumed["last_logged"]
        if self.resumed["pending_evaluation"]:
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics, None)
            if metrics:  # else a signal came again, and the checkpoint still says what is due
                self._save_checkpoint(self.net, None)
            self.control.should_save = False
        self.saved_step = self.state.global_step
        if self.patience_is_over():
            self.control.should_training_stop = True

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def load_best(self) -> int | None:
        """Put the weights of the best measurement into the model; returns its step, or None where the last step's stay."""
        best, number = self.best_checkpoint, self.state.best_global_step
        if not self.settings.keep_best or best is None or number is None or number == self.state.global_step:
            return None
        check_checkpoint(best, number)
        checkpoint.load_weights(self.net, best)
        return number


class TakeUp(TrainerCallback):
    """Tells the trainer when training begins, and the guard when it ends."""

    def __init__(self, trainer: TnlTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.take_up()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.guard.finish(state.global_step)


class Clock:
    """Real tokens a second since the last line of the log, without the time that measuring and saving took."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.tokens, self.start, self.away = 0, time.monotonic(), 0.0

    def tokens_per_second(self) -> float:
        """Tokens a second since the last call."""
        speed = self.tokens / max(time.monotonic() - self.start - self.away, 1e-9)
        self.reset()
        return round(speed, 1)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.away += time.monotonic() - start


def recipe_error(where: str, error: BaseException) -> RecipeError:
    """What transformers says about a value, in one line."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return RecipeError(where, f"transformers refuses it: {said.rstrip('.')}", "Change that field.")
