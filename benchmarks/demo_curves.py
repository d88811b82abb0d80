"""The picture in the README: loss and learning rate of the demo's run, read from its TensorBoard files.

python benchmarks/demo_curves.py --run runs/demo      (needs matplotlib)
"""

import argparse
from pathlib import Path

import record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def main() -> None:
    """Write results/demo_curves.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/demo", help="folder of the run")
    run = Path(parser.parse_args().run)
    files = sorted(run.glob("tensorboard/**/events.*"))
    if not files:
        raise FileNotFoundError(f"`run={str(run)!r}` holds no TensorBoard file. Run `make demo` first")
    import matplotlib.pyplot as plt

    events = EventAccumulator(str(files[-1].parent))
    events.Reload()
    tags = ["train/nll_nats_per_token", "train/gradient_norm", next(t for t in events.Tags()["scalars"] if "lr-" in t)]
    figure, axes = plt.subplots(1, len(tags), figsize=(12, 3), layout="constrained")
    for axis, tag in zip(axes, tags, strict=True):
        scalars = events.Scalars(tag)
        axis.plot([scalar.step + 1 for scalar in scalars], [scalar.value for scalar in scalars], marker=".")
        axis.set(title=tag, xlabel="optimizer step", ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.savefig(record.RESULTS / "demo_curves.png", dpi=80)


if __name__ == "__main__":
    main()
