"""Labels that only the prompt tells: how prompts are made, and models that are known to be right or wrong."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_mixcn.cli import main
from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.options import ModelOptions
from lightning_mixcn.studies.benchmarks.eos_probe import probed_documents
from lightning_mixcn.studies.benchmarks.evaluate import evaluate
from lightning_mixcn.studies.benchmarks.few_shot_probe import (
    QUERIES,
    FewShotFigures,
    FewShotOptions,
    FewShotPrompt,
    compare_few_shot,
    few_shot_table,
    label_log_likelihoods,
    make_prompts,
    probe_few_shot,
    query_row,
)
from lightning_mixcn.studies.benchmarks.options import EvaluationOptions
from lightning_mixcn.testing import run_distributed, save_tiny_mixtral
from lightning_mixcn.text import DocumentSet, TextTokenizer, load_tokenizer
from tests.model.adapters_on_disk import save_adapter

OPTIONS = FewShotOptions(prompts=30, labels=2, shots=2, characters=12)
Rule = Callable[[str], str | None]


@pytest.fixture
def tokenizer(tiny_base: Path) -> TextTokenizer:
    return load_tokenizer(tiny_base)


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return f"{path.stem}={path}"


@pytest.fixture
def entries(tmp_path: Path) -> list[str]:
    """Six documents in each language, of which every word has its document's number."""
    chinese = ["，".join(f"第{number}篇文章的第{place}句话" for place in range(12)) for number in range(6)]
    english = [" ".join(f"word{place}of{number}" for place in range(30)) for number in range(6)]
    return [write(tmp_path / "zh.jsonl", chinese), write(tmp_path / "en.jsonl", english)]


@pytest.fixture
def english(entries: list[str]) -> DocumentSet:
    return probed_documents(entries)[1]


def shown(prompt: FewShotPrompt) -> dict[str, str]:
    """Return the label of each snippet in a prompt."""
    return dict(line.split(": ") for line in prompt.shown.splitlines())


def subject(snippet: str) -> str:
    """Return the number of an English snippet's document."""
    (number,) = {word.partition("of")[2] for word in snippet.split()}
    return number


def test_a_prompt_tells_labels_and_asks_for_one(english: DocumentSet) -> None:
    prompts = make_prompts(english, OPTIONS)
    assert len(prompts) == 30
    for prompt in prompts:
        labels = shown(prompt)
        assert Counter(labels.values()) == {"A": 2, "B": 2}
        assert all(len(snippet) <= 12 for snippet in [*labels, *prompt.queries.values()])
        by_subject = {subject(snippet): label for snippet, label in labels.items()}
        assert len(by_subject) == 2
        answer = prompt.labels[prompt.answer]
        assert labels[prompt.queries["seen"]] == answer
        assert prompt.queries["unseen"] not in labels
        assert by_subject[subject(prompt.queries["unseen"])] == answer
    # No label, place or document tells the answer.
    assert Counter(prompt.answer for prompt in prompts) == {0: 15, 1: 15}
    assert set(Counter(prompt.labels[prompt.answer] for prompt in prompts)) == {"A", "B"}
    assert {list(shown(prompt).values())[-1] == prompt.labels[prompt.answer] for prompt in prompts} == {True, False}


def test_prompts_are_a_function_of_text_and_seed(entries: list[str]) -> None:
    (first, _), (again, _) = probed_documents(entries), probed_documents(entries)
    assert make_prompts(first, OPTIONS) == make_prompts(again, OPTIONS)
    assert make_prompts(first, OPTIONS) != make_prompts(first, replace(OPTIONS, seed=1))
    assert make_prompts(first, replace(OPTIONS, prompts=5)) == make_prompts(first, OPTIONS)[:5]


