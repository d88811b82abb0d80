"""Every loss and its gradient against TRL's trainers: the same model, pairs, reference and settings, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from lightning_mixcn.data import PreferenceDataModule
from lightning_mixcn.modules import PreferenceModule
from lightning_mixcn.testing import save_tiny_model
from lightning_mixcn.testing.tiny import byte_tokenizer
from lightning_mixcn.text import PreferenceSource
from tests.model.trained_values import draw_trained
from tests.text.pair_files import pair_records, verdict_records, write_records

pytest.importorskip("trl", reason="TRL is the reference: pip install 'trl==1.16.0'")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's of its own options, accelerate's and transformers'

ROWS, LENGTH = 3, 160
Example = dict[str, Any]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"), "mixtral")


def first_batch(base: Path, records: list[dict[str, Any]], folder: Path, rows: int) -> dict[str, Tensor]:
    """Return packed pairs, padded rows among them, and one that was truncated."""
    data = PreferenceDataModule(
        [PreferenceSource("zh", write_records(folder / "pairs.jsonl", records))],
        sequence_length=LENGTH, micro_batch_size=rows, num_streams=1, num_workers=0, val_fraction=0.0,
        packing="documents", on_too_long="truncate", tokenizer=str(base),
    )  # fmt: skip
    data.setup("fit")
    return next(iter(data.train_dataloader()))


def examples_of(batch: dict[str, Tensor]) -> list[Example]:
    """Return the pairs of a batch as TRL has them: prompt and answers as ids, and the first answer's side."""
    answers = []
    for ids, labels, documents, sides in zip(
        batch["input_ids"], batch["labels"], batch["document_ids"], batch["sides"], strict=True
    ):
        for document in range(int(documents.max()) + 1):
            own = documents == document
            start = int((labels[own] >= 0).nonzero()[0])
            answers.append((ids[own][:start].tolist(), ids[own][start:].tolist(), int(sides[own][0])))
    return [
        {"prompt_ids": prompt, "chosen_ids": first, "rejected_ids": second, "side": side}
        for (prompt, first, side), (same, second, _) in zip(answers[::2], answers[1::2], strict=True)
        if prompt == same
    ]


def ours(base: Path, batch: dict[str, Tensor], folder: Path, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of a step of one micro-batch, and gradients; save the adapter that it was computed with."""
    module = PreferenceModule(str(base), quantization="none", dtype="float32", lora=LORA, **settings)
    module.configure_model()
    assert isinstance(module.model, PeftModel)
    draw_trained(module.model, 0.2)
    module.model.save_pretrained(str(folder / "adapter"))
    module._trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    batch = module.train().with_reference(batch)
    output = module(batch)
    total, count = module.compute_loss(batch, output)
    loss = total / count + module.router_aux_loss_coef * output.aux_loss
    loss.backward()
    return loss.detach(), gradients(module.model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def stock(base: Path, folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model.config.output_router_logits = True
    return PeftModel.from_pretrained(model, str(folder / "adapter"), is_trainable=True)


def trainer_of(kind: str, model: Any, folder: Path, **settings: Any) -> Any:
    """Return a trainer of TRL, of which only the loss is used."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config, trainer = {
        "dpo": (DPOConfig, DPOTrainer), "kto": (KTOConfig, KTOTrainer),
        "cpo": (CPOConfig, CPOTrainer), "orpo": (ORPOConfig, ORPOTrainer),
    }[kind]  # fmt: skip
    record = (
        {"prompt": "a", "completion": "b", "label": True}
        if kind == "kto"
        else {"prompt": "a", "chosen": "b", "rejected": "c"}
    )
    shared = {
        "output_dir": str(folder / "trl"),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_length": LENGTH,
    }
    shared |= {"gradient_checkpointing": False, "remove_unused_columns": False}
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    made = trainer(
        model=model, args=config(**shared, **settings), processing_class=tokenizer,
        train_dataset=Dataset.from_list([record] * 8),
    )  # fmt: skip
    if "ref" in model.peft_config:  # the adapter that it was given; the reference here is the base
        model.delete_adapter("ref")
    return made


