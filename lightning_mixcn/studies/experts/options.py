"""How the command ``experts`` chooses experts. Imports neither torch nor numpy: it is part of the command's help."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from lightning_mixcn.arguments import Between, Name, Seed, check_arguments
from lightning_mixcn.errors import UserError, did_you_mean


@dataclass(frozen=True)
class ChoiceOptions:
    """Which experts a training adapts: a file for `model.init_args.train_only`.

    Args:
        choose: Experts to choose: a whole number is so many in each layer; less than 1 is a share of all the model's
            experts, the best of all layers together, so that some layers have more than others, or none. null chooses
            none. Of equal experts the one of the lower layer and number comes first.
        choose_by: Measure of an expert: ``importance``, bits per byte that the source loses without it (masked, or
            zeroed where that alone was measured); ``saliency``, REAP's, over its layer's mean; ``load``, its share of
            the source's choices in its layer; ``divergence``, how much larger that share is than another source's;
            ``random``.
        choose_for: Name of the source, e.g. zh; null is the first.
        choose_against: Source that `choose_by` divergence compares with; null is the other one of two.
        choose_seed: Seed of `choose_by` random.
    """

    choose: Annotated[float, Between(0, 10**4, "experts a layer, or a share below 1", excluded=(0,))] | None = None
    choose_by: Literal["importance", "saliency", "load", "divergence", "random"] = "importance"
    choose_for: Name | None = None
    choose_against: Name | None = None
    choose_seed: Seed = 0

    def __post_init__(self) -> None:
        """Check what does not depend on the model."""
        check_arguments(ChoiceOptions, vars(self))
        if self.choose is None:
            for name in ("choose_for", "choose_against"):
                if getattr(self, name) is not None:
                    raise UserError(f"`{name}` is for `choose`, which is not given. Give both, or leave it out")
        elif self.choose > 1 and self.choose != int(self.choose):
            raise UserError(f"`choose={self.choose}`: expected a whole number of experts a layer, or a share below 1")
        if self.choose_against is not None and self.choose_by != "divergence":
            raise UserError("`choose_against` is for `choose_by` divergence. Leave it out")

    def sources(self, names: Sequence[str], num_experts: int, measures: Collection[str]) -> tuple[str, str | None]:
        """Return the source to choose for, and the one to compare with.

        Args:
            names: Names of the sources that were measured.
            num_experts: Experts of a layer.
            measures: Values of `choose_by` for which there are figures.

        Raises:
            ValueError: what was measured does not have what is asked for.
        """
        if self.choose is not None and self.choose > num_experts:
            raise UserError(
                f"`choose={self.choose:g}`: a layer has {num_experts} experts. Give at most that, or a share below 1"
            )
        if self.choose_by not in measures:
            raise UserError(
                f"`choose_by={self.choose_by}` was not measured there. Use {', '.join(measures)}, or a study that "
                "disables experts"
            )
        for name in ("choose_for", "choose_against"):
            if (given := getattr(self, name)) is not None and given not in names:
                near = did_you_mean(given, names)
                raise UserError(f"`{name}={given!r}` is no source there{near}. Expected one of {', '.join(names)}")
        source = self.choose_for or names[0]
        if self.choose_by != "divergence":
            return source, None
        others = [name for name in names if name != source]
        if self.choose_against == source or not others:
            raise UserError(f"`choose_by=divergence` compares {source!r} with another source. Give two, which differ")
        if self.choose_against is None and len(others) > 1:
            raise UserError(f"`choose_against` is needed: expected one of {', '.join(others)}")
        return source, self.choose_against or others[0]