class Answering(nn.Module):
    """Reads the text of each row, as a language model would, and puts all its mass on what a rule says."""

    def __init__(self, tokenizer: TextTokenizer, rule: Rule) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(max_position_embeddings=4096)
        self.tokenizer, self.rule = tokenizer, rule

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> Any:
        starts = [*(position_ids[0] == 0).nonzero().flatten().tolist(), input_ids.shape[1]]
        logits_1QV = torch.zeros(1, len(logits_to_keep), self.tokenizer.vocab_size)
        for query, (start, stop) in enumerate(pairwise(starts)):
            assert int(logits_to_keep[query]) == stop - 1
            answer = self.rule(self.tokenizer.decode(input_ids[0, start:stop].tolist()))
            if answer is not None:
                logits_1QV[0, query, self.tokenizer.encode_batch([answer])[0][-1]] = 9.0
        return SimpleNamespace(logits=logits_1QV)


def by_recall(text: str) -> str | None:
    """Give the label of the same snippet, if it is there."""
    *lines, query = text.splitlines()
    return dict(line.split(": ") for line in lines).get(query.rstrip(": "))


def by_subject(text: str) -> str | None:
    """Give the label of the snippets of the same document."""
    *lines, query = text.splitlines()
    pairs = (line.split(": ") for line in lines)
    return {subject(snippet): label for snippet, label in pairs}[subject(query.rstrip(": "))]


def wrong(text: str) -> str:
    return "A" if by_subject(text) == "B" else "B"


@pytest.mark.parametrize(
    ("rule", "seen", "unseen"),
    [
        (by_subject, 1.0, 1.0),
        (wrong, 0.0, 0.0),
        (by_recall, 1.0, 0.5),
        (lambda text: None, 0.5, 0.5),  # as likely, all of them
    ],
)
@pytest.mark.parametrize("tokens", [1, 100, 4096])
def test_models_that_are_right_and_wrong(
    rule: Rule, seen: float, unseen: float, tokens: int, tokenizer: TextTokenizer, english: DocumentSet
) -> None:
    found = probe_few_shot(Answering(tokenizer, rule), tokenizer, english, OPTIONS, tokens)
    assert (found["seen"]["accuracy"], found["unseen"]["accuracy"]) == (seen, unseen)
    for figures in found.values():
        assert figures["low"] <= figures["accuracy"] <= figures["high"]
        assert figures["chance"] == 0.5
        assert sum(figures["right"]) == figures["accuracy"] * 30


def test_a_model_with_a_favourite_is_at_chance(tokenizer: TextTokenizer, english: DocumentSet) -> None:
    many = replace(OPTIONS, prompts=400)
    found = probe_few_shot(Answering(tokenizer, lambda text: "B"), tokenizer, english, many, 4096)
    assert found["seen"]["low"] < 0.5 < found["seen"]["high"]


def test_a_random_model_is_at_chance(tiny_base: Path, tokenizer: TextTokenizer, entries: list[str]) -> None:
    model = load_mixtral(tiny_base, quantization="none", dtype="float32")
    for documents in probed_documents(entries):
        found = probe_few_shot(model, tokenizer, documents, replace(OPTIONS, prompts=200, labels=3), 512)
        for figures in found.values():
            assert figures["chance"] == 1 / 3
            assert figures["accuracy"] == pytest.approx(1 / 3, abs=0.1)  # three standard errors


