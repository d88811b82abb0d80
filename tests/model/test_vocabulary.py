"""New rows of embedding and head against numpy and stock transformers; old rows bit for bit; every way to load them."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import pytest
import sentencepiece
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lightning_mixcn.model import (
    MoePeftModel,
    find_model,
    load_found,
    load_mixtral,
    load_moe,
    shard_model,
)
from lightning_mixcn.model.checkpoints.folder import Checkpoint
from lightning_mixcn.model.convert.quantize import quantize
from lightning_mixcn.model.export.command import export
from lightning_mixcn.model.sharding import full_tensor
from lightning_mixcn.model.vocabulary import NewRows, VocabularyExtension
from lightning_mixcn.studies.vocabulary.merge import choose_pieces, mergeable_base, write_tokenizer
from lightning_mixcn.studies.vocabulary.scripts import ScriptFilter
from lightning_mixcn.testing import run_distributed, save_tiny_mixtral, save_tiny_model
from lightning_mixcn.tokenizer.pieces import TokenizerPieces
from tests.extended_tokenizers import HAN, TALES, extend, qwen_like
from tests.model.adapters_on_disk import TARGETS
from tests.model.trained_values import draw_trained
from tests.studies.vocabulary.vocab_data import small_base

assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
NAMES = ("model.embed_tokens", "lm_head")


@pytest.fixture(scope="session")
def extended(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the base's tokenizer with 57 or so new pieces: Chinese ones of bytes, or English ones of characters."""
    out = tmp_path_factory.mktemp("extended") / "tokenizer"
    if base.name.startswith("stories"):
        return extend(base, out, " ".join(TALES).split(), 260, script="Latin", between=" ")
    return extend(base, out, HAN, 90)


def weight(model: Any, name: str) -> Tensor:
    inner = model.get_base_model() if isinstance(model, MoePeftModel) else model
    found = inner.get_submodule(name).weight
    assert isinstance(found, Tensor)
    return found


def texts_of_new_pieces(base: Path, extended: Path) -> dict[int, str]:
    """Id → text of each new piece, by transformers alone; "" for beginnings of characters."""
    tokenizer: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(extended / "tokenizer.json"))
    old: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))
    plain = {index: tokenizer.convert_ids_to_tokens(index).replace("▁", " ") for index in range(len(tokenizer))}
    of_bytes = {index: tokenizer.decode([index]) for index in range(len(tokenizer))}
    texts = plain if "▁t" in old.get_vocab() else of_bytes
    return {index: "" if "�" in texts[index] else texts[index] for index in range(len(old), len(tokenizer))}


def expected_row(base: Path, text: str, rows: NDArray[np.float32], weighted: bool) -> NDArray[np.float64]:
    """Return the mean of old rows in float64: ids by transformers, bytes by decoding each token."""
    old: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))
    body = text.lstrip(" ")
    # transformers' tokenizer puts a blank in front; another letter before takes its place, and is cut off again.
    ids = old(text if "▁t" not in old.get_vocab() else f"\n{text}", add_special_tokens=False)["input_ids"]
    if "▁t" in old.get_vocab():
        ids = ids[2:]  # the blank and the newline
    pieces = old.convert_ids_to_tokens(ids)
    sizes = [1 if piece.startswith("<0x") or "▁t" not in old.get_vocab() else len(piece.encode()) for piece in pieces]
    sizes = [size - 2 * piece.count("▁") for size, piece in zip(sizes, pieces, strict=True)]
    assert body
    assert sum(sizes) == len(text.encode())
    weights = np.array(sizes if weighted else [1] * len(ids), dtype=np.float64)
    mean: NDArray[np.float64] = weights @ rows[ids].astype(np.float64) / weights.sum()
    return mean


