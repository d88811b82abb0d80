"""The third demo: the assistant of the second one learns which of two answers is preferred."""

import hashlib
import json
import shutil
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_mixcn.errors import MissingFileError
from lightning_mixcn.files.atomic import write_json
from lightning_mixcn.studies.significance import pairs_to_tell_from_chance, wilson_interval
from lightning_mixcn.studies.tables import aligned

from . import fetch, instruct
from .base import (
    CACHE,
    Demo,
    announce,
    config,
    cost_rows,
    make_base,
    reuse_or_make,
    show_results,
)

# configs/demo_preference.yaml names these, too.
RUN = Path("runs/demo_preference")
PREFERENCES = CACHE / "preferences"
PACKAGES = (fetch.BASE, fetch.INSTRUCTIONS)

_CONFIG = "demo_preference.yaml"
_MEMBER = "llamafactory-0.9.5/data/dpo_zh_demo.json"
_SAYS = (
    "This teaches what `make demo-instruct` made which of two Chinese answers is preferred: about 9 minutes on two\n"
    f"cores, at most 6 GB of memory, under {RUN}."
)
_QUESTION = "请列出三种健康的食物。"
_CHAT_TOKENS = 80
_HELD_OUT_SHARE = 0.5


def run_preference_demo() -> dict[str, Any]:
    """Fetch pairs, split them by prompt, train the adapter of the instruct demo, chat; write and print the report.

    Returns:
        The content of ``runs/demo_preference/report.json``.

    Raises:
        FileNotFoundError: there is no adapter of `make demo-instruct`.
        ConnectionError: a package could not be downloaded.
        CommandFailed: a ``mixcn`` command ended with an error.
        ValueError: a package is not what it should be.
    """
    if not (instruct.RUN / "adapter").is_dir():
        raise MissingFileError(f"there is no {instruct.RUN / 'adapter'}, which goes on here. Run `make demo-instruct`")
    start, demo = time.perf_counter(), Demo(steps=6)
    announce(_SAYS, PACKAGES)
    files = demo.step("fetch", "Fetching base and pairs", lambda: fetch.fetch(CACHE / "downloads", PACKAGES))
    make_base(demo, files[fetch.BASE.name])
    demo.step("pairs", "Splitting pairs by prompt", lambda: _make_pairs(files[fetch.INSTRUCTIONS.name]))
    shutil.rmtree(RUN, ignore_errors=True)
    facts = demo.step(
        "fit", "DPO on attention, router and every expert; held-out pairs after it", lambda: demo.fit(RUN, _CONFIG)
    )
    demo.step("chat", "Asking it", lambda: _chat(demo))
    demo.seconds["total"] = time.perf_counter() - start
    settings = yaml.safe_load(config(_CONFIG).read_text(encoding="utf-8"))["model"]["init_args"]
    figures = facts["validations"][-1]["sources"]["zh"]
    report = {
        "held_out": held_out_figures(figures, settings["beta"]),
        "answers": answer_lengths(RUN),
        "seconds": demo.seconds,
        "peak_rss_bytes": demo.peak_rss_bytes,
    }
    write_json(RUN / "report.json", report)
    _show(report)
    return report