def by_hand(folder: Path, tokenizer: TextTokenizer, prompt: FewShotPrompt, kind: str) -> list[float]:
    """Log-likelihood of each label after prompt and query, by stock transformers, one text a forward pass."""
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for label in prompt.labels:
        text = f"{prompt.shown}{prompt.queries[kind]}: {label}"
        ids = [tokenizer.bos_id, *tokenizer.encode_batch([text])[0]]
        with torch.no_grad():
            log_NV = stock(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(float(log_NV[-2, ids[-1]]))
    return found


@pytest.mark.parametrize("kind", QUERIES)
@pytest.mark.parametrize("tokens", [1, 300])
def test_log_likelihoods_are_those_of_stock_transformers(
    kind: str, tokens: int, tiny_base: Path, tokenizer: TextTokenizer, entries: list[str]
) -> None:
    """Prompts share a forward pass here, and do not see each other."""
    model = load_mixtral(tiny_base, quantization="none", dtype="float32").eval()
    prompts = [make_prompts(part, replace(OPTIONS, prompts=3))[2] for part in probed_documents(entries)]
    found_QL = label_log_likelihoods(model, [query_row(tokenizer, prompt, kind) for prompt in prompts], tokens)
    expected = [by_hand(tiny_base, tokenizer, prompt, kind) for prompt in prompts]
    assert found_QL.tolist() == [pytest.approx(values, rel=1e-5) for values in expected]


def test_real_model_and_text(stories_base: Path, stories_texts: list[Path], tmp_path: Path) -> None:
    """A pretrained model with a SentencePiece tokenizer, on text of its kind."""
    lines = stories_texts[0].read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] * 2 for line in lines]
    (documents,) = probed_documents([write(tmp_path / "tales.jsonl", texts)])
    tokenizer, options = load_tokenizer(stories_base), replace(OPTIONS, prompts=8, characters=24)
    model = load_mixtral(stories_base, quantization="none", dtype="float32").eval()
    prompts = [with_labels(prompt, "TB") for prompt in make_prompts(documents, options)]  # " A" is no token of its 512
    rows = [query_row(tokenizer, prompt, "unseen") for prompt in prompts]
    found_QL = label_log_likelihoods(model, rows, 400)
    expected = [by_hand(stories_base, tokenizer, prompt, "unseen") for prompt in prompts]
    assert found_QL.tolist() == [pytest.approx(values, rel=1e-4) for values in expected]


def with_labels(prompt: FewShotPrompt, letters: str) -> FewShotPrompt:
    """Write other letters than A and B."""
    names = dict(zip("AB", letters, strict=True))
    lines = (line.split(": ") for line in prompt.shown.splitlines())
    text = "".join(f"{snippet}: {names[label]}\n" for snippet, label in lines)
    return prompt._replace(shown=text, labels=tuple(names[label] for label in prompt.labels))


def test_two_models_on_the_same_prompts(tokenizer: TextTokenizer, english: DocumentSet) -> None:
    figures: list[FewShotFigures] = [
        probe_few_shot(Answering(tokenizer, rule), tokenizer, english, OPTIONS, 4096)
        for rule in (by_subject, by_recall)
    ]
    tests = compare_few_shot(*figures)
    assert (tests["seen"].difference, tests["seen"].p_value) == (0.0, 1.0)
    assert tests["unseen"].difference == -0.5
    assert tests["unseen"].p_value == 2 / 2**15  # McNemar: 15 prompts are answered otherwise, all of them worse
    table = few_shot_table({"base": {"en": figures[0]}, "adapted": {"en": figures[1]}})
    assert "1.000 [0.886, 1.000]" in table
    assert "0.500 [0.332, 0.668]" in table


@pytest.mark.parametrize(
    "texts",
    [
        ["one two three four five six seven eight nine ten"],
        ["short"] * 5,
        ["the same words in every document, and not one of its own"] * 5,
        ["and again " * 30, "and so on " * 30],
    ],
    ids=["one document", "short documents", "the same documents", "the same snippets"],
)
def test_text_without_prompts_is_refused(texts: list[str], tmp_path: Path) -> None:
    (documents,) = probed_documents([write(tmp_path / "en.jsonl", texts)])
    with pytest.raises(ValueError, match=r"'en' has no 2 documents of 3 different snippets of 12 .* or lower"):
        make_prompts(documents, OPTIONS)


def test_prompts_that_the_model_does_not_read_are_refused(
    tmp_path: Path, tokenizer: TextTokenizer, english: DocumentSet
) -> None:
    base = save_tiny_mixtral(tmp_path / "base", max_position_embeddings=32)
    model = load_mixtral(base, quantization="none", dtype="float32")
    with pytest.raises(ValueError, match=r"few-shot prompt from 'en' has \d+ tokens, and the model reads 32. Lower"):
        probe_few_shot(model, tokenizer, english, OPTIONS, 512)