@pytest.mark.parametrize("new_rows", ["mean", "byte_mean"])
@pytest.mark.parametrize("kept", ["original", "4-bit folder"])
def test_means_are_those_of_numpy(base: Path, extended: Path, tmp_path: Path, new_rows: NewRows, kept: str) -> None:
    folder = base
    if kept == "4-bit folder":
        quantize(str(base), str(tmp_path / "small"), dtype="float32")
        folder = tmp_path / "small"
    model = load_mixtral(folder, tokenizer=extended, new_rows=new_rows, train_embeddings=True, dtype="float32")
    stored = load_file(base / "model.safetensors")
    texts = texts_of_new_pieces(base, extended)
    checked = 0
    for name in NAMES:
        key = f"{name}.weight" if f"{name}.weight" in stored else "model.embed_tokens.weight"
        rows = weight(model, name)
        assert len(rows) == max(texts) + 1 == model.config.vocab_size
        first = min(texts)
        assert torch.equal(rows[:first], stored[key][:first])  # the rows of old pieces, bit for bit
        for index, text in texts.items():
            if text.strip(" "):
                expected = expected_row(base, text, stored[key].numpy(), new_rows == "byte_mean")
                np.testing.assert_allclose(rows[index].detach().numpy(), expected, rtol=1e-5, atol=1e-6)
                checked += 1
    assert checked > 80


@pytest.mark.parametrize(("new_rows", "shares"), [("mean", [1, 1, 1, 1]), ("byte_mean", [3, 1, 1, 1])])
def test_shares_of_a_piece_by_hand(tmp_path: Path, new_rows: NewRows, shares: list[int]) -> None:
    """中甲 was a piece of three bytes and three single bytes before."""
    base = save_tiny_mixtral(tmp_path / "base", vocab_size=370)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    small = small_base(tmp_path / "small")
    for file in small.iterdir():
        shutil.copyfile(file, base / file.name)
    tokenizer = mergeable_base(small)
    chosen = choose_pieces(tokenizer, ["甲", "中甲"], ScriptFilter("Han"))
    write_tokenizer(small, tokenizer, chosen, "Han", tmp_path / "zh")
    model = load_mixtral(base, tokenizer=tmp_path / "zh", new_rows=new_rows, train_embeddings=True, dtype="float32")
    old = sentencepiece.SentencePieceProcessor(model_file=str(small / "tokenizer.model"))
    ids = [old.piece_to_id(piece) for piece in ("中", "<0xE7>", "<0x94>", "<0xB2>")]
    for name in NAMES:
        rows = weight(model, name).detach()
        expected = (torch.tensor(shares)[:, None] * rows[ids]).sum(0) / sum(shares)
        torch.testing.assert_close(rows[371], expected)


