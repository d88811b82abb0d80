import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mixcn.data.loaders import batch_tensors


def arrays() -> dict[str, np.ndarray]:
    return {"input_ids": np.arange(6).reshape(2, 3), "document_ids": np.zeros((2, 3), dtype=np.int32)}


def test_without_cuda_nothing_is_copied() -> None:
    given = arrays()
    made = batch_tensors(given)
    assert {name: tensor.dtype for name, tensor in made.items()} == {
        "input_ids": torch.int64,
        "document_ids": torch.int32,
    }
    given["input_ids"][0, 0] = 7
    assert made["input_ids"].tolist() == [[7, 1, 2], [3, 4, 5]]


def test_where_cuda_is_in_use_memory_is_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 100)
    made = batch_tensors(arrays())
    assert made["input_ids"].tolist() == [[100, 101, 102], [103, 104, 105]]
    assert made["document_ids"].tolist() == [[100] * 3] * 2


@pytest.mark.gpu
def test_page_locked_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    torch.cuda.init()
    made = batch_tensors(arrays())
    assert all(tensor.is_pinned() for tensor in made.values())
    assert made["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
