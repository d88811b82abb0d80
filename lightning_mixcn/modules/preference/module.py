"""Preference optimisation: DPO, IPO, ORPO, SimPO and KTO, without a second model."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from lightning_mixcn.arguments import Between, Name, Share, check_arguments
from lightning_mixcn.errors import UserError
from lightning_mixcn.metrics import PairScores, SourcePairs, pair_figures, pair_sums, score_pairs
from lightning_mixcn.model.causal_lm import CausalLMOutput
from lightning_mixcn.model.experts.observe import unobserved
from lightning_mixcn.model.head import IGNORED
from lightning_mixcn.model.reference import as_base, evaluating
from lightning_mixcn.modules.causal_lm import Batch, CausalLMModule
from lightning_mixcn.modules.checks import source_names
from lightning_mixcn.modules.state import plain_lora

from .losses import (
    DEFAULT_BETA,
    WITHOUT_REFERENCE,
    LossSettings,
    PreferenceLoss,
    mismatched_gap,
)
from .reference import (
    FILE,
    PrecomputedReference,
    StartingValues,
    answer_losses,
    digest,
)

_START_KEY = "preference_start"
_SMOOTHED = ("dpo", "simpo")
_Weight = Annotated[float, Between(0, 1000)]


class PreferenceModule(CausalLMModule):
    """Preference optimisation: the model learns to prefer the chosen answer, as `PreferenceDataModule` pairs them.

    It begins from an instruct model (`base`), or from the adapter of instruction tuning, which goes on training
    (`adapter`). The reference is the model as it was before the first step, from the same 4-bit weights.

    Args:
        base: Hugging Face folder, 4-bit folder of `mixcn quantize`, or hub id.
        loss: ``dpo`` (arXiv 2305.18290), ``ipo`` (2310.12036), ``orpo`` (2403.07691) and ``simpo`` (2405.14734), which
            need no reference, or ``kto`` (2402.01306), for answers with a verdict instead of pairs.
        beta: β of the loss: how much a preference counts beside staying near the reference; in `orpo` the weight of
            the odds ratio. Null is the papers' value: 0.1, and 2.0 for `simpo`.
        label_smoothing: Probability that chosen and rejected are exchanged, of `dpo` and `simpo`.
        margin: Margin γ of `simpo` between the two rewards; 1 is the middle of its paper's values.
        undesirable_weight: Weight of an answer with a bad verdict in `kto`; one with a good verdict weighs 1.
        sft_weight: Weight of the chosen answer's loss a token beside it, as in RPO (arXiv 2404.19733), against the fall
            of its probability.
        reference: ``start`` computes the reference's log-probabilities in each step, one more forward pass without
            gradients; ``precompute`` computes those of all pairs once, before the first step, into the run's folder.
        kwargs: Arguments of `CausalLMModule`.
    """

    batch_keys = ("input_ids", "labels", "document_ids", "sides")

    def __init__(
        self,
        base: Name,
        loss: PreferenceLoss = "dpo",
        beta: Annotated[float, Between(0, 1000, excluded=(0,))] | None = None,
        label_smoothing: Annotated[Share, Between(0, 0.5, excluded=(0.5,))] = 0.0,
        margin: _Weight = 1.0,
        undesirable_weight: _Weight = 1.0,
        sft_weight: _Weight = 0.0,
        reference: Literal["start", "precompute"] = "start",
        **kwargs: Any,
    ) -> None:
        """Check the arguments; the model is made in `configure_model`."""
        check_arguments(PreferenceModule, locals())
        if label_smoothing and loss not in _SMOOTHED:
            raise UserError(f"`label_smoothing={label_smoothing}`: `loss: {loss}` has none. Leave it out, or use dpo")
        if kwargs.get("kl_to_base") is not None:
            raise UserError("`kl_to_base`: preference optimisation stays near its own reference. Leave it out")
        super().__init__(base, **kwargs)
        self.loss = LossSettings(
            loss, DEFAULT_BETA[loss] if beta is None else beta, label_smoothing, margin, undesirable_weight
        )
        self.sft_weight, self.reference = sft_weight, reference
        self._start: StartingValues | None = None
        self._sums: Tensor | None = None

    # ---- the reference ----

    @property
    def needs_reference(self) -> bool:
        """Tell if the loss compares with a reference."""
        return self.loss.loss not in WITHOUT_REFERENCE

    @cached_property
    def _starts_at_base(self) -> bool:
        """Tell if all that trains is an adapter that adds nothing yet."""
        lora = self.lora
        return (
            self.adapter is None
            and self.lora_start is None
            and not self.train_embeddings
            and (lora is None or lora.init_lora_weights is not False)
        )

    @cached_property
    def _start_digest(self) -> bytes:
        """Digest of what the reference depends on besides the pairs: base, storage, and the adapter's file."""
        content = ""
        if self.adapter_path is not None:
            with Path(self.adapter_path, "adapter_model.safetensors").open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        lora = None if self._starts_at_base or self.lora is None else plain_lora(self.lora)
        return digest(self._base_identity["sha256"], self.quantization, self.dtype_name, content, self.seed, lora)

    @property
    def keeps_start(self) -> bool:
        """Tell if a copy of what trains is kept from before the first step."""
        return self.needs_reference and self.reference == "start" and not self._starts_at_base

    def configure_model(self) -> None:
        """Build the model, and keep what the reference needs of it."""
        is_new = self.model is None
        super().configure_model()
        assert self.model is not None
        # Where nothing is computed before the first step, as in `validate`, the start is what was loaded.
        if is_new and (
            self.keeps_start or (self.needs_reference and not self._starts_at_base and not self._is_fitting)
        ):
            self._start = StartingValues(self.model, getattr(torch, self.dtype_name))

    def on_fit_start(self) -> None:
        """Check the data; compute the reference's log-probabilities, or read those of the run that goes on."""
        super().on_fit_start()
        trainer: Any = self.trainer  # its data module is untyped in Lightning
        data = trainer.datamodule
        if not hasattr(data, "every_pair"):
            raise UserError(
                f"`model: PreferenceModule` needs pairs of answers, got the data module {type(data).__name__}. Set "
                "`data.class_path: PreferenceDataModule`"
            )
        if self.needs_reference and self.reference == "precompute":
            path = Path(trainer.default_root_dir, FILE)
            start = digest(self._start_digest.hex(), data.order())
            if self.steps_trained:
                data.reference = PrecomputedReference.read(path, start)
            else:
                data.reference = self._precompute(data)
                if trainer.is_global_zero and not trainer.fast_dev_run:
                    data.reference.write(path, start)

    def _precompute(self, data: Any) -> PrecomputedReference:
        assert self.model is not None
        found: dict[int, NDArray[np.float32]] = {}
        with evaluating(self.model), unobserved():
            batches = tqdm(data.every_pair(), "reference", unit=" batches", disable=not self.trainer.is_global_zero)
            for batch in batches:
                moved = {name: tensor.to(self.device) for name, tensor in batch.items()}
                found |= answer_losses(self(moved).nll, batch)
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, found)
            found = {key: value for part in gathered for key, value in part.items()}
        return PrecomputedReference(found)

    def with_reference(self, batch: Batch) -> Batch:
        """Add ``reference_nll``, the reference's loss of each label, float32 ``[B, S]``, where the loss needs it.

        It is computed before the model's own forward pass, whose values may not change until its backward pass.
        """
        if "reference_nll" in batch or not self.needs_reference:
            return batch
        with self._as_at_start():
            return batch | {"reference_nll": self(batch).nll}

    @contextmanager
    def _as_at_start(self) -> Iterator[None]:
        assert self.model is not None
        if self._starts_at_base:
            with as_base(self.model):
                yield
        else:
            assert self._start is not None
            with evaluating(self.model), unobserved(), self._start.in_place():
                yield

    # ---- training ----

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the sum of the loss over the micro-batch's pairs, scaled so that accumulation is exact."""
        return super().training_step(self.with_reference(batch), batch_idx)

    def compute_loss(self, batch: Batch, output: CausalLMOutput) -> tuple[Tensor, Tensor]:
        """Return the sum of the loss over pairs, and their number.

        Args:
            batch: Micro-batch of a `PreferenceDataModule`, with ``reference_nll`` of `with_reference`.
            output: Result of `forward`.
        """
        assert output.nll is not None
        scores, losses, gap = self._judge(batch, output.nll)
        sums = pair_sums(scores, losses, self.loss.rewards(scores), self.loss.beta * gap)
        self._sums = sums if self._sums is None else self._sums + sums
        return torch.where(scores.is_pair, losses, 0.0).sum(), scores.is_pair.sum()

    def _judge(self, batch: Batch, nll: Tensor) -> tuple[PairScores, Tensor, Tensor]:
        """Return a batch's pairs, the loss of each, and for `kto` the mean log-ratio of mismatched answers."""
        scores = score_pairs(nll, batch.get("reference_nll"), batch)
        gap = torch.zeros((), device=nll.device)
        if self.loss.loss == "kto":
            # Over all ranks: the estimate of one micro-batch of all of them, as in the paper.
            total, count = self.trainer.strategy.reduce(mismatched_gap(scores), reduce_op="sum").unbind()
            gap = (total / count.clamp_min(1)).clamp_min(0).float()
        losses = self.loss(scores, gap) - self.sft_weight * scores.mean_log_probability[:, 0]
        return scores, losses, gap

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divide by the step's pairs, before clipping; log rewards."""
        super().on_before_optimizer_step(optimizer)
        assert self._sums is not None, "a subclass's `compute_loss` calls its parent's"
        totals = self.trainer.strategy.reduce(self._sums.clone(), reduce_op="sum")
        self._sums = None
        self.log_dict({f"train/{name}": value for name, value in pair_figures(totals).items()})

    # ---- evaluation ----

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add an evaluation batch to the sums."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add an evaluation batch to the sums."""
        self._evaluate(batch)

    def _evaluate(self, batch: Batch) -> None:
        batch = self.with_reference(batch)
        nll = self(batch).nll
        scores, losses, gap = self._judge(batch, nll)
        self._pairs.update(scores, losses, self.loss.rewards(scores), self.loss.beta * gap)
        self._evaluation.update(nll, batch | {"labels": self.labels_of_likelihood(batch)})

    def labels_of_likelihood(self, batch: Batch) -> Tensor:
        """Return the labels of good answers alone."""
        return batch["labels"].masked_fill(batch["sides"] <= 0, IGNORED)

    def _start_evaluation(self, stage: str) -> None:
        super()._start_evaluation(stage)
        self._pairs = SourcePairs(len(source_names(self.trainer, stage))).to(self.device)

    def _finish_evaluation(self) -> None:
        super()._finish_evaluation()
        stage, names = self._evaluation.stage, source_names(self.trainer, self._evaluation.stage)
        found = {names[source]: figures for source, figures in self._pairs.compute().items()}
        if not self.trainer.sanity_checking:
            for source, likelihood in self.source_likelihoods[stage].items():
                likelihood.update(found.get(source, {}))  # type: ignore[typeddict-item]  # beside its own, for reports
        tags = {f"{stage}/{source}/{name}": value for source, each in found.items() for name, value in each.items()}
        self.log_dict(tags, sync_dist=True, batch_size=1)  # already over all ranks

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the reference was made from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_START_KEY] = self._start_digest.hex()

    def check_checkpoint(self, content: Mapping[str, Any]) -> None:
        """Refuse what this run cannot go on from. Raises: ValueError: as the parent; another reference or loss."""
        super().check_checkpoint(content)
        if not self._is_fitting:
            return
        if self.needs_reference and content.get(_START_KEY, self._start_digest.hex()) != self._start_digest.hex():
            raise UserError(
                "The checkpoint's reference was another model than this run begins with. Give the base, adapter and "
                "the seed that it began with"
            )
        saved = content.get("hyper_parameters", {}).get("loss")
        if saved is not None and saved != self.loss.loss:
            raise UserError(
                f"The checkpoint was trained with `loss: {saved}`, but it is {self.loss.loss} here. Set "
                f"`model.init_args.loss: {saved}`, or begin a new run from its adapter"
            )
