"""Tokens one by one, against transformers' `generate` on the same model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mixcn.model import load_mixtral
from lightning_mixcn.model.inference import generation
from lightning_mixcn.model.inference.generation import PrefixCache, stream_tokens
from lightning_mixcn.model.inference.sampling import Sampling
from lightning_mixcn.testing import save_tiny_mixtral

GREEDY = Sampling(temperature=0, repetition_penalty=1.0, max_new_tokens=24)
PROMPT = list(range(3, 43))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("generation"), initializer_range=0.3)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_mixtral(folder, quantization="none", dtype="float32")


def stream(
    model: nn.Module,
    ids: list[int],
    sampling: Sampling = GREEDY,
    cache: PrefixCache | None = None,
    seed: int = 0,
    stop_ids: tuple[int, ...] = (),
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    return stream_tokens(model, ids, cache or PrefixCache(), sampling, stop_ids=stop_ids, generator=generator)


def by_transformers(model: Any, ids: list[int], sampling: Sampling, **options: Any) -> list[int]:
    if sampling.temperature:
        options |= {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "do_sample": True,
        }
    row = torch.tensor([ids])
    generated = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        pad_token_id=0,
        **({"do_sample": False, "eos_token_id": None} | options),
    )
    tokens: list[int] = generated[0, len(ids) :].tolist()
    return tokens


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3])
def test_greedy_equals_transformers(model: nn.Module, repetition_penalty: float) -> None:
    sampling = Sampling(temperature=0, repetition_penalty=repetition_penalty, max_new_tokens=48)
    for ids in (PROMPT, PROMPT[:1], PROMPT[::-1]):
        assert list(stream(model, ids, sampling)) == by_transformers(model, ids, sampling)


def test_four_bits_too(folder: Path) -> None:
    model, cache = load_mixtral(folder, dtype="float32"), PrefixCache()
    first = by_transformers(model, PROMPT, GREEDY)
    assert list(stream(model, PROMPT, cache=cache)) == first
    ids = [*PROMPT, *first, 5, 6, 7]
    assert list(stream(model, ids, cache=cache)) == by_transformers(model, ids, GREEDY)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=32),
        Sampling(temperature=1.5, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=32),
        Sampling(temperature=0.9, top_k=5, top_p=0.5, max_new_tokens=32),
    ],
    ids=["defaults", "everything", "narrow"],
)
def test_sampled_tokens_equal_transformers(model: nn.Module, sampling: Sampling) -> None:
    """On the CPU a generator draws what the global one draws from the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = by_transformers(model, PROMPT, sampling)
    assert list(stream(model, PROMPT, sampling, seed=7)) == expected
    assert len(set(expected)) > 3


def test_a_seed_gives_the_same_tokens_and_another_others(model: nn.Module) -> None:
    warm = Sampling(temperature=1.5, top_k=0, top_p=1.0, max_new_tokens=16)
    first, again, other = (list(stream(model, PROMPT, warm, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_stop_token_ends_and_is_not_given(model: nn.Module) -> None:
    tokens = list(stream(model, PROMPT))
    stop = tokens[5]
    expected = tokens[: tokens.index(stop)]
    assert list(stream(model, PROMPT, stop_ids=(stop, 99_999))) == expected
    assert by_transformers(model, PROMPT, GREEDY, eos_token_id=stop) == [*expected, stop]


def test_turns_over_one_cache_are_those_without(model: nn.Module) -> None:
    cache, ids = PrefixCache(), list(PROMPT)
    for turn in range(4):
        ids += [turn + 5, turn + 50, turn + 90]
        expected = list(stream(model, ids))
        assert list(stream(model, ids, cache=cache)) == expected
        ids += expected
        assert list(cache.ids) == ids[:-1]  # the last token has not been run


def test_only_what_is_new_is_run(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    forward = model.forward

    def counting(**kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", counting)
    cache, two = PrefixCache(), Sampling(temperature=0, max_new_tokens=2)
    first = list(stream(model, PROMPT, two, cache))
    assert lengths == [40, 1]
    list(stream(model, [*PROMPT, *first, 5, 6, 7], two, cache))
    assert lengths[2:] == [4, 1]  # the second token of the first answer, and three new ones


@pytest.mark.parametrize("kept", [0, 1, 17, 39, 40])
def test_another_prompt_keeps_the_common_beginning(model: nn.Module, kept: int) -> None:
    cache = PrefixCache()
    list(stream(model, PROMPT, cache=cache))
    other = [*PROMPT[:kept], *range(200, 230)]
    logits = cache.next_logits(model, other)
    assert list(cache.ids) == other
    torch.testing.assert_close(logits, PrefixCache().next_logits(model, other), atol=1e-5, rtol=1e-5)
    assert list(stream(model, other, cache=cache)) == list(stream(model, other))


@pytest.mark.parametrize("length", [1, 20, 40])
def test_a_prompt_that_is_cached_already_is_answered(model: nn.Module, length: int) -> None:
    cache = PrefixCache()
    expected = list(stream(model, PROMPT[:length]))
    list(stream(model, PROMPT, cache=cache))
    assert list(stream(model, PROMPT[:length], cache=cache)) == expected


def test_a_long_prompt_is_run_in_chunks(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = list(stream(model, PROMPT))
    monkeypatch.setitem(generation._CHUNK, "cpu", 7)
    assert list(stream(model, PROMPT)) == expected


def test_a_sliding_window_is_kept_over_turns(tmp_path: Path) -> None:
    model = load_mixtral(save_tiny_mixtral(tmp_path, sliding_window=8), quantization="none", dtype="float32")
    cache = PrefixCache()
    for ids in (PROMPT, [*PROMPT[:30], *range(100, 120)]):
        assert list(stream(model, ids, cache=cache)) == by_transformers(model, ids, GREEDY)


def test_an_interrupted_pass_leaves_no_half_filled_cache(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, expected = PrefixCache(), list(stream(model, PROMPT))
    tokens = stream(model, PROMPT, cache=cache)
    next(tokens)
    with monkeypatch.context() as patch:

        def interrupt(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(model.model.layers[1], "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(tokens)
    assert not cache.ids
    assert list(stream(model, PROMPT, cache=cache)) == expected


def test_the_context_bounds_prompt_and_answer(model: nn.Module) -> None:
    assert len(list(stream(model, PROMPT * 12 + PROMPT[:20]))) == 12
    with pytest.raises(ValueError, match="the prompt has 520 tokens, but the model's context has room for 512"):
        stream(model, PROMPT * 13)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "`temperature=-0.1`: expected at least 0 \\(0 for the likeliest"),
        ({"temperature": float("nan")}, "`temperature=nan`"),
        ({"top_k": -1}, "`top_k=-1`: expected at least 0"),
        ({"top_p": 0.0}, "`top_p=0.0`: expected more than 0"),
        ({"top_p": 1.1}, "`top_p=1.1`"),
        ({"repetition_penalty": 0.0}, "`repetition_penalty=0.0`: expected more than 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens=0`: expected at least 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)