def compare(loss: Tensor, grads: dict[str, Tensor], theirs: Tensor, model: Any) -> None:
    theirs.backward()
    torch.testing.assert_close(loss, theirs.detach().reshape(()), rtol=1e-5, atol=1e-5)
    expected = gradients(model)
    assert grads.keys() == expected.keys()
    assert len(grads) == 16
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_dpo_and_ipo(loss: str, coefficient: float, base: Path, tmp_path: Path) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    batch = first_batch(base, pair_records(12, long_ones=True), tmp_path, ROWS)
    assert (batch["document_ids"] < 0).any()
    value, grads = ours(base, batch, tmp_path, loss=loss, beta=0.3, router_aux_loss_coef=coefficient)
    model = stock(base, tmp_path)
    model.config.router_aux_loss_coef = coefficient
    trainer = trainer_of("dpo", model, tmp_path, loss_type={"dpo": ["sigmoid"], "ipo": ["ipo"]}[loss], beta=0.3)
    trainer.aux_loss_enabled, trainer.router_aux_loss_coef = coefficient > 0, coefficient
    inputs = DataCollatorForPreference(pad_token_id=0)(examples_of(batch))
    compare(value, grads, trainer._compute_loss(model.train(), inputs, False), model)


def test_rpo_of_one_pair(base: Path, tmp_path: Path) -> None:
    """TRL's mean is over tokens of a batch, ours over pairs, so that accumulation is exact: one pair has one mean."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    batch = first_batch(base, pair_records(3)[2:], tmp_path, 1)
    one = {name: tensor[:, batch["document_ids"][0] < 2] for name, tensor in batch.items()}
    value, grads = ours(base, one, tmp_path, beta=0.3, sft_weight=0.7, router_aux_loss_coef=0.0)
    model = stock(base, tmp_path)
    trainer = trainer_of("dpo", model, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.7], beta=0.3)
    trainer.aux_loss_enabled = False
    inputs = DataCollatorForPreference(pad_token_id=0)(examples_of(one))
    compare(value, grads, trainer._compute_loss(model.train(), inputs, False), model)


def concatenated(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the batch as ORPO's and CPO's trainers have it."""
    found: dict[str, Tensor] = {}
    for side in ("chosen", "rejected"):
        pairs = [(example["prompt_ids"], example[f"{side}_ids"]) for example in examples_of(batch)]
        ids = [torch.tensor(prompt + answer) for prompt, answer in pairs]
        labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in pairs]
        found[f"{side}_input_ids"] = pad_sequence(ids, batch_first=True, padding_value=0)
        found[f"{side}_attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        found[f"{side}_labels"] = pad_sequence(labels, batch_first=True, padding_value=-100)
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_simpo(smoothing: float, base: Path, tmp_path: Path) -> None:
    batch = first_batch(base, pair_records(12, long_ones=True), tmp_path, ROWS)
    settings: dict[str, Any] = {"beta": 2.0, "label_smoothing": smoothing}
    value, grads = ours(base, batch, tmp_path, loss="simpo", margin=0.5, router_aux_loss_coef=0.1, **settings)
    model = stock(base, tmp_path)
    trainer = trainer_of("cpo", model, tmp_path, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5, **settings)
    trainer.aux_loss_enabled, trainer.aux_loss_coef = True, 0.1
    theirs, _ = trainer.get_batch_loss_metrics(model.train(), concatenated(batch))
    compare(value, grads, theirs, model)


def test_orpo(base: Path, tmp_path: Path) -> None:
    """Of TRL's trainer the odds ratio; its other part is over the prompt, too, and the paper's over the answer."""
    batch = first_batch(base, pair_records(12, long_ones=True), tmp_path, ROWS)
    value, grads = ours(base, batch, tmp_path, loss="orpo", beta=0.3, router_aux_loss_coef=0.1)
    model = stock(base, tmp_path)
    trainer = trainer_of("orpo", model, tmp_path, beta=0.3)
    trainer.aux_loss_enabled = True
    chosen, rejected, _, _, _, auxiliary = trainer.concatenated_forward(model.train(), concatenated(batch))
    ratio = trainer.odds_ratio_loss(chosen, rejected)[0]
    compare(value, grads, -chosen.mean() - ratio.mean() + 0.1 * auxiliary, model)


def test_kto(base: Path, tmp_path: Path) -> None:
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    batch = first_batch(base, verdict_records(12), tmp_path, ROWS)
    value, grads = ours(base, batch, tmp_path, loss="kto", beta=0.3, undesirable_weight=1.7, router_aux_loss_coef=0.0)
    model = stock(base, tmp_path)
    trainer = trainer_of("kto", model, tmp_path, beta=0.3, undesirable_weight=1.7, train_sampling_strategy="sequential")
    trainer.aux_loss_enabled = False
    examples = [
        {
            "prompt_ids": example["prompt_ids"],
            "completion_ids": example["chosen_ids"],
            "KL_completion_ids": example["rejected_ids"],
            "label": example["side"] > 0,
        }
        for example in examples_of(batch)
    ]
    inputs = DataCollatorForUnpairedPreference(pad_token_id=0)(examples)
    compare(value, grads, trainer._compute_loss(model.train(), inputs, False), model)
