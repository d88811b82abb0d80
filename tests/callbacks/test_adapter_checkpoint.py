"""The adapter folder against stock PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel

from lightning_mixcn.callbacks import AdapterCheckpoint, StepCheckpoint
from lightning_mixcn.model import load_mixtral
from lightning_mixcn.modules import PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch
from lightning_mixcn.text import load_tokenizer

Make = Callable[..., Any]

# transformers 5.23 still reads its own old name of the flag, which PEFT asks for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_the_adapter_at_the_end_continues_the_run(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    batch = random_batch([20])
    trainer(callbacks=[AdapterCheckpoint()]).fit(module, FixedBatches([batch] * 2))
    folder = tmp_path / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {f.name for f in folder.iterdir()}
    assert load_tokenizer(folder).encode_batch(["a"]) == load_tokenizer(module.tokenizer_path).encode_batch(["a"])
    continued = PretrainModule(module.base, dtype="float32", lora=module.lora, adapter=str(tmp_path))
    continued.configure_model()
    with torch.no_grad():
        torch.testing.assert_close(continued.eval()(batch).nll, module.eval()(batch).nll)


def test_every_checkpoint_has_its_adapter(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    written: list[int] = []  # when the adapter was written, 0 for not yet

    class Watch(StepCheckpoint):
        def on_train_batch_end(self, *arguments: Any) -> None:
            super().on_train_batch_end(*arguments)
            folder = tmp_path / "adapter"
            written.append(folder.stat().st_mtime_ns if folder.exists() else 0)

    callbacks = [AdapterCheckpoint(), Watch(every_n_steps=2, dirpath=str(tmp_path / "checkpoints"))]
    trainer(max_steps=4, enable_checkpointing=True, callbacks=callbacks).fit(
        module, FixedBatches([random_batch([20])] * 4)
    )
    assert 0 == written[0] < written[1] == written[2] < written[3]


def test_without_lora_there_is_no_adapter(tmp_path: Path, tiny_base: Path, trainer: Make) -> None:
    module = PretrainModule(str(tiny_base), train_embeddings=True)
    trainer(max_steps=1, callbacks=[AdapterCheckpoint()]).fit(module, FixedBatches([random_batch([20])]))
    assert not (tmp_path / "adapter").exists()


# PEFT's own conversion of w1 and w3 to the fused layout leaves patterns for what was not adapted.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match any targeted module:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match any targeted module:RuntimeWarning")
def test_stock_peft_reads_it(tmp_path: Path, tiny_base: Path, module: PretrainModule, trainer: Make) -> None:
    module.quantization = "none"
    batch = random_batch([20])
    trainer(max_steps=2, callbacks=[AdapterCheckpoint()]).fit(module, FixedBatches([batch] * 2))
    stock: Any = transformers.MixtralForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, str(tmp_path / "adapter")).eval()
    bare = load_mixtral(tiny_base, quantization="none", dtype="float32")
    with torch.no_grad():
        expected = stock(batch["input_ids"][:, :20]).logits
        assert module.model is not None
        trained = module.model.eval()(input_ids=batch["input_ids"][:, :20]).logits
        untrained = bare(input_ids=batch["input_ids"][:, :20]).logits
    # float32; PEFT multiplies A and B in another order.
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)
    assert (trained - untrained).abs().max() > 1e-4