def split_by_prompt(
    records: Sequence[dict[str, Any]], held_out_share: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split pairs into training and held-out ones by a hash of the prompt, so that pairs of one prompt stay together.

    Args:
        records: Records with ``conversations``, ``chosen`` and ``rejected``.
        held_out_share: Share of the prompts that are held out.
    """
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for record in records:
        prompt = json.dumps(record["conversations"], ensure_ascii=False).encode()
        place = int.from_bytes(hashlib.sha256(prompt).digest()[:8]) / 2**64
        parts[place < held_out_share].append(record)
    return parts


def held_out_figures(figures: Mapping[str, float], beta: float) -> dict[str, Any]:
    """Return what is told of the held-out pairs.

    Args:
        figures: Those of one source, see `pair_figures`, after training.
        beta: β of the loss.

    Returns:
        ``pairs``, ``accuracy`` with its Wilson interval of 95 %, ``pairs_to_tell``, how many would tell this accuracy
        from chance, ``reward_margin``, and log-probabilities of both sides ``before`` and ``after``, in nats a token.
    """
    pairs, accuracy = round(figures["pairs"]), figures["accuracy"]
    told = {"pairs": pairs, "accuracy": accuracy, "interval": list(wilson_interval(accuracy, pairs))}
    sides = {}
    for side in ("chosen", "rejected"):
        after = -figures[f"nll_{side}_nats_per_token"]
        # A reward is β times how much an answer's log-probability has grown.
        grown = figures[f"reward_{side}"] / beta / figures[f"answer_tokens_{side}"]
        sides[side] = {"before": after - grown, "after": after}
    return {
        **told,
        "pairs_to_tell": pairs_to_tell_from_chance(accuracy),
        "reward_margin": figures["reward_margin"],
        "log_probability_nats_per_token": sides,
        "kl_nats_per_token": {side: figures[f"kl_{side}_nats_per_token"] for side in sides},
    }


def answer_lengths(run: Path) -> dict[str, float]:
    """Return the mean number of characters of the answers that `SampleAnswers` saw, at its first and its last step."""
    lines = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    first, last = (which(line["step"] for line in lines) for which in (min, max))
    lengths = {step: [len(line["answer"]) for line in lines if line["step"] == step] for step in (first, last)}
    return {name: sum(lengths[step]) / len(lengths[step]) for name, step in (("before", first), ("after", last))}


def preference_summary(report: Mapping[str, Any]) -> str:
    """Return the table that is printed at the end, of a report as `run_preference_demo` makes it."""
    held_out, answers = report["held_out"], report["answers"]
    lines = [["held-out pairs", "before", "after", ""]]
    for side, values in held_out["log_probability_nats_per_token"].items():
        before, after = values["before"], values["after"]
        lines.append([f"log-probability of {side}", f"{before:.3f}", f"{after:.3f}", "nats a token"])
    lines.append(["reward margin", "0.000", f"{held_out['reward_margin']:.3f}", ""])
    low, high = held_out["interval"]
    lines.append(["accuracy", "no rewards", f"{held_out['accuracy']:.3f}", f"{low:.3f} to {high:.3f} (95 %)"])
    divergence = ", ".join(f"{value:.4f} {side}" for side, value in held_out["kl_nats_per_token"].items())
    facts = [
        ["accuracy", _verdict(held_out)],
        ["from the reference", f"{divergence}, nats a token (k2)"],
        ["its own answers", f"{answers['before']:.0f} characters before, {answers['after']:.0f} after"],
    ]
    return f"{aligned(lines, left=(0,))}\n\n{aligned([*facts, *cost_rows(report)])}"


def _verdict(held_out: Mapping[str, Any]) -> str:
    pairs, (low, high) = held_out["pairs"], held_out["interval"]
    right = f"{round(held_out['accuracy'] * pairs)} of {pairs} held-out pairs right"
    if low > 0.5:
        return f"{right}: more than chance"
    if high < 0.5:
        return f"{right}: less than chance"
    needed = held_out["pairs_to_tell"]
    return f"{right}: not told from chance, 0.5" + (
        "" if needed is None else f"; {needed} pairs would tell this accuracy from it"
    )


def _make_pairs(archive: Path) -> bool:
    """Make ``train.json`` and ``held_out.json`` in `PREFERENCES`; return whether they were there already."""

    def make(out: Path) -> None:
        with tarfile.open(archive) as members:
            file = members.extractfile(_MEMBER)
            assert file is not None, "a sha256 says what the archive holds"
            records = json.loads(file.read())
        for name, part in zip(("train", "held_out"), split_by_prompt(records, _HELD_OUT_SHARE), strict=True):
            write_json(out / f"{name}.json", part)

    made_from = {"archive": fetch.INSTRUCTIONS.sha256, "held_out_share": str(_HELD_OUT_SHARE)}
    return reuse_or_make(PREFERENCES, made_from, make)


def _chat(demo: Demo) -> None:
    print(f"> {_QUESTION}", flush=True)
    demo.mixcn("chat", RUN, f"--max_new_tokens={_CHAT_TOKENS}", typed=f"{_QUESTION}\n")


def _show(report: Mapping[str, Any]) -> None:
    """Print answers, figures and where to look further."""
    print("\nAnswers before and after, as they came: see", RUN / "answers.jsonl")
    show_results(preference_summary(report), RUN)
