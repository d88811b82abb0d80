"""Keep the model near its base on some sources, by the divergence of their next-token distributions.

Legend: B rows, S positions of a row, R rows with tokens that are compared, N compared tokens, H hidden.
"""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from lightning_mixcn.arguments import Between, Filled, Name
from lightning_mixcn.errors import UserError, did_you_mean
from lightning_mixcn.metrics import scored_positions
from lightning_mixcn.metrics.likelihood import per_position

from .causal_lm import CausalLMOutput, base_of
from .reference import as_base
from .sharding import is_sharded


class KLToBase(TypedDict):
    """Divergence that is added to the loss.

    Args:
        sources: Names of the sources whose tokens are compared.
        coefficient: Weight of the divergence beside the negative log-likelihood of the same token; 0 leaves it out.
    """

    sources: Annotated[list[Name], Filled("the name of at least one source")]
    coefficient: Annotated[float, Between(0, 1000)]


class BaseStates(NamedTuple):
    """What the base says of a micro-batch.

    Args:
        hidden: States that predict the compared tokens, ``[N, H]`` in the compute dtype.
        place: Places of the compared tokens in the flattened micro-batch, ``[N]`` int64.
    """

    hidden: Tensor
    place: Tensor


class BaseDivergence:
    """KL(base ‖ model) of next-token distributions, on the labelled tokens of some sources (arXiv 2605.29498).

    The base is the model itself with its adapters off, in evaluation mode: it takes no memory of its own, and one more
    forward pass, without gradients, of the rows that hold such tokens. It comes before the model's own pass, when no
    activations are kept yet. Head and embeddings are frozen, so that the base's are the model's.

    Args:
        settings: What to compare.
        names: Names of the sources that ``source_ids`` counts.
        model: The PeftModel.
        strategy: Lightning's strategy.

    Raises:
        ValueError: there is no source of that name.
    """

    def __init__(self, settings: KLToBase, names: Sequence[str], model: nn.Module, strategy: Any) -> None:
        for index, name in enumerate(settings["sources"]):
            if name not in names:
                raise UserError(
                    f"`kl_to_base.sources[{index}]={name!r}` is no source{did_you_mean(name, names)}. The data have "
                    f"{', '.join(names)}"
                )
        self._numbers = sorted(names.index(name) for name in settings["sources"])
        self.coefficient, self._model, self._strategy = settings["coefficient"], model, strategy

    def base_states(self, batch: dict[str, Tensor]) -> BaseStates | None:
        """Run the base on the rows that hold tokens of the sources; ``None`` if there are none.

        Where parameters are sharded, a rank without such rows gathers them with the others, for a single token.
        """
        labels_BS = batch["labels"]
        source_BS = per_position(batch["source_ids"], labels_BS)
        compared_BS = scored_positions(labels_BS) & torch.isin(
            source_BS, torch.tensor(self._numbers, dtype=source_BS.dtype, device=source_BS.device)
        )
        row_R = compared_BS.any(1).nonzero()[:, 0]
        is_wanted = len(row_R) > 0
        if is_sharded(self._model):
            is_wanted = self._strategy.reduce_boolean_decision(is_wanted, all=False)
        if not is_wanted:
            return None
        ids, positions = (
            batch[name][row_R] if len(row_R) else batch[name][:1, :1] for name in ("input_ids", "position_ids")
        )
        with as_base(self._model), torch.autocast(ids.device.type, enabled=False):
            states = base_of(self._model).decode(ids, position_ids=positions).last_hidden_state
        place_N = compared_BS.flatten().nonzero()[:, 0]
        of_rows_N = compared_BS[row_R].flatten().nonzero()[:, 0]
        return BaseStates(states.flatten(0, 1)[of_rows_N - 1], place_N)

    def per_token(self, output: CausalLMOutput, base: BaseStates) -> Tensor:
        """Return the divergence in nats at each label, float32 ``[B, S]``, 0 where nothing is compared."""
        assert output.nll is not None
        assert output.last_hidden_state is not None
        hidden_NH = output.last_hidden_state.flatten(0, 1)[base.place - 1]
        kl_N = base_of(self._model).lm_head(hidden_NH, reference=base.hidden)
        return torch.zeros_like(output.nll).flatten().index_add(0, base.place, kl_N).view_as(output.nll)


def check_kl_to_base(settings: KLToBase | None, train_embeddings: bool) -> None:
    """Refuse to compare with a base whose embeddings are gone. Raises: ValueError.

    Args:
        settings: As in `BaseDivergence`.
        train_embeddings: As in `CausalLMModule`.
    """
    if settings and settings["coefficient"] and train_embeddings:
        raise UserError(
            "`kl_to_base` compares with the base, but `train_embeddings: true` trains the base's own embeddings and "
            "head. Leave one of them out"
        )
