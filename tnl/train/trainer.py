"""transformers.Trainer with our step and our checkpoints."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback, TrainerState

from tnl.errors import MemoryBudgetError, NumbersError, RecipeError
from tnl.evaluate import perplexity
from tnl.run_dir import RunDir, check_checkpoint, rotate
from tnl.storage import require_space, staged
from tnl.train import checkpoint
from tnl.train.arguments import Settings
from tnl.train.lora import adapter_matrices, trainable
from tnl.train.order import Batch, StepSampler
from tnl.train.step import Rows, StepResult, gradient_norms, is_out_of_memory, names, release_memory, seed_all, seed_of, step

STEPS_TO_GRADIENTS = 4
"""By then every adapter matrix must have had a gradient: B at step 1, A as soon as B has moved (step 3 where the warm-up starts at 0)."""


class Interrupted(Exception):
    """A signal asked to stop while held-out records were measured."""


class TnlTrainer(Trainer):
    """Trainer's order, schedule, logging, evaluation and callbacks around one optimizer step of ours. What is overridden, and why:

    - get_train_dataloader: the order is a function of seed and epoch (order.py); batches are plain records, one batch a step.
    - get_batch_samples: randomness is seeded by seed and step before the step's records are fetched, so a resumed run repeats it;
      _save_rng_state, _load_rng_state have nothing left to do.
    - training_step: step.py. One flag is read, before the optimizer's update: loss, gradients and optimizer state are finite.
    - _clip_grad_norm, _get_grad_norm: from the norms of that check.
    - evaluate: perplexity.py, no logits kept; _evaluate, _determine_best_metric: a signal may end a measurement, a new best is saved.
    - _save_checkpoint: staged, sealed, synced, renamed; own rotation, which deletes what is sealed by us alone.
    - _load_from_checkpoint, _load_optimizer_and_scheduler: exact key sets, every file there, or the run does not start.
    - _init_training_state: the best checkpoint is found beside the others, wherever the run's folder has been moved.
    - _run_epoch: a run that has all its steps trains no more (Trainer would go on to the end of the epoch).
    - _maybe_log_save_evaluate: after a signal only the checkpoint is written; what is due otherwise is done on resuming.
    - create_optimizer, create_scheduler: what cannot be made is a recipe error. log: real tokens and their speed.
    - floating_point_ops, _track_num_input_tokens: counted from the records.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        settings: Settings,
        rows: Rows,
        train_records: Sequence[dict[str, Any]],
        eval_records: Sequence[dict[str, Any]],
        callbacks: Sequence[Any] = (),
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        args.label_names = ["labels"]
        super().__init__(
            model=model, args=args, train_dataset=list(train_records), eval_dataset=list(eval_records) or None, callbacks=[*callbacks]
        )
        self.remove_callback(PrinterCallback)
        self.settings, self.rows, self.stop_requested = settings, rows, stop_requested
        self.run = RunDir(Path(args.output_dir))
        self.parameters = trainable(model)
        matrices = set(adapter_matrices(model))
        self.is_matrix = torch.tensor([name in matrices for name, _ in self.parameters], device=self.parameters[0][1].device)
        self.had_gradient = torch.zeros_like(self.is_matrix)
        self.norms: Tensor | None = None
        self.steps_here = 0
        self.supervised = 0
        self.consumed: Batch | None = None
        """The records of the latest step, for callbacks."""
        self.pending_evaluation = False
        self.saved_step: int | None = None
        self.resumed: dict[str, Any] = {}
        self.clock = Clock()

    # ---- data -----------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        records, args = self.train_dataset, self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        lengths = [len(record["input_ids"]) for record in records]
        sampler = StepSampler(lengths, self.settings.records_per_step, seed, args.train_sampling_strategy, args.dataloader_drop_last)
        if not len(sampler):
            what = f"dataloader_drop_last leaves no step ({len(records)} records, {self.settings.records_per_step} a step)"
            raise RecipeError("train.dataloader_drop_last", what, "Leave it out.")
        return DataLoader(
            records,
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
        return seed_of(self.args.seed, self.state.global_step)

    # ---- one step -------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        self.model.train()
        self.optimizer_mode("train")
        self.consumed = inputs
        if self.steps_here == STEPS_TO_GRADIENTS:
            self.require_gradients()
        result = step(self.model, inputs.records, self.rows, self.step_seed)
        self.norms = gradient_norms(p for _, p in self.parameters)
        if not self.is_finite(result):
            raise self.not_finite(result, inputs)
        self.had_gradient |= self.norms > 0
        self.steps_here += 1
        self.supervised += result.supervised
        self.clock.tokens += result.tokens
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            release_memory()
        return result.loss

    def is_finite(self, result: StepResult) -> bool:
        """Whether the loss, every gradient and what the optimizer keeps are finite: one read from the device."""
        assert self.norms is not None
        flags = [torch.isfinite(result.loss), torch.isfinite(self.norms).all()]
        kept = [x for _, x in checkpoint.tensors_of(dict(self.optimizer.state), "") if x.is_floating_point() and x.numel() > 1]
        if kept:
            flags += [torch.isfinite(norm) for norm in torch._foreach_norm(kept)]
        return bool(torch.stack([flag.to(result.loss.device) for flag in flags]).all())

    def not_finite(self, result: StepResult, batch: Batch) -> NumbersError:
        """Say which step, which records and which tensor; only a run that ends pays for finding out."""
        where = f"step {self.state.global_step + 1}"
        loss = float(result.loss)
        bad = first_bad(self.model, self.optimizer)
        if not math.isfinite(loss):
            guilty = [record for record in batch.records if not math.isfinite(self.loss_of(record))] or batch.records
            what = f"the loss is {loss} (records: {names(guilty)}; first bad tensor: {bad or 'none, it arises in the computation'})"
        else:
            what = f"the loss is {loss:.4f}, but {bad or 'the gradient norm'} is not finite (records: {names(batch.records)})"
        saved = (
            f"The weights were not changed; continue from the last checkpoint ({self.saved_step})"
            if self.saved_step
            else "Nothing was saved"
        )
        return NumbersError(where, what, f"{saved}. Lower train.learning_rate, or look at these records.")

    def loss_of(self, record: dict[str, Any]) -> float:
        with perplexity.evaluating(self.model), torch.no_grad():
            return float(perplexity.token_losses(self.model, [record], self.args.device, self.rows.chunk).sum())

    def require_gradients(self) -> None:
        """Raise NumbersError where an adapter matrix has had no gradient yet: it is not connected to the loss."""
        silent = (self.is_matrix & ~self.had_gradient).nonzero()[:, 0].tolist()
        if silent:
            first = self.parameters[silent[0]][0]
            what = f"{len(silent)} of {int(self.is_matrix.sum())} adapter matrices have had no gradient so far (first: {first})"
            raise NumbersError(f"step {self.state.global_step + 1}", what, "Take them out of lora.target_modules, or report it.")

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm = self._get_grad_norm(model)
        torch.nn.utils.clip_grads_with_norm_([p for _, p in self.parameters], self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Tensor:
        assert self.norms is not None
        return torch.linalg.vector_norm(self.norms) if grad_norm is None else grad_norm

    def optimizer_mode(self, mode: str) -> None:
        """Schedule-free optimizers hold other weights for measuring than for training."""
        switch = getattr(getattr(self.optimizer, "optimizer", self.optimizer), mode, None)
        if callable(switch):
            switch()

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        try:
            return super().create_optimizer(model)
        except (ImportError, ValueError, TypeError, RuntimeError) as error:
            raise recipe_error("train.optim", error) from error

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup > num_training_steps:
            what = f"the warm-up is longer than the run ({warmup} steps; the run has {num_training_steps})"
            raise RecipeError("train.warmup_steps", what, "Lower it; a value below 1 is a share of all steps.")
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except (ValueError, TypeError) as error:
            raise recipe_error("train.lr_scheduler_kwargs", error) from error

    def floating_point_ops(self, inputs: Batch) -> int:
        frozen = sum(p.numel() for p in self.model.parameters() if not p.requires_grad)
        trained = sum(p.numel() for _, p in self.parameters)
        return (4 * frozen + 6 * trained) * inputs.tokens

    def _track_num_input_tokens(self, inputs: Batch) -> None:
        self.state.num_input_tokens_seen += inputs.tokens

    # ---- measuring and logging ------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        records = self.eval_dataset if eval_dataset is None else eval_dataset
        start = time.monotonic()
        self.optimizer_mode("eval")
        with self.clock.paused():
            result = self.measure(records)
        seconds = time.monotonic() - start
        named = {"loss": result.loss, "perplexity": result.value, "tokens": result.tokens, "seconds": round(seconds, 3)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in named.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, records: Sequence[dict[str, Any]]) -> perplexity.Perplexity:
        """Loss on records; where memory runs out, in smaller rows."""
        budget, chunk = self.rows.budget, self.rows.chunk
        while True:
            try:
                return perplexity.loss(self.model, records, budget, chunk=chunk, after_row=self.stop_measuring)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            release_memory()
            if budget <= 64:
                raise MemoryBudgetError("", "out of memory while measuring the held-out records", "This would fit: data.max_length=256.")
            budget, chunk = budget // 2, max(chunk // 2, 64)

    def stop_measuring(self) -> None:
        if self.stop_requested():
            raise Interrupted

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except Interrupted:
            self.pending_evaluation = self.control.should_save = self.control.should_training_stop = True
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = bool(metrics) and super()._determine_best_metric(metrics, trial)
        if is_best and self.settings.keep_best:
            self.control.should_save = True
        return is_best

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if self.stop_requested():
            if self.saved_step == self.state.global_step:
                control.should_log = control.should_evaluate = control.should_save = False
                return
            at_epoch_end = self.args.eval_strategy == "epoch" and float(self.state.epoch or 0).is_integer()
            self.pending_evaluation = control.should_evaluate or at_epoch_end
            control.should_evaluate, control.should_save, control.should_training_stop = False, True, True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {"tokens": self.state.num_input_tokens_seen, "supervised_tokens": self.supervised}
            logs |= {"tokens_per_second": self.clock.tokens_per_second()}
        super().log(logs, start_time)

    # ---- checkpoints ----------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.saved_step == self.state.global_step and not self.resumed.get("pending_evaluation"):
            return
        with self.clock.paused():
            self.store_flos()
            extra = {
                "step": self.state.global_step,
                "row_budget": self.rows.budget,
                "supervised": self.supervised,
                "loss_sum": float(self._tr_loss),
                "last_logged": self._globalstep_last_logged,
                "pending_evaluation": self.pending_evaluation,
            }
            with staged(self.run.checkpoint(self.state.global_step), extra, checkpoint.estimate_bytes(self.model)) as folder:
                checkpoint.save_weights(self.model, folder)
                checkpoint.save_training_state(folder, self.optimizer, self.lr_scheduler, self.portable_state())
            self.saved_step = self.state.global_step
            for line in rotate(self.run, self.settings.save_total_limit, self.best_checkpoint):
                self.rows.say(line)

    def portable_state(self) -> TrainerState:
        """Trainer's state without the path of the best checkpoint, which is known by its step."""
        callbacks = [one for one in [*self.callback_handler.callbacks, self.control] if isinstance(one, ExportableState)]
        return dataclasses.replace(
            self.state, best_model_checkpoint=None, stateful_callbacks={type(one).__name__: one.state() for one in callbacks}
        )

    @property
    def best_checkpoint(self) -> Path | None:
        """The folder of the best measurement's checkpoint, whether or not it has been written yet."""
        return self.run.checkpoint(self.state.best_global_step) if self.state.best_global_step else None

    def preflight(self) -> None:
        """Raise StorageError unless there is room for all the checkpoints that will lie there at once."""
        kept = max(self.settings.save_total_limit or 3, 2) + 1 + self.settings.keep_best
        require_space(self.run.path, kept * checkpoint.estimate_bytes(self.model))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        checkpoint.load_weights(self.model, folder)
        self.resumed = check_checkpoint(folder, int(folder.name.rpartition("-")[2]))
        self.supervised = self.resumed.get("supervised", 0)

    def _load_optimizer_and_scheduler(self, checkpoint_path: str | None) -> None:
        if checkpoint_path is not None:
            checkpoint.load_training_state(Path(checkpoint_path), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir: str) -> None: ...

    def _load_rng_state(self, checkpoint_path: str | None) -> None: ...

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        result = super()._init_training_state(*args, **kwargs)
        best = self.best_checkpoint
        self.state.best_model_checkpoint = str(best) if best is not None and best.is_dir() else None
        return result

    def take_up(self) -> None:
        """What is left to do before the first step of a resumed run: called when training begins."""
        self.clock = Clock()
        self.saved_step = self.state.global_step or None
        if not self.resumed:
            return
        self._tr_loss += self.resumed.get("loss_sum", 0.0)
        self._globalstep_last_logged = self.resumed.get("last_logged", self.state.global_step)
        if self.resumed.get("pending_evaluation"):
            metrics = self._evaluate(None, None)
            if self._determine_best_metric(metrics, None) or not self.pending_evaluation:
                self._save_checkpoint(self.model, None)
            self.resumed = {}

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def load_best(self) -> int | None:
        """Put the weights of the best measurement into the model; returns its step, or None where the last step's stay."""
        best = self.best_checkpoint
        if not self.settings.keep_best or best is None or self.state.best_global_step == self.state.global_step:
            return None
        check_checkpoint(best, self.state.best_global_step)
        checkpoint.load_weights(self.model, best)
        return self.state.best_global_step


class Clock:
    """Real tokens a second since the last line of the log, without the time that measuring and saving took."""

    def __init__(self) -> None:
        self.tokens, self.start, self.away = 0, time.monotonic(), 0.0

    def tokens_per_second(self) -> float:
        """Tokens a second since the last call."""
        seconds = max(time.monotonic() - self.start - self.away, 1e-9)
        speed = self.tokens / seconds
        self.__init__()  # type: ignore[misc]
        return round(speed, 1)

    def paused(self) -> "Pause":
        """A block whose time does not count."""
        return Pause(self)


class Pause:
    """Time away from training."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.start = clock, time.monotonic()

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.clock.away += time.monotonic() - self.start


def first_bad(model: nn.Module, optimizer: Any) -> str | None:
    """Name of the first weight, optimizer state or gradient that is not finite."""
    parameters = list(model.named_parameters())
    state = {name: optimizer.state.get(p, {}) for name, p in parameters}
    candidates = [("weight", name, p.data) for name, p in parameters]
    candidates += [("optimizer state", name, x) for name, x in checkpoint.tensors_of(state, "") if x.is_floating_point()]
    candidates += [("gradient", name, p.grad) for name, p in parameters if p.grad is not None]
    for kind, name, tensor in candidates:
        if not bool(torch.isfinite(tensor).all()):
            return f"{kind} {name.lstrip('.')}"
    return None


def recipe_error(where: str, error: BaseException) -> RecipeError:
    """What transformers says about a value, in one line."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return RecipeError(where, f"transformers refuses it: {said.rstrip('.')}", "Change that field.")
