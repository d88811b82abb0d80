"""Answers and texts that a model writes while it trains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import markdown  # type: ignore[import-untyped]  # TensorBoard's, published without types
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # published without types
    EventAccumulator,
)

from lightning_mixcn.callbacks import SampleAnswers, SampleText
from lightning_mixcn.data import InstructDataModule
from lightning_mixcn.metrics import answer_figures
from lightning_mixcn.modules import InstructModule, PretrainModule
from lightning_mixcn.testing import FixedBatches, random_batch
from lightning_mixcn.text import ConversationSource, load_tokenizer
from tests.modules.preference.preference_run import module as preference_module
from tests.modules.preference.preference_run import pairs
from tests.text.pair_files import pair_records, write_records

Make = Callable[..., Any]


def question(number: int, language: str) -> dict[str, Any]:
    return {"instruction": f"{language} {'问' * number}", "output": "答", "history": [["早", "好"]] * (number % 2)}


@pytest.fixture
def data(tmp_path: Path, tiny_base: Path) -> InstructDataModule:
    for language, count in (("zh", 12), ("en", 2)):
        records = [question(number, language) for number in range(1, count + 1)]
        (tmp_path / f"{language}.json").write_text(json.dumps(records), encoding="utf-8")
    held_out = [ConversationSource(language, str(tmp_path / f"{language}.json")) for language in ("zh", "en")]
    return InstructDataModule(
        sources=held_out[:1], val_sources=held_out, tokenizer=str(tiny_base), sequence_length=96, micro_batch_size=1,
        num_streams=1, num_workers=0,
    )  # fmt: skip


@pytest.fixture
def tuned(module: PretrainModule) -> InstructModule:
    return InstructModule(module.base, dtype="float32", lora=module.lora)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def test_questions_of_every_source_before_during_and_after(
    tmp_path: Path, tuned: InstructModule, data: InstructDataModule, trainer: Make
) -> None:
    callback = SampleAnswers(questions=6, every_n_steps=2, max_new_tokens=5)
    logger = TensorBoardLogger(str(tmp_path), name="tensorboard", version="")
    trainer(max_steps=3, callbacks=[callback], logger=logger, log_every_n_steps=1).fit(tuned, data)
    written = lines(tmp_path)
    assert [line["step"] for line in written] == [0] * 6 + [2] * 6 + [3] * 6
    asked = [line["question"] for line in written[:6]]
    assert [text[:2] for text in asked] == ["zh", "en", "zh", "en", "zh", "zh"]  # in turn, while there are some
    assert [line["question"] for line in written[6:12]] == asked
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {f"answers/{number}/text_summary" for number in range(6)} <= set(events.Tags()["tensors"])
    for name in ("eos_rate", "repetition_rate", "length_tokens"):
        assert [event.step for event in events.Scalars(f"answers/{name}")] == [0, 2, 3]
    assert callback.figures is not None
    assert events.Scalars("answers/eos_rate")[-1].value == pytest.approx(callback.figures["eos_rate"])
    assert sum(line["ended"] for line in written[12:]) == round(6 * callback.figures["eos_rate"])


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_batch_is_answered_like_one_after_the_other(
    penalty: float, tuned: InstructModule, data: InstructDataModule, trainer: Make
) -> None:
    """Questions of different lengths are padded on the left; the answers are those of plain greedy decoding."""
    callback = SampleAnswers(questions=8, max_new_tokens=6, repetition_penalty=penalty)
    trainer(max_steps=1, callbacks=[callback]).fit(tuned, data)
    conversations = data.evaluation_conversations("val")
    prompts = [data.template.encode_prompt(turns[:-1], data.tokenizer) for part in conversations for turns in part]
    assert len({len(prompt) for prompt in prompts}) > 4
    # Some token that the tiny model says, so that some answers end and others do not.
    stop_ids = {greedy(tuned, prompts[0], set(), penalty)[2], data.tokenizer.eos_id}
    together = callback.generate(tuned, prompts, stop_ids)
    alone = [greedy(tuned, prompt, stop_ids, penalty) for prompt in prompts]
    assert together == alone
    assert answer_figures(alone, stop_ids)["eos_rate"] > 0
    assert len({len(answer) for answer in alone}) > 1


def greedy(module: InstructModule, prompt: list[int], stop_ids: set[int], penalty: float, tokens: int = 6) -> list[int]:
    """Penalize as CTRL does (Keskar et al. 2019): logits of tokens that were there are divided by it if positive."""
    assert module.model is not None
    module.model.eval()
    row = list(prompt)
    while len(row) < len(prompt) + tokens and not (len(row) > len(prompt) and row[-1] in stop_ids):
        with torch.no_grad():
            logits = module.model(input_ids=torch.tensor([row])).logits[0, -1]
        for token in set(row):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        row.append(int(logits.argmax()))
    return row[len(prompt) :]


def test_prompts_of_held_out_pairs_are_answered(tmp_path: Path, tiny_base: Path, trainer: Make) -> None:
    path = write_records(tmp_path / "pairs.jsonl", pair_records(20))
    data = pairs(str(tiny_base), path, val_fraction=0.3)
    callback = SampleAnswers(questions=3, max_new_tokens=4)
    trainer(max_steps=1, callbacks=[callback]).fit(preference_module(str(tiny_base)), data)
    (held_out,) = data.evaluation_conversations("val")
    assert [(line["step"], line["question"]) for line in lines(tmp_path)] == [
        (step, turns[-2].content) for step in (0, 1) for turns in held_out[:3]
    ]
    assert callback.figures is not None
    assert 0 < callback.figures["length_tokens"] <= 4


def test_other_data_is_refused(module: PretrainModule, trainer: Make) -> None:
    with pytest.raises(ValueError, match="needs an InstructDataModule or a PreferenceDataModule, got FixedBatches"):
        trainer(callbacks=[SampleAnswers()]).fit(module, FixedBatches([random_batch([20])]))


def test_nothing_held_out_is_refused(tuned: InstructModule, tmp_path: Path, tiny_base: Path, trainer: Make) -> None:
    (tmp_path / "zh.json").write_text(json.dumps([question(number, "zh") for number in range(9)]), encoding="utf-8")
    data = InstructDataModule(
        sources=[ConversationSource("zh", str(tmp_path / "zh.json"))], tokenizer=str(tiny_base), num_workers=0,
        val_fraction=0.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="SampleAnswers needs held-out conversations"):
        trainer(callbacks=[SampleAnswers()]).fit(tuned, data)


@pytest.mark.parametrize(
    ("argument", "message"),
    [("questions", "expected at least 1"), ("repetition_penalty", r"expected more than 0 \(1")],
)
def test_bad_arguments_are_refused(argument: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"`{argument}=0`: {message}"):
        SampleAnswers(**{argument: 0})


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def shown(card: str) -> str:
    """Return the HTML that TensorBoard makes of a card, before its sanitizer."""
    return str(markdown.markdown(card, extensions=["tables"]))


def batches() -> FixedBatches:
    return FixedBatches([random_batch([20])] * 10)


def test_before_during_and_after(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    callback = SampleText(["ab", "中"], every_n_steps=2, max_new_tokens=3)
    logger = TensorBoardLogger(str(tmp_path), name="tensorboard", version="")
    trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[callback], logger=logger, log_every_n_steps=1).fit(
        module, batches()
    )
    assert [(line["step"], line["prompt"]) for line in samples(tmp_path)] == [
        (step, prompt) for step in (0, 2, 3) for prompt in ("ab", "中")
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"samples/0/text_summary", "samples/1/text_summary"} <= set(events.Tags()["tensors"])
    card = events.Tensors("samples/1/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert card.startswith("**中**\n\n| step 0 | step 2 | step 3 |\n")
    assert shown(card).count("<td>") == 3


def test_a_card_has_the_first_step_and_the_newest_side_by_side(
    tmp_path: Path, module: PretrainModule, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = iter(["a|b\nc", "<s>two", "**3**", "four", "five", "six"])
    monkeypatch.setattr(SampleText, "generate", lambda *_: [[1]])
    tokenizer = load_tokenizer(module.tokenizer_path)
    monkeypatch.setattr(type(tokenizer), "decode", lambda *_: next(texts))
    trainer(max_steps=5, callbacks=[SampleText(["ab"], every_n_steps=1)]).fit(module, batches())
    card = (tmp_path / "figures" / "samples_0.md").read_text(encoding="utf-8")
    assert card.splitlines()[2] == "| step 0 | step 3 | step 4 | step 5 |"
    page = shown(card)
    assert page.count("<th>") == page.count("<td>") == 4
    assert "<td>a|b<br>c</td>" in page
    assert "two" not in page  # step 1 has made room


def test_what_a_stranger_writes_beside_the_samples_ends_no_run(
    tmp_path: Path, module: PretrainModule, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = SampleText.generate

    def beside(*arguments: Any) -> list[list[int]]:
        with (tmp_path / "samples.jsonl").open("ab") as file:
            file.write(b'mine\n\xff\n{"step": 1}\n{"step": 1, "prompt": "ab", "continuation": null}\n[1]\n\n')
        return generate(*arguments)

    monkeypatch.setattr(SampleText, "generate", beside)
    trainer(max_steps=2, callbacks=[SampleText(["ab"], every_n_steps=1)]).fit(module, batches())
    assert "| step 2 |" in (tmp_path / "figures" / "samples_0.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")  # a stand-in
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")  # as in every resumed run
def test_a_resumed_run_has_every_step_once(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    """As after a kill in the middle of the line of step 3, whose checkpoint was that of step 2."""
    whole = SampleText(["ab", "中"], every_n_steps=1, max_new_tokens=3)
    saver = ModelCheckpoint(str(tmp_path), filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer(max_steps=4, callbacks=[whole, saver], enable_checkpointing=True).fit(module, batches())
    want = (tmp_path / "samples.jsonl").read_bytes()
    lines = want.splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    (tmp_path / "samples.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:-9] + b"\xe4")
    again = PretrainModule(module.base, dtype="float32", lora=module.lora)
    resumed = SampleText(["ab", "中"], every_n_steps=1, max_new_tokens=3)
    trainer(max_steps=4, callbacks=[resumed, saver], enable_checkpointing=True).fit(
        again, batches(), ckpt_path=str(tmp_path / "step=2.ckpt"), weights_only=True
    )
    assert (tmp_path / "samples.jsonl").read_bytes() == want


def test_they_are_the_model_s_greedy_continuation(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    trainer(max_steps=1, callbacks=[SampleText(["ab"], max_new_tokens=4)]).fit(module, batches())
    tokenizer = load_tokenizer(module.tokenizer_path)
    row = [tokenizer.bos_id, *tokenizer.encode_batch(["ab"])[0]]
    prompt = len(row)
    assert module.model is not None
    module.model.eval()
    for _ in range(4):
        with torch.no_grad():
            row.append(int(module.model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        if row[-1] == tokenizer.eos_id:
            break
    assert samples(tmp_path)[-1]["continuation"] == tokenizer.decode(row[prompt:])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_training_does_not_notice_them(temperature: float, tmp_path: Path, tiny_base: Path, trainer: Make) -> None:
    lora = LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "w1", "w2", "w3"])
    ends = []
    for callbacks in ([], [SampleText(["ab"], every_n_steps=1, max_new_tokens=3, temperature=temperature)]):
        module = PretrainModule(str(tiny_base), dtype="float32", lora=lora)
        trainer(max_steps=3, callbacks=callbacks).fit(module, batches())
        assert module.model is not None
        assert all(child.training for child in module.model.modules())
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_new_run_starts_a_new_file(tmp_path: Path, module: PretrainModule, trainer: Make) -> None:
    for _ in range(2):
        again = PretrainModule(module.base, dtype="float32", lora=module.lora)
        trainer(max_steps=1, callbacks=[SampleText(["ab"], max_new_tokens=1)]).fit(again, batches())
    assert [line["step"] for line in samples(tmp_path)] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, r"`prompts=\[\]`"),
        ({"prompts": ["a"], "every_n_steps": 0}, "`every_n_steps=0`"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "`max_new_tokens=0`"),
        ({"prompts": ["a"], "temperature": -1.0}, "`temperature=-1.0`"),
    ],
)
def test_bad_arguments_of_texts_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleText(**arguments)
