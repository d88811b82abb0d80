"""Arms against the first one, seed by seed: is what separates them more than the spread of the seeds?"""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_mixcn.studies.significance import Interval, mean_interval
from lightning_mixcn.studies.tables import markdown_table

Rows = Sequence[Mapping[str, Any]]

# Of pairs of answers, what means the same whatever loss a model was trained by, and its short name.
PAIR_FIGURES = {
    "accuracy_by_likelihood": "accuracy",
    "likelihood_margin_nats_per_token": "margin",
    "nll_chosen_nats_per_token": "nll of chosen",
}


def arm_names(results: Rows) -> list[str]:
    """Return the arms in the recipe's order; the first one is the reference."""
    return list(dict.fromkeys(result["arm"] for result in results))


def has_pairs(results: Rows) -> bool:
    """Tell whether pairs of answers were evaluated; studies from before there were any do not say so."""
    return all(found.get("pairs") for result in results for found in result["sources"].values())


def _final_figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Return what is compared of a run at its end: bits per byte by source, and figures of pairs of answers."""
    found = {}
    for source, figures in result["sources"].items():
        found[source] = figures["after"]
        found |= {f"{source} {PAIR_FIGURES[name]}": ends["after"] for name, ends in figures.get("pairs", {}).items()}
    return found


def differences_from_reference(results: Rows) -> dict[str, dict[str, Interval]]:
    """Return the difference of each arm's final figures from the reference's, with its 95 % t interval.

    Args:
        results: Results of each run, see `run_result`.

    Returns:
        For each arm but the first an interval by figure, over the seeds that both have; nothing for one seed. The name
        of a source is the figure of its bits per byte.
    """
    of_run = {(run["arm"], run["seed"]): _final_figures(run) for run in results}
    reference, *others = arm_names(results)
    found = {}
    for arm in others:
        seeds = [seed for name, seed in of_run if name == arm and (reference, seed) in of_run]
        if len(seeds) > 1:
            found[arm] = {
                figure: mean_interval([of_run[arm, seed][figure] - of_run[reference, seed][figure] for seed in seeds])
                for figure in _final_figures(results[0])
            }
    return found


def differences_table(results: Rows) -> str:
    """Return a table of the differences in Markdown, and how to read it; for one seed, that there is none."""
    differences, (reference, *_) = differences_from_reference(results), arm_names(results)
    if not differences:
        return f"With one seed there is no interval: whether an arm is better than {reference!r} cannot be told."
    lines = [
        [arm, figure, f"{found.difference:+.4f}", f"{found.low:+.4f} to {found.high:+.4f}", _mark(found)]
        for arm, of_figure in differences.items()
        for figure, found in of_figure.items()
    ]
    return (
        f"Final figures less those of {reference!r} under the same seed: mean, and 95 % t interval with n - 1 degrees "
        "of freedom for n seeds. An arm is separated where the interval leaves out 0; intervals are not corrected for "
        f"their number.\n\n{markdown_table([[f'less {reference}', 'of', 'difference', '95 %', 'separated'], *lines])}"
    )


def _mark(found: Interval) -> str:
    return "yes" if found.separated else "no"


def differences_as_json(results: Rows) -> dict[str, Any]:
    """Return the same as plain values: the reference, and by arm and figure ``difference``, ``low``, ``high``, …."""
    return {
        "reference": arm_names(results)[0],
        "confidence": 0.95,
        "arms": {
            arm: {figure: found._asdict() | {"separated": found.separated} for figure, found in of_figure.items()}
            for arm, of_figure in differences_from_reference(results).items()
        },
    }


def is_trained(results: Rows) -> bool:
    """Tell whether the arms were trained, or validated as they were."""
    return any(len(found["curve"]) > 1 for result in results for found in result["sources"].values())


ABOUT_ONE_TEXT = (
    "No seed plays a part, so there is no interval: differences are exact for this text, and say nothing of another."
)


def untrained_table(results: Rows) -> str:
    """Return a table in Markdown of arms without training: bits per byte, and those less the first arm's."""
    sources, reference = list(results[0]["sources"]), results[0]
    head = ["arm", *(f"{source}{part}" for source in sources for part in ("", f" less {reference['arm']}"))]
    lines = []
    for run in results:
        lines.append([run["arm"]])
        for source in sources:
            value = run["sources"][source]["after"]
            lines[-1] += [f"{value:.4f}", f"{value - reference['sources'][source]['after']:+.4f}"]
    return markdown_table([head, *lines])


def draw_differences(axis: Any, differences: Mapping[str, Mapping[str, Interval]], source: str, reference: str) -> None:
    """Draw a source's differences as points with error bars, an arm a line.

    Args:
        axis: Matplotlib's axes.
        differences: Those of all arms but the reference.
        source: Source to draw.
        reference: Name of the reference arm.
    """
    for place, found in enumerate(of_arm[source] for of_arm in differences.values()):
        # The curves' colours, whose first one is the reference's.
        axis.errorbar(
            found.difference, -place, xerr=found.high - found.difference, fmt="o", capsize=4, color=f"C{place + 1}"
        )
    axis.axvline(0, color="gray", linewidth=1)
    axis.set_yticks([-place for place in range(len(differences))], list(differences), fontsize="small")
    axis.set_ylim(-len(differences) + 0.5, 0.5)
    axis.locator_params(axis="x", nbins=4)
    axis.set_xlabel(f"final bits per byte less those of {reference}, 95 %", fontsize="small")
    axis.grid(alpha=0.3)


def draw_likelihoods(axis: Any, results: Rows, source: str) -> None:
    """Draw a source's bits per byte as points, an arm a line: of arms without training.

    Args:
        axis: Matplotlib's axes.
        results: Results of each run, see `run_result`.
        source: Source to draw.
    """
    arms = arm_names(results)
    for place, result in enumerate(results):
        axis.plot(result["sources"][source]["after"], -place, "o")
    axis.set_yticks([-place for place in range(len(arms))], arms, fontsize="small")
    axis.locator_params(axis="x", nbins=4)
    axis.set_xlabel("bits per byte, held out", fontsize="small")
    axis.grid(alpha=0.3)
