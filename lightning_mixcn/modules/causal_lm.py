"""Batch → loss → log, for a mixture of which adapters (and perhaps embeddings) train.

To change what is minimised, subclass and override `compute_loss`, which gives a sum and a count. Accumulation, ranks,
logging and checkpoints stay right, because division happens once, in the end.
"""

import math
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, LRSchedulerTypeUnion, OptimizerCallable
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mixcn.arguments import Between, Name, Seed, check_arguments
from lightning_mixcn.errors import NonFiniteError, UserError
from lightning_mixcn.metrics import (
    DocumentScores,
    Likelihood,
    SourceLikelihood,
    overall_bits_per_byte,
    score_documents,
    scored_positions,
)
from lightning_mixcn.model import is_sharded, load_moe, set_activation_checkpointing, set_gradient_sync
from lightning_mixcn.model.causal_lm import CausalLMOutput
from lightning_mixcn.model.kl_to_base import BaseDivergence, KLToBase, check_kl_to_base
from lightning_mixcn.model.lora.choice import TrainOnly, read_choice
from lightning_mixcn.model.lora.options import check_training_options
from lightning_mixcn.model.vocabulary import tokenizer_for

from . import checks as run_checks
from .checkpoints import check_before_loading
from .checks import check_optimizer
from .learning_rates import LearningRates, make_rated_optimizer, make_rated_schedule
from .memory import budgeted_modes
from .resume import ConfiguredOptimization
from .run_settings import check_activation_settings, check_precision, check_trainer
from .schedule import WarmupCosine, known_length, scheduled
from .state import SavedStateModule, adapter_folder, make_plain
from .step import (
    REFERENCE_COUNT,
    Contribution,
    GradientWindow,
    clip_gradients,
    rescale_gradients,
    seed_micro_batch,
)
from .strategies import (
    Shard,
    build_device,
    check_strategy,
    fsdp2_shard,
)

Batch = dict[str, Tensor]