SPARE = 640  # rows; the tokenizer has 305 pieces


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen3_moe tied"])
def spare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base with more rows than its tokenizer has pieces, as Qwen3: 151,936 and 151,669."""
    family, _, tied = request.param.partition(" ")
    base = save_tiny_model(
        tmp_path_factory.mktemp("spare") / "base", family, vocab_size=SPARE, tie_word_embeddings=bool(tied)
    )
    qwen_like(base)
    return base


@pytest.mark.parametrize("new_rows", ["mean", "byte_mean", "multivariate", "random", "zeros"])
def test_new_pieces_take_rows_that_the_base_has_to_spare(spare: Path, tmp_path: Path, new_rows: NewRows) -> None:
    """They were never trained: those of new pieces start as any others do, the rest stays."""
    extended = extend(spare, tmp_path / "t", HAN, 90)
    load = partial(load_moe, spare, new_rows=new_rows, train_embeddings=True, dtype="float32")
    model, plain = load(tokenizer=extended), load()
    texts = texts_of_new_pieces(spare, extended)
    assert (min(texts), model.config.vocab_size) == (305, SPARE)
    assert max(texts) < SPARE - 100
    for name in NAMES:
        rows, stored = weight(model, name).detach(), weight(plain, name).detach()
        assert torch.equal(rows[:305], stored[:305])
        assert torch.equal(rows[max(texts) + 1 :], stored[max(texts) + 1 :])
        new = slice(305, max(texts) + 1)
        if new_rows == "zeros":
            assert not rows[new].any()
        elif new_rows == "random":
            assert float(rows[new].std()) == pytest.approx(model.config.initializer_range, rel=0.1)
            assert not torch.isclose(rows[new], stored[new]).all(dim=1).any()
        elif new_rows == "multivariate":  # of the pieces' rows, not of those to spare
            assert_whitened(rows[new], stored[:305])
        else:
            of_bytes = new_rows == "byte_mean"
            for index, text in texts.items():
                if text:
                    expected = expected_mean_of_bytes(spare, text, stored.numpy(), weighted=of_bytes)
                    np.testing.assert_allclose(rows[index].numpy(), expected, rtol=1e-5, atol=1e-6)


def expected_mean_of_bytes(base: Path, text: str, rows: NDArray[np.float32], *, weighted: bool) -> NDArray[np.float64]:
    """Return the mean of the rows of the old pieces, ids by the library alone; each piece is written for its bytes."""
    old: Any = transformers.PreTrainedTokenizerFast(tokenizer_file=str(base / "tokenizer.json"))
    ids = old(text, add_special_tokens=False)["input_ids"]
    sizes = np.array([len(piece) if weighted else 1 for piece in old.convert_ids_to_tokens(ids)], dtype=np.float64)
    mean: NDArray[np.float64] = sizes @ rows[ids].astype(np.float64) / sizes.sum()
    return mean


def test_more_new_pieces_than_rows_to_spare(tmp_path: Path) -> None:
    base = save_tiny_model(tmp_path / "base", "qwen3_moe", vocab_size=310)
    qwen_like(base)
    extended = extend(base, tmp_path / "t", HAN, 90)
    model = load_moe(base, tokenizer=extended, train_embeddings=True, dtype="float32")
    texts = texts_of_new_pieces(base, extended)
    assert model.config.vocab_size == max(texts) + 1 > 310
    for name in NAMES:
        stored = load_file(base / "model.safetensors")[f"{name}.weight"]
        assert torch.equal(weight(model, name)[:305], stored[:305])
        for index in [index for index, text in texts.items() if text][:: len(texts) // 4]:  # on both sides of row 310
            expected = expected_mean_of_bytes(base, texts[index], stored.numpy(), weighted=False)
            np.testing.assert_allclose(weight(model, name)[index].detach(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_trained_on_spare_rows_is_saved_and_exported(spare: Path, tmp_path: Path) -> None:
    extended = extend(spare, tmp_path / "t", HAN, 90)
    with pytest.raises(
        ValueError, match=r"has \d+ pieces that the base's lacks. Rows of .* Set `train_embeddings: true`"
    ):
        load_moe(spare, tokenizer=extended)
    model = trained(spare, extended, tmp_path / "adapter")
    ids = torch.randint(3, 400, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = logits_of(model, ids)
    found = find_model(str(tmp_path / "adapter"))
    assert_close(logits_of(load_found(found, quantization="none", dtype="float32"), ids), expected)
    export(str(tmp_path / "adapter"), str(tmp_path / "out"))
    merged: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_close(logits_of(merged, ids), expected)
    again = load_moe(tmp_path / "out", quantization="none", dtype="float32", tokenizer=extended)
    assert_close(logits_of(again, ids), expected)  # its own tokenizer has them all: nothing is new


def test_random_and_zeros(tiny: Path, tmp_path: Path) -> None:
    tokenizer = extend(tiny, tmp_path / "t", HAN, 90)
    load = partial(load_mixtral, tiny, tokenizer=tokenizer, train_embeddings=True, dtype="float32")
    zeros, drawn, again, other = (
        load(new_rows="zeros"), load(new_rows="random"), load(new_rows="random"), load(new_rows="random", seed=1)
    )  # fmt: skip
    new = slice(259, None)
    for name in NAMES:
        assert not weight(zeros, name)[new].any()
        assert torch.equal(weight(drawn, name), weight(again, name))
        assert not torch.equal(weight(drawn, name), weight(other, name))
        assert torch.equal(weight(drawn, name)[:259], weight(zeros, name)[:259])
        assert float(weight(drawn, name)[new].detach().std()) == pytest.approx(drawn.config.initializer_range, rel=0.1)
    assert not torch.equal(weight(drawn, NAMES[0])[new], weight(drawn, NAMES[1])[new])


def assert_whitened(drawn: Tensor, old: Tensor) -> None:
    """Check that rows look drawn from the normal distribution with the old rows' mean and covariance, by numpy.

    In the coordinates of the old rows' principal axes, n drawn ones are standard normal: n times the squared length of
    their mean is chi-squared with H degrees of freedom (mean H, deviation √(2H)), and the singular values of the rows
    by √n lie within 1 ± √(H/n), up to deviations of about 1/√n. All bounds are six deviations wide.
    """
    n, hidden = drawn.shape
    old_NH = old.double().numpy()
    variances_H, axes_HH = np.linalg.eigh(np.cov(old_NH.T, bias=True))
    white_NH = (drawn.double().numpy() - old_NH.mean(0)) @ axes_HH / np.sqrt(variances_H)
    assert n * float(np.square(white_NH.mean(0)).sum()) < hidden + 6 * (2 * hidden) ** 0.5
    scales = np.linalg.svd(white_NH, compute_uv=False) / n**0.5
    reach = (hidden / n) ** 0.5 + 6 / n**0.5
    assert 1 - reach < scales[-1] <= scales[0] < 1 + reach
    assert float((np.abs(white_NH) < 1).mean()) == pytest.approx(0.6827, abs=6 * (0.2166 / white_NH.size) ** 0.5)


@pytest.mark.parametrize("tied", [False, True])
def test_multivariate_rows_have_mean_and_covariance_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    """20,000 new rows beside 3,000 whose deviations differ by a factor of 100 and whose mean is not 0."""
    base = save_tiny_mixtral(tmp_path / "base", vocab_size=3000, tie_word_embeddings=tied)
    stored = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in NAMES[: 2 - tied]:
        mixing = torch.randn(32, 32, generator=generator) * torch.logspace(-3, -1, 32)
        rows = torch.randn(3000, 32, generator=generator) @ mixing + torch.randn(32, generator=generator)
        stored[f"{name}.weight"] = rows.bfloat16()
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})

    def load(seed: int) -> Any:
        old, new = cast(TokenizerPieces, range(3000)), cast(TokenizerPieces, range(23000))  # no piece is looked at
        extension = VocabularyExtension(Checkpoint(base), 23000, "multivariate", old, new, seed)
        monkeypatch.setattr("lightning_mixcn.model.loading.find_extension", lambda *args, **kwargs: extension)
        return load_mixtral(base, train_embeddings=True)

    model, again, other = load(0), load(0), load(1)
    for name in NAMES:
        rows = weight(model, name).detach()
        old = stored[f"{name}.weight" if not tied else "model.embed_tokens.weight"].float()
        assert torch.equal(rows[:3000], old)
        assert_whitened(rows[3000:], old)
        assert torch.equal(rows, weight(again, name))
        assert not torch.isclose(rows[3000:], weight(other, name)[3000:]).all(dim=1).any()
    assert torch.equal(*(weight(model, name) for name in NAMES)) == tied


@pytest.mark.parametrize("alike", [False, True])
def test_multivariate_rows_of_fewer_old_rows_than_the_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alike: bool
) -> None:
    """The covariance is singular; where transformers falls back to the mean, rows stay in the old ones' plane."""
    base = save_tiny_mixtral(tmp_path / "base", vocab_size=20)
    stored = load_file(base / "model.safetensors")
    stored["lm_head.weight"] = (
        stored["lm_head.weight"][:1].expand(20, 32).contiguous() if alike else stored["lm_head.weight"]
    )
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    old, new = cast(TokenizerPieces, range(20)), cast(TokenizerPieces, range(2020))
    extension = VocabularyExtension(Checkpoint(base), 2020, "multivariate", old, new)
    monkeypatch.setattr("lightning_mixcn.model.loading.find_extension", lambda *args, **kwargs: extension)
    rows = weight(load_mixtral(base, train_embeddings=True, dtype="float32"), "lm_head").detach().double()
    mean, deviations = rows[:20].mean(0), rows[20:] - rows[:20].mean(0)
    plane = torch.linalg.svd(rows[:20] - mean, full_matrices=False)[2][: 0 if alike else 19]
    outside = deviations - deviations @ plane.T @ plane
    assert float(outside.norm()) < 1e-4 * float(rows[:20].std()) * rows[20:].numel() ** 0.5
    assert alike or float(deviations.std()) == pytest.approx(float((rows[:20] - mean).std()), rel=0.05)


