"""JointTrainer: transformers' Trainer for many adapters at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer import TRAINER_STATE_NAME

from fastpeft.integrations.transformers import AdapterTrainerMixin, folder_of
from fastpeft.joint.batches import JointBatches, JointCollator, TaggedRows, slices_by_adapter, split_rows, without
from fastpeft.joint.checks import arguments_of_all, check_arguments, check_model, make_trainable, order_of_checkpoint
from fastpeft.joint.losses import check_loss, shifts_labels
from fastpeft.joint.progress import SinceLog
from fastpeft.joint.settings import AdapterTraining, Schedule
from fastpeft.peft_model import PeftModel
from fastpeft.sealed_file import AdapterFileError

logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a token that has none
DIVERGED = "diverged/"  # in the log, before an adapter's name


class JointTrainer(AdapterTrainerMixin, Trainer):  # type: ignore[misc]
    """Trains several adapters of one model at once, each as a run of it alone would.

    One forward and backward of the base serves the rows of all adapters. Each adapter has its own rows in their own
    order, its own mean loss over its own tokens, learning rate, schedule, weight decay and clipping; what is summed is
    never divided by what the others bring. An adapter whose loss or gradient is no longer finite leaves the run with
    the weights it has then ("diverged/<name>" in the log), and the others go on.

    The log has loss/<name>, learning_rate/<name>, grad_norm/<name> (before clipping) and tokens_per_second/<name>
    (tokens with a label); "loss" is the sum over the adapters, "epoch" the share of the run that is done. Checkpoints
    hold each adapter in PEFT's format in a folder of its own; runs resume from them, adapters named in any order.

    Args:
        model: a PeftModel that has all the adapters. Those of the run become trainable, the others frozen.
        args: the run's TrainingArguments, what every adapter takes unless it says otherwise. An update has the rows of
            per_device_train_batch_size x gradient_accumulation_steps of each adapter.
        adapters: by adapter name, what it trains on and how.
        data_collator: makes a batch with "labels" of a list of rows. It sees the rows of all adapters at once and must
            keep their order. Padding belongs on the right, where it changes no position.
        compute_loss_func: (outputs, labels, num_items_in_batch) of one adapter's rows -> its loss, divided by
            num_items_in_batch, the number of its labels in the update. By default the cross entropy, of causal models
            with shifted labels; a model with another loss (regression, several labels a row, a router's) needs it. An
            adapter's own goes before it.
        processing_class, callbacks, compute_metrics, optimizer_cls_and_kwargs: as in Trainer.

    Raises:
        ValueError: an unknown adapter, rows without a length or an index, something trainable that belongs to none of
            the adapters, an argument that has no meaning for several of them at once, or a model whose loss has no
            part for each.
    """

    train_dataset: Any
    optimizer: Any

    def __init__(
        self,
        model: PeftModel,
        args: TrainingArguments,
        adapters: Mapping[str, AdapterTraining],
        *,
        data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        processing_class: Any = None,
        callbacks: list[Any] | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        check_arguments(args)
        check_model(model)
        base = self._base = cast(Any, model.get_base_model())
        self.loss_of_adapter = {name: own.compute_loss_func or compute_loss_func for name, own in adapters.items()}
        self.loss_of_others = compute_loss_func
        if None in self.loss_of_adapter.values():
            check_loss(base)
        self._shifts = shifts_labels(base)
        own = {name: training.arguments(args) for name, training in adapters.items()}
        schedules = {name: Schedule.of(name, training, own[name]) for name, training in adapters.items()}
        measured = {
            name: TaggedRows(name, training.eval_dataset)
            for name, training in adapters.items()
            if training.eval_dataset is not None
        }
        self.parameters_of = make_trainable(model, list(adapters))
        datasets = {name: training.train_dataset for name, training in adapters.items()}
        batches = JointBatches(datasets, schedules, args.gradient_accumulation_steps)
        super().__init__(
            model=model,
            args=arguments_of_all(args, batches),
            train_dataset=batches,
            eval_dataset=measured or None,
            data_collator=data_collator,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.data_collator = JointCollator(self._get_collator_with_removed_columns(self.data_collator))
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True  # each loss is a part of its update's
        self._needs_labels = getattr(
            base.config, "is_encoder_decoder", False
        )  # its forward makes decoder inputs of them
        self.adapter_args = own
        self.schedules = schedules
        self.diverged: set[str] = set()  # adapters that have left the run
        self._in_update: dict[str, Tensor] = {}  # adapters with rows in the current update, and their labels' number
        self._flops_per_token: float | None = None
        self._since_log = SinceLog()
        self.add_callback(_AtTheBeginning(self))

    # What Trainer asks for, by adapter.

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Rows of an update, all adapters together, on average."""
        return round(sum(self.train_dataset.rows) / len(self.train_dataset.rows))

    def floating_point_ops(self, inputs: Any) -> int:
        """As Trainer counts them, which goes through all modules of all adapters: once, and then by the tokens."""
        if not inputs["adapter_names"]:
            return 0
        tokens = inputs[getattr(self._base, "main_input_name", "input_ids")].numel()
        if self._flops_per_token is None:
            self._flops_per_token = super().floating_point_ops(inputs) / max(tokens, 1)
        return round(self._flops_per_token * tokens)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if inputs["adapter_names"]:  # else there is nothing to count, of which Trainer warns
            super()._track_num_input_tokens(inputs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """The norm over all adapters means nothing, and takes as long as those of all of them."""
        return

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """JointBatches has the order in it."""
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer, with parameter groups of its own for each adapter."""
        if self.optimizer is None:
            decayed = set(self.get_decay_parameter_names(self.model))
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            groups = []
            for adapter, parameters in self.parameters_of.items():
                own = self.adapter_args[adapter]
                for decay in (True, False):
                    members = [p for p in parameters if (names[p] in decayed) is decay]
                    if members:
                        weight_decay = own.weight_decay if decay else 0.0
                        shared = {"lr": own.learning_rate, "weight_decay": weight_decay, "adapter": adapter}
                        groups.append({"params": members, **shared})
            optimizer_cls, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
            if unusable := {"params", "model", "optimizer_dict"} & set(options):
                raise ValueError(
                    f"optim={self.args.optim} chooses its parameters itself ({', '.join(unusable)}), so each adapter "
                    "cannot have groups of its own; use adamw_torch"
                )
            self.optimizer = optimizer_cls(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedules of all adapters, each over its own updates, as one."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            factors = {}
            for name, own in self.adapter_args.items():
                updates = self.schedules[name].updates
                stand_in = torch.optim.SGD([nn.Parameter(torch.empty(0))], lr=own.learning_rate)
                alone = get_scheduler(
                    own.lr_scheduler_type, optimizer=stand_in, num_warmup_steps=own.get_warmup_steps(updates),
                    num_training_steps=updates, scheduler_specific_kwargs=own.lr_scheduler_kwargs,
                )  # fmt: skip
                if not isinstance(alone, torch.optim.lr_scheduler.LambdaLR):
                    raise ValueError(
                        f"adapter {name!r}: lr_scheduler_type={own.lr_scheduler_type} needs more than the number of "
                        "the update, which adapters cannot share; use linear, cosine, constant ..."
                    )
                factors[name] = alone.lr_lambdas[0]
            by_group = [factors[group["adapter"]] for group in optimizer.param_groups]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, by_group)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The batches of an update, and how many labels each adapter has in them."""
        batches = list(islice(epoch_iterator, num_batches))
        return batches, self._count_labels(batches)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward for the adapters that are still in the run, and the clipping at the end of an update."""
        left = without(inputs, self.diverged)
        loss = torch.zeros((), device=self.args.device)
        if left is not None:
            loss = super().training_step(model, left, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._finish_gradients()
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum over the adapters in the batch of each one's loss.

        In training, an adapter whose loss is not finite leaves the run, and the batch is computed again without it.
        """
        counts = num_items_in_batch if isinstance(num_items_in_batch, dict) else self._count_labels([inputs])
        while True:
            losses, outputs = self._losses(model, inputs, counts)
            if not model.training or not self._leave_out(losses, "loss"):
                break
            left = without(inputs, self.diverged)
            if left is None:
                return torch.zeros((), device=self.args.device, requires_grad=True)
            inputs = left
        if model.training:
            self._since_log.add_losses(losses)
            self._in_update |= {name: counts[name] for name in losses}
        loss = torch.stack(list(losses.values())).sum()
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """As Trainer's; rows of the caller's are given as {adapter name: rows}."""
        if not (eval_dataset is None or isinstance(eval_dataset, str | TaggedRows)):
            eval_dataset = self._tagged(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: Any = None, metric_key_prefix: str = "test") -> Any:
        """As Trainer's, for {adapter name: rows} of one adapter."""
        rows = list(self._tagged(test_dataset).values())
        if len(rows) != 1:
            raise ValueError(f"expected the rows of one adapter, got {len(rows)}; call predict for each")
        return super().predict(cast(Any, rows[0]), ignore_keys, metric_key_prefix)

    def _tagged(self, rows: Any) -> dict[str, TaggedRows]:
        known = self.model.peft_config
        if not isinstance(rows, Mapping) or not all(name in known for name in rows):
            given = f"names {', '.join(map(str, rows))}" if isinstance(rows, Mapping) else f"a {type(rows).__name__}"
            raise ValueError(
                f"joint training: expected {{adapter name: rows}} with names of {', '.join(known)}, got {given}; say "
                "whose rows they are"
            )
        if None in self._loss_functions(rows).values():
            check_loss(self._base)  # for one outside the run, within which each may have its own
        return {name: own if isinstance(own, TaggedRows) else TaggedRows(name, own) for name, own in rows.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's log, with the figures of each adapter in the place of those that only one run has."""
        if "learning_rate" in logs:
            del logs["learning_rate"]
            logs.pop("grad_norm", None)
            logs.update(self._since_log.take())
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the run's adapters. One whose weights were not finite any more has left the run, and stays so."""
        folder = Path(resume_from_checkpoint)
        self._take_order(order_of_checkpoint(folder, self.parameters_of))
        adapters: Any = self._adapter_model()
        diverged = _diverged(TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)))
        for name, parameters in self.parameters_of.items():
            source = folder_of(folder, name, adapters)
            if source is None:
                raise ValueError(f"{folder} has no weights of adapter {name!r}; resume from a checkpoint of this run")
            try:
                adapters.load_adapter(source, name, is_trainable=True)
            except AdapterFileError:
                if name not in diverged:
                    raise
                with torch.no_grad():
                    for parameter in parameters:
                        parameter.fill_(torch.nan)

    def _take_order(self, names: list[str]) -> None:
        """Let the optimizer's groups, and so the schedules, and the rows of a batch follow this order of adapters."""
        if names != list(self.parameters_of):
            self.parameters_of = {name: self.parameters_of[name] for name in names}
            self.train_dataset.schedules = {name: self.schedules[name] for name in names}
            self.optimizer = None  # of a run before; made again

    # Losses.

    def _count_labels(self, batches: list[Any]) -> dict[str, Tensor]:
        """How many labels each adapter has in the batches of one update: what its mean is over, as Trainer counts.

        Trainer goes by loss_type, and so counts a row's first label of GPT2LMHeadModel, though nothing predicts it.
        """
        counts: dict[str, Tensor] = {}
        for batch in batches:
            if not batch["adapter_names"]:
                continue
            labels = batch["labels"][..., 1:] if self._loss_shifts_labels else batch["labels"]
            for name, rows in slices_by_adapter(batch["adapter_names"]).items():
                counts[name] = counts.get(name, 0) + labels[rows].ne(IGNORED).sum()
        return {name: count.clamp(min=1).to(self.args.device) for name, count in counts.items()}

    def _losses(self, model: nn.Module, inputs: Any, counts: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
        """Each adapter's loss, and the model's outputs."""
        labels = inputs["labels"]
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels" or self._needs_labels})
        slices = slices_by_adapter(inputs["adapter_names"])
        # split, not sliced: the gradients of the parts are joined once, instead of each being padded to the whole
        wanted = labels.split([rows.stop - rows.start for rows in slices.values()])
        functions = self._loss_functions(slices)
        used = outputs if any(functions.values()) else {"logits": outputs.logits}
        parts = {key: split_rows(value, slices, len(labels)) for key, value in used.items() if key != "loss"}
        losses = {}
        for i, (name, function) in enumerate(functions.items()):
            own = {key: part[i] for key, part in parts.items()}
            if function is not None:
                losses[name] = function(type(outputs)(**own), wanted[i], num_items_in_batch=counts[name])
            else:
                losses[name] = self._cross_entropy(own["logits"], wanted[i], counts[name])
        return losses, outputs

    def _loss_functions(self, adapters: Iterable[str]) -> dict[str, Callable[..., Tensor] | None]:
        return {name: self.loss_of_adapter.get(name, self.loss_of_others) for name in adapters}

    def _cross_entropy(self, logits: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        """Of one adapter's rows, divided by the number of its labels in the update."""
        if self._shifts:
            loss: Tensor = self._base.loss_function(
                logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=count
            )
            return loss
        if logits.shape[:-1] != labels.shape or labels.is_floating_point():
            raise ValueError(
                f"no loss is known for labels of shape {tuple(labels.shape)}, {labels.dtype}, and logits of shape "
                f"{tuple(logits.shape)}; give one with compute_loss_func"
            )
        flat, wanted = logits.flatten(0, -2).float(), labels.flatten()
        return nn.functional.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum") / count

    # Gradients.

    def _finish_gradients(self) -> None:
        """Clip each adapter's gradient by its own norm. Who takes no part in the update, or diverged, has none."""
        norms = {
            name: nn.utils.get_total_norm([p.grad for p in self.parameters_of[name] if p.grad is not None])
            for name in self._in_update
            if name not in self.diverged
        }
        lost = self._leave_out(norms, "gradient")
        rates = {group["adapter"]: float(group["lr"]) for group in self.optimizer.param_groups}
        trained = [name for name in norms if name not in lost]  # also not who is still well, and waits for the next
        for name, parameters in self.parameters_of.items():
            if name not in trained:
                for parameter in parameters:
                    parameter.grad = None  # a zero would still decay the weight
            elif self.adapter_args[name].max_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(parameters, self.adapter_args[name].max_grad_norm, norms[name])
        self._since_log.add_update([n for n in norms if n not in self.diverged], self._in_update, norms, rates)
        self._in_update = {}
        if len(self.diverged) == len(self.parameters_of):
            self.control.should_training_stop = True

    def _leave_out(self, values: Mapping[str, Tensor], what: str) -> list[str]:
        """Adapters whose loss or norm is not finite train no further. Returns all of them, also those still well."""
        if not values:
            return []
        finite = torch.stack([value.detach().float() for value in values.values()]).isfinite().tolist()
        lost = [name for name, good in zip(values, finite, strict=True) if not good]
        # What is infinite in one may have reached the others through a sum over all; then those are still well.
        broken = [name for name in lost if not all(p.isfinite().all() for p in self.parameters_of[name])]
        for name in broken or lost:
            logger.warning(
                "adapter %r leaves the run at step %d: its %s is not finite. Its weights stay as they are; a lower "
                "learning rate may help", name, self.state.global_step, what,
            )  # fmt: skip
            self.diverged.add(name)
            self.log({f"{DIVERGED}{name}": 1.0})
        return lost


class _AtTheBeginning(TrainerCallback):
    """Sets a JointTrainer's own state when it begins to train, anew or from a checkpoint."""

    def __init__(self, trainer: JointTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.trainer.diverged = _diverged(state)
        self.trainer._in_update = {}
        self.trainer._since_log = SinceLog()


def _diverged(state: TrainerState) -> set[str]:
    """The adapters that have left the run, as its log says."""
    logged = {key for record in state.log_history for key in record if key.startswith(DIVERGED)}
    return {key.removeprefix(DIVERGED) for key in logged}