def test_labels_that_are_no_tokens_are_refused(
    tokenizer: TextTokenizer, english: DocumentSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TextTokenizer, "encode_batch", lambda self, texts: [[3, 0] for _ in texts])
    with pytest.raises(ValueError, match=r"does not write the labels .* as one token each"):
        query_row(tokenizer, make_prompts(english, OPTIONS)[0], "seen")


def test_likelihoods_that_are_not_finite_are_refused(tokenizer: TextTokenizer, english: DocumentSet) -> None:
    class Broken(Answering):
        def forward(self, *arguments: Any, **named: Any) -> Any:
            output = super().forward(*arguments, **named)
            return SimpleNamespace(logits=output.logits * float("nan"))

    with pytest.raises(FloatingPointError, match="'en' gives likelihoods that are not finite"):
        probe_few_shot(Broken(tokenizer, by_subject), tokenizer, english, OPTIONS, 512)


EXACT = ["--quantization=none", "--dtype=float32", "--device=cpu"]
SMALL = ["--few_shot_prompts=12", "--few_shot_shots=2", "--few_shot_characters=12"]


def test_base_beside_adapted_without_the_harness(
    tmp_path: Path, tiny_base: Path, tokenizer: TextTokenizer, entries: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "scores.json"
    adapted = save_adapter(tiny_base, adapter, scale=0.3)
    command = ["evaluate", str(adapter), "--few_shot_probe", *entries, *SMALL, f"--out={out}", *EXACT]
    assert main(command) == 0
    report, table = json.loads(out.read_text(encoding="utf-8")), capsys.readouterr().out
    chinese, english = probed_documents(entries)
    options = replace(OPTIONS, prompts=12)
    found = report["few_shot_probe"]["models"]
    assert found["adapted"]["zh"] == probe_few_shot(adapted, tokenizer, chinese, options, 512)
    with adapted.disable_adapter():
        assert found["base"]["en"] == probe_few_shot(adapted, tokenizer, english, options, 512)
    assert set(report["few_shot_probe"]["comparison"]["zh"]) == {"seen", "unseen"}
    assert report["rows"] == []
    assert "few-shot accuracy" in table
    assert main(command) == 0  # it was finished before
    assert capsys.readouterr().out == table
    assert main([*command, "--few_shot_prompts=13"]) == 2
    assert "holds a study with `few_shot_prompts=12`, but now it is 13" in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.parametrize("shard", [False, True], ids=["replicas", "fsdp2"])
def test_two_processes_give_the_report_of_one(shard: bool, tmp_path: Path, tiny_base: Path, entries: list[str]) -> None:
    save_adapter(tiny_base, tmp_path / "adapter", scale=0.3)
    options: dict[str, Any] = {
        "options": EvaluationOptions(
            few_shot_probe=entries, few_shot_prompts=13, few_shot_shots=2, few_shot_characters=12
        ),
        "model": ModelOptions("none", "float32", "cpu"),
    }
    evaluate(str(tmp_path / "adapter"), out=str(tmp_path / "one.json"), **options)
    given = options | {"out": str(tmp_path / "two.json"), "shard": shard}
    run_distributed(partial(evaluate, str(tmp_path / "adapter"), **given), 2)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert one["few_shot_probe"] == two["few_shot_probe"]
    assert one["table"] == two["table"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--few_shot_probe=en"], "`few_shot_probe` has 'en': expected name=PATH"),
        (["--few_shot_probe=en=nothing.txt"], "`few_shot_probe[0].path='nothing.txt'` matches no file"),
        (["--few_shot_probe=en=few.txt"], "'en' has no 2 documents of 5 different snippets of 32 characters"),
        (["--few_shot_labels=1"], "`few_shot_labels=1`: expected at least 2 (labels are letters)"),
        (["--few_shot_prompts=0"], "`few_shot_prompts=0`: expected at least 1"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("a few words", encoding="utf-8")
    assert main(["evaluate", str(tiny_base), "--out=scores.json", *EXACT, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["few.txt"]