def trained(base: Path, tokenizer: Path, folder: Path) -> MoePeftModel:
    """Return an extended model with random factors and moved embeddings, saved as a run does."""
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
    model = load_mixtral(
        base, quantization="none", dtype="float32", lora=lora, train_embeddings=True, tokenizer=tokenizer
    )
    assert isinstance(model, MoePeftModel)
    draw_trained(model, 0.05)
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return model.eval()


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids).logits
    return logits


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_what_is_saved_loads_everywhere(base: Path, extended: Path, tmp_path: Path) -> None:
    """Our own loading, a merged checkpoint in stock transformers, and stock PEFT on a resized base: one model."""
    model = trained(base, extended, tmp_path / "adapter")
    rows = model.config.vocab_size
    ids = torch.randint(3, rows, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = logits_of(model, ids)
    assert expected.shape == (2, 40, rows)
    found = find_model(str(tmp_path / "adapter"))
    assert_close(logits_of(load_found(found, quantization="none", dtype="float32"), ids), expected)
    export(str(tmp_path / "adapter"), str(tmp_path / "out"))
    merged: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(merged[1].values())
    assert merged[0].config.vocab_size == rows
    assert_close(logits_of(merged[0].float(), ids), expected)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == rows
    assert Checkpoint(base).sha256 == found.base.sha256
    stored = load_file(tmp_path / "out/model.safetensors")
    assert (
        sum(tensor.nbytes for tensor in stored.values())
        == sum(entry.stat().st_size for entry in (tmp_path / "out").glob("*.safetensors"))
        - int.from_bytes((tmp_path / "out/model.safetensors").read_bytes()[:8], "little")
        - 8
    )
    # And once more: the merged model is a base like any other.
    again = load_mixtral(tmp_path / "out", quantization="none", dtype="float32", tokenizer=extended)
    assert_close(logits_of(again, ids), expected)


# PEFT's own conversion of w1 and w3 to the fused layout leaves patterns for what was not adapted.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
def test_stock_peft_loads_the_adapter_on_a_resized_base(tiny: Path, tmp_path: Path) -> None:
    model = trained(tiny, extend(tiny, tmp_path / "t", HAN, 90), tmp_path / "adapter")
    rows = model.config.vocab_size
    export(str(tmp_path / "adapter"), str(tmp_path / "out"), format="peft")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert f"base.resize_token_embeddings({rows}, mean_resizing=False)" in card
    base: Any = transformers.MixtralForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    base.resize_token_embeddings(rows, mean_resizing=False)
    ids = torch.arange(3, rows).view(1, -1)
    assert_close(logits_of(peft.PeftModel.from_pretrained(base, str(tmp_path / "out")), ids), logits_of(model, ids))


MODES: tuple[NewRows, ...] = ("byte_mean", "multivariate", "random")


def sharded(base: str, tokenizer: str) -> list[Tensor]:
    """Embedding and head of each mode, loaded in shares and put together."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("shard",))
    lora = peft.LoraConfig(r=2, target_modules=["w1"])
    load = partial(load_mixtral, base, tokenizer=tokenizer, lora=lora, train_embeddings=True)
    models = [load(new_rows=mode, shard=partial(shard_model, mesh=mesh)) for mode in MODES]
    return [full_tensor(weight(model, name)) for model in models for name in NAMES]


@pytest.mark.multiprocess
@pytest.mark.parametrize("has_spare_rows", [False, True])
def test_shares_are_those_of_the_whole(tiny: Path, tmp_path: Path, has_spare_rows: bool) -> None:
    base = tiny
    if has_spare_rows:  # of which the second rank has all that are taken, and the third none
        base = qwen_like(save_tiny_model(tmp_path / "base", "qwen3_moe", vocab_size=SPARE))
    tokenizer = extend(base, tmp_path / "t", HAN, 91)
    models = [load_moe(base, tokenizer=tokenizer, new_rows=mode, train_embeddings=True) for mode in MODES]
    whole = [weight(model, name) for model in models for name in NAMES]
    assert len(whole[0]) % 3  # so that the last rank has fewer rows
    for rank in run_distributed(sharded, 3, str(base), str(tokenizer)):
        assert all(map(torch.equal, rank, whole))


def edit(file: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def test_bad_tokenizers_are_refused(tiny: Path, tmp_path: Path) -> None:
    tokenizer = extend(tiny, tmp_path / "t", HAN, 90)
    with pytest.raises(ValueError, match=r"needs 3\d\d rows .* the base has 272: .* Set `train_embeddings: true`"):
        load_mixtral(tiny, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"`new_rows='average'` is not known. Expected one of mean, byte_mean"):
        load_mixtral(tiny, tokenizer=tokenizer, new_rows="average", train_embeddings=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has 259 pieces, fewer than the 3\d\d of the base"):
        load_mixtral(_with_tokenizer(tiny, tokenizer, tmp_path / "larger"), tokenizer=tiny)
    shutil.copytree(tokenizer, tmp_path / "other")
    edit(tmp_path / "other/tokenizer.json", lambda content: _swap(content["model"]["vocab"], 10, 11))
    with pytest.raises(ValueError, match=r"does not continue the base's: id 10 is .* Extend the base's own"):
        load_mixtral(tiny, tokenizer=tmp_path / "other", train_embeddings=True)
    bare = shutil.copytree(tiny, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"272 rows, but no tokenizer that fits them .* Put the base's own tokenizer"):
        load_mixtral(bare, tokenizer=tokenizer, train_embeddings=True)
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.json nor tokenizer.model"):
        load_mixtral(tiny, tokenizer=tmp_path)


def _swap(vocabulary: dict[str, int], one: int, other: int) -> None:
    pieces = {index: piece for piece, index in vocabulary.items()}
    vocabulary[pieces[one]], vocabulary[pieces[other]] = other, one


def _with_tokenizer(base: Path, tokenizer: Path, out: Path) -> Path:
    shutil.copytree(base, out)
    shutil.copyfile(tokenizer / "tokenizer.json", out / "tokenizer.json")
    return out


def test_adapters_of_another_vocabulary_are_refused(tiny: Path, tmp_path: Path) -> None:
    small, large = extend(tiny, tmp_path / "s", HAN[:10], 45), extend(tiny, tmp_path / "l", HAN, 90)
    trained(tiny, small, tmp_path / "adapter")
    lora = peft.LoraConfig(r=4, target_modules=TARGETS)
    with pytest.raises(ValueError, match=r"has 3\d\d rows of embedding and head, `tokenizer=.*` needs 3\d\d"):
        load_mixtral(tiny, tokenizer=large, lora=lora, adapter=tmp_path / "adapter", train_embeddings=True)
    with pytest.raises(ValueError, match=r"`adapter=.*` needs 3\d\d rows .* Set `train_embeddings: true`"):
        load_mixtral(tiny, lora=lora, adapter=tmp_path / "adapter")
    other = save_tiny_mixtral(tmp_path / "wide", vocab_size=400)
    edit(tmp_path / "adapter/adapter_config.json", lambda config: config.update(base_model_name_or_path=str(other)))
    (tmp_path / "adapter/base_identity.json").unlink()
    with pytest.raises(ValueError, match=r"model\.embed_tokens has the shape \[3\d\d, 32\], the base has \[400, 32\]"):
        export(str(tmp_path / "adapter"), str(tmp_path / "out"))