class CausalLMModule(SavedStateModule):
    """Next-token training of a mixture whose base is frozen, in 4 bits where wanted; the class to subclass.

    Args:
        base: Hugging Face folder, 4-bit folder of `mixcn quantize`, or hub id.
        quantization: ``nf4`` holds attention projections and experts in 4 bits; ``none`` holds them in ``dtype``.
        dtype: Compute dtype; LoRA masters and trained embeddings are float32 whatever it is.
        tokenizer: Folder of the tokenizer; null is the base's, or that of an `adapter` with embeddings of its own. The
            command line gives it to the data, too. One that `mixcn vocab merge` has extended needs `train_embeddings`.
        lora: PEFT's LoraConfig, with the paper's target names; null trains no adapter, or an `adapter` as it is.
        train_embeddings: Train ``embed_tokens`` and ``lm_head`` fully, as the paper does.
        adapter: PEFT adapter folder, or run folder, to continue from with a new optimizer. Its rank, scaling and
            targets are taken where `lora` is null; dropout, which its file does not have, is `lora`'s.
        router_aux_loss_coef: Weight of the auxiliary load-balancing loss; 0.02 as in Mixtral's configuration.
        activation_checkpointing: ``none`` keeps activations, ``selective`` recomputes attention, ``full`` whole layers,
            of which ``offload`` keeps the inputs in the host's memory.
        optimizer: Optimizer of the parameters that train.
        lr_scheduler: Schedule of the learning rate, stepped once an optimizer step.
        seed: Seed of LoRA's random start, and of dropout.
        new_rows: Start of the rows for an extended tokenizer's new pieces: the ``mean`` or ``byte_mean`` of the rows of
            their old pieces, ``multivariate`` (normal, with the old rows' mean and covariance), ``random``, ``zeros``.
        activation_memory: Bytes for activations, or ``auto`` for what the device has left: as many layers as fit are
            ``selective``, the others ``full``. It takes precedence over `activation_checkpointing`, to be left out.
        learning_rates: Multipliers of the optimizer's learning rate, by place (``embeddings`` are embed_tokens and
            lm_head, ``attention``, ``router``, ``experts``) and by factor (``lora_A``, ``lora_B``). A tensor's is the
            product of those of its place and its factor; ``{lora_B: 16}`` is LoRA+ (arXiv 2402.12354).
        train_only: Choice of what has LoRA at all: ``layers`` (numbers; all), ``experts`` (numbers by layer, or for
            each chosen layer; all), ``router``, ``attention`` (true). In place, or as a JSON file with such an object.
        kl_to_base: Named sources, such as replayed English, on whose labelled tokens coefficient × KL(base ‖ model) of
            the next-token distributions is added to the loss (arXiv 2605.29498); null adds none.
        lora_start: ``rounding_error``: LoRA starts as the best approximation of what NF4 rounds off (LoftQ, arXiv
            2310.08659), which needs a high-precision `base`; null: beside the base, with B = 0.
    """

    batch_keys: tuple[str, ...] = ("input_ids", "labels")
    """Tensors that every batch must hold; what else is left out is added, see `complete_batch`."""

    def __init__(
        self,
        base: Name,
        quantization: Literal["nf4", "none"] = "nf4",
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        tokenizer: Name | None = None,
        lora: LoraConfig | None = None,
        train_embeddings: bool = False,
        adapter: Name | None = None,
        router_aux_loss_coef: Annotated[float, Between(0, 1000)] = 0.02,
        activation_checkpointing: Literal["none", "selective", "full", "offload"] = "selective",
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        lr_scheduler: LRSchedulerCallable = WarmupCosine,
        seed: Seed = 0,
        new_rows: Literal["mean", "byte_mean", "multivariate", "random", "zeros"] = "mean",
        activation_memory: Annotated[int, Between(1, 2**50, "byte, or auto")] | Literal["auto"] | None = None,
        learning_rates: LearningRates | None = None,
        train_only: TrainOnly | Name | None = None,
        kl_to_base: KLToBase | None = None,
        lora_start: Literal["rounding_error"] | None = None,
    ) -> None:
        """Keep the arguments; the model is made in `configure_model`."""
        check_arguments(CausalLMModule, locals())
        if lora is not None:
            check_training_options(lora)
        if learning_rates and "embeddings" in learning_rates and not train_embeddings:
            raise UserError("`learning_rates` has embeddings, which do not train. Set `train_embeddings: true`")
        if train_only is not None and lora is None and adapter is None:
            raise UserError("`train_only` chooses what has LoRA, but `lora` is null. Set lora, or leave train_only out")
        check_kl_to_base(kl_to_base, train_embeddings)
        super().__init__()
        self.save_hyperparameters()
        make_plain(self)
        self.base, self.quantization, self.dtype_name = base, quantization, dtype
        self.given_tokenizer, self.new_rows = tokenizer, new_rows
        self.lora, self.train_embeddings, self.adapter = lora, train_embeddings, adapter
        self.train_only = None if train_only is None else read_choice(train_only)
        self.lora_start = lora_start
        self.router_aux_loss_coef = router_aux_loss_coef
        check_activation_settings(activation_checkpointing, activation_memory)
        self.activation_memory = activation_memory
        # Once the model is there and `activation_memory` is given, a mode for each layer.
        self.activation_checkpointing: str | list[str] = activation_checkpointing
        self.make_optimizer, self.make_lr_scheduler, self.learning_rates = optimizer, lr_scheduler, learning_rates
        self.seed, self.kl_to_base = seed, kl_to_base
        self.model: nn.Module | None = None
        self.source_likelihoods: dict[str, dict[str, Likelihood]] = {}
        self._window = GradientWindow()
        self._divergence: BaseDivergence | None = None
        self.tokens_of_step = 0.0  # of the last optimizer step, of all ranks, without padding

    @property
    def keeps_start(self) -> bool:
        """Tell if a copy of what trains is kept from before the first step; memory is planned for it."""
        return False

    @cached_property
    def adapter_path(self) -> str | None:
        """PEFT folder to continue from, see `adapter_folder`."""
        return adapter_folder(self.adapter)

    @cached_property
    def tokenizer_path(self) -> str:
        """Folder or hub id of the tokenizer, see `tokenizer_for`."""
        return tokenizer_for(self.base, self.given_tokenizer, self.adapter_path)

    # ---- what subclasses override ----

    def build_model(self) -> nn.Module:
        """Make the model on the trainer's device.

        Returns:
            A model as `lightning_mixcn.load_moe` gives it, sharded with `self.shard` where that is given.
        """
        with torch.device("cpu"):  # what is not placed explicitly, such as pieces of the checkpoint, stays on the host
            return load_moe(
                self.base_checkpoint,
                quantization=self.quantization,
                lora=self.lora,
                dtype=self.dtype_name,
                device=build_device(self._strategy),
                train_embeddings=self.train_embeddings,
                seed=self.seed,
                adapter=self.adapter_path,
                tokenizer=self.tokenizer_path,
                new_rows=self.new_rows,
                shard=self.shard,
                train_only=self.train_only,
                lora_start=self.lora_start,
            )

    def forward(self, batch: Batch) -> CausalLMOutput:
        """Run the model on a batch.

        Args:
            batch: ``[B, S]``: ``input_ids``, ``labels``, ``position_ids``, and ``document_ids`` (−1 is padding).

        Returns:
            ``nll`` float32 ``[B, S]``, the loss of each label in nats; ``aux_loss``, a scalar, while the model trains.
        """
        assert self.model is not None
        # The model computes in its own dtype: under `bf16-mixed` torch would lower the float32 parts of the loss, too.
        with torch.autocast(self.device.type, enabled=False):
            output: CausalLMOutput = self.model(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                labels=batch["labels"],
                document_ids=batch["document_ids"],
                output_router_logits=self.model.training,
                use_cache=False,
            )
        return output

    def compute_loss(self, batch: Batch, output: CausalLMOutput) -> tuple[Tensor, Tensor]:
        """Return a micro-batch's loss as a sum and its divisor, *before* any division.

        Args:
            batch: The micro-batch.
            output: Result of `forward`.

        Returns:
            The sum, a differentiable float32 scalar, and the count, a scalar. Both are added up over micro-batches and
            ranks; the optimizer minimises sum / count. The auxiliary loss comes on top.
        """
        assert output.nll is not None
        return output.nll.sum(), scored_positions(batch["labels"]).sum()

    # ---- training ----

    def setup(self, stage: str) -> None:
        """Refuse a strategy or precision that cannot be used; have batches and checkpoints checked."""
        check_trainer(self.trainer)
        run_checks.watch_batches(self.trainer)
        check_strategy(self.trainer.strategy)
        check_precision(self.trainer.precision)
        check_before_loading(self.trainer, self.check_checkpoint)

    @property
    def shard(self) -> Shard | None:
        """Function that shards a model under FSDP2, for `build_model`; `None` under other strategies."""
        return fsdp2_shard(self._strategy)

    def configure_model(self) -> None:
        """Build the model once, on the trainer's device, in training mode; sharded under FSDP2."""
        if self.model is None:
            self.model = self.build_model()
            if self.shard is not None and not is_sharded(self.model):
                self.shard(self.model)
            # DDP would broadcast 25 GB that every rank has loaded. It looks for this attribute.
            frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
            self._ddp_params_and_buffers_to_ignore = frozen
            if self.activation_memory is not None and self._trainer and self.trainer.state.fn == "fit":
                self.activation_checkpointing = budgeted_modes(self)
            set_activation_checkpointing(self.model, self.activation_checkpointing)
            self.model.train()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer and its schedule. Raises: ValueError if nothing trains, or the optimizer cannot."""
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        run_checks.check_trains(trained)
        optimizer = make_rated_optimizer(self.make_optimizer, trained, self.learning_rates)
        check_optimizer(optimizer, self.trainer.strategy)
        self.compare_with_checkpoint(ConfiguredOptimization(optimizer, self._schedule, self.make_optimizer))
        interval = getattr(self.trainer, "val_check_interval", None)  # Lightning sets none where it is a time
        return scheduled(optimizer, self._schedule(optimizer), interval)

    def _schedule(self, optimizer: Optimizer) -> LRSchedulerTypeUnion:
        schedule = make_rated_schedule(self.make_lr_scheduler, optimizer, self.learning_rates)
        trainer = self.trainer
        return known_length(schedule, trainer.max_steps, is_trial=bool(trainer.fast_dev_run))  # type: ignore[attr-defined]  # untyped in Lightning

    def on_fit_start(self) -> None:
        """Check that the data fit the model, and that they have the sources of `kl_to_base`."""
        run_checks.check_vocabulary(self.trainer, self.model)
        run_checks.check_context(self.trainer, self.model)
        self._divergence = None
        if self.kl_to_base is not None and self.kl_to_base["coefficient"]:
            assert self.model is not None
            names = run_checks.source_names(self.trainer, "train")
            self._divergence = BaseDivergence(self.kl_to_base, names, self.model, self.trainer.strategy)

    def on_train_start(self) -> None:
        """Have the configuration hold against a checkpoint's optimizer."""
        run_checks.check_schedule_is_stepped(self.trainer)
        self.take_configured_settings()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw dropout's random numbers as every run with this seed does at this place."""
        set_gradient_sync(self.trainer.strategy.model or self, not self.trainer.fit_loop._should_accumulate())
        seed_micro_batch(self.seed, self.trainer.fit_loop.total_batch_idx, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the loss over the micro-batch, scaled so that accumulation is exact; see `step`."""
        base = None if self._divergence is None else self._divergence.base_states(batch)
        output = penalised = self(batch)
        divergence = compared = output.nll.new_zeros(())
        if self._divergence is not None and base is not None:
            kl = self._divergence.per_token(output, base)
            divergence, compared = kl.sum(), divergence + len(base.place)
            # A part of the token's loss, so that it is weighted and divided as that is, by a subclass, too.
            penalised = CausalLMOutput(**dict(output) | {"nll": output.nll + self._divergence.coefficient * kl})
        loss, count = self.compute_loss(batch, penalised)
        labels = scored_positions(batch["labels"]).sum()
        auxiliary = output.aux_loss * labels
        minimised = loss + self.router_aux_loss_coef * (output.aux_loss * count)
        positions = (batch["document_ids"] >= 0).sum()
        nats = output.nll.sum()
        self._window.add(Contribution(minimised, count, nats, auxiliary, labels, positions, divergence, compared))
        # Lightning divides by `accumulate_grad_batches`.
        scaled: Tensor = minimised * (self.trainer.accumulate_grad_batches / REFERENCE_COUNT)
        return scaled

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide by the step's count, before clipping. Raises: FloatingPointError, ValueError; nothing is updated."""
        step, totals = self.trainer.global_step, self._window.close(self.trainer.strategy)
        count, self.tokens_of_step = float(totals.count), float(totals.positions)
        if not self.tokens_of_step:
            # Padding alone, as where streams end one after the other: a parameter without gradient is not updated.
            self._gradient_norm = 0.0
            for parameter in self.parameters():
                parameter.grad = None
            return
        run_checks.check_finite_step(step, "loss", float(totals.minimised), self.trainer)
        run_checks.check_labels(step, count)
        trainable = (parameter for parameter in self.parameters() if parameter.requires_grad)
        norm = rescale_gradients(trainable, count, self.trainer.world_size)
        self._gradient_norm = float(norm)
        run_checks.check_finite_step(step, "gradient norm", self._gradient_norm, self.trainer)
        labels = totals.labels.clamp_min(1)
        self.log("train/nll_nats_per_token", totals.nats / labels, prog_bar=True)
        self.log("train/loss", totals.minimised / count)
        self.log("train/auxiliary_loss", totals.auxiliary / labels)
        self.log("train/gradient_norm", norm)
        if totals.compared:
            self.log("train/kl_to_base_nats_per_token", totals.divergence / totals.compared)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip under every strategy; Lightning's own knows no norm under FSDP."""
        if gradient_clip_val:
            trainable = (parameter for parameter in self.parameters() if parameter.requires_grad)
            clip_gradients(trainable, gradient_clip_val, gradient_clip_algorithm or "norm", self._gradient_norm)

    # ---- evaluation ----

    def on_validation_start(self) -> None:
        """Start the sums of one pass."""
        self._start_evaluation("val")

    def on_test_start(self) -> None:
        """Start the sums of one pass."""
        self._start_evaluation("test")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add an evaluation batch to the sums."""
        self._evaluation.update(self(batch).nll, batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add an evaluation batch to the sums."""
        self._evaluation.update(self(batch).nll, batch)

    def on_validation_epoch_end(self) -> None:
        """Log each source's likelihood."""
        self._finish_evaluation()

    def on_test_epoch_end(self) -> None:
        """Log each source's likelihood."""
        self._finish_evaluation()

    def predict_step(self, batch: Batch, batch_idx: int) -> DocumentScores:
        """Return the sums of each document in the batch; a document that goes on in another batch has more of them."""
        return score_documents(self(batch).nll, batch)

    def labels_of_likelihood(self, batch: Batch) -> Tensor:
        """Return the labels whose likelihood is evaluated, ``[B, S]`` as ``labels``; a subclass may leave some out."""
        return batch["labels"]

    def _start_evaluation(self, stage: str) -> None:
        run_checks.check_vocabulary(self.trainer, self.model)
        self._evaluation = SourceEvaluation(stage, self.trainer, self.device)

    def _finish_evaluation(self) -> None:
        results = self._evaluation.finish()
        if not self.trainer.sanity_checking:
            self.source_likelihoods[self._evaluation.stage] = results
        # Already over all ranks; `sync_dist` only keeps Lightning from asking.
        self.log_dict(self._evaluation.tags(results), sync_dist=True, batch_size=1)

    @property
    def _strategy(self) -> Strategy | None:
        return None if self._trainer is None else self.trainer.strategy


class SourceEvaluation:
    """Sums of one pass over the evaluation data.

    Args:
        stage: ``val`` or ``test``.
        trainer: Lightning's trainer, whose data module names the sources.
        device: Device of the batches.
        prefix: First part of the logged names; null is the stage.
    """

    def __init__(self, stage: str, trainer: Any, device: torch.device, prefix: str | None = None) -> None:
        """Make empty sums."""
        self.stage, self._prefix = stage, prefix or stage
        self._names = run_checks.source_names(trainer, stage)
        self._likelihood = SourceLikelihood(len(self._names)).to(device)

    def update(self, nll: Tensor, batch: dict[str, Tensor]) -> None:
        """Add a batch; ``nll`` is float32 ``[B, S]`` in nats, the rest is the evaluation batch of the data module."""
        self._likelihood.update(nll, batch["labels"], batch["source_ids"], batch["label_bytes"], batch["text_mask"])

    def finish(self) -> dict[str, Likelihood]:
        """Return the likelihood of every source that had tokens, over all ranks; call it on each of them.

        Raises:
            FloatingPointError: a source's likelihood is not finite.
        """
        results = {self._names[source]: result for source, result in self._likelihood.compute().items()}
        for name, result in results.items():
            if not math.isfinite(result["nll_nats_per_token"]):
                raise NonFiniteError(
                    f"The likelihood of the source {name!r} is {result['nll_nats_per_token']} nats a token: the "
                    "model's output is not finite. Check the checkpoint or the adapter that was loaded"
                )
        return results

    def tags(self, results: dict[str, Likelihood]) -> dict[str, float]:
        """Return the values of ``<prefix>/<source>/nll_nats_per_token`` and ``<prefix>/<source>/bits_per_byte``.

        ``<prefix>/bits_per_byte`` is that of all sources together, also where there is one: a monitor of this name is
        right for any data.
        """
        tags: dict[str, float] = {}
        if (overall := overall_bits_per_byte(results.values())) is not None:
            tags[f"{self._prefix}/bits_per_byte"] = overall
        for name, result in results.items():
            tags[f"{self._prefix}/{name}/nll_nats_per_token"] = result["nll_nats_per_token"]
            if result["bytes"]:
                tags[f"{self._prefix}/{name}/bits_per_byte"] = result["bits_per_byte"]
        return tags
