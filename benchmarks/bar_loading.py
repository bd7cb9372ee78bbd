"""How fast pictures come: 1,000 JPEGs of 500 pixels to 224, two cores, beside the build before, and what a loop waits.

Both builds' `Batches` read the same folder for five epochs, in processes that take turns; the other build is a checkout
that sees the same libraries. The first epoch decodes, later ones take what was kept, so both are told. Keep the machine
quiet. Some three minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PICTURES, PIXELS, BATCH = 1000, 500, 50
EPOCHS, TURNS = 5, 3
STEP = 0.2  # seconds that a step of the network takes


def main() -> int:
    """Run the bars; 0 if all are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # the process on one of the builds
    parser.add_argument("--step", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.read, arguments.step)))
        return 0
    from benchmarks.bar_choice import OLD, checkout  # not above: the other build has no such benchmark
    from benchmarks.common import write_result

    with tempfile.TemporaryDirectory() as folder, checkout(OLD) as old:
        paint(Path(folder))
        seconds: dict[str, list[list[float]]] = {"before": [], "now": []}
        for _ in range(TURNS):
            seconds["before"].append(child(old, Path(folder))["epochs"])
            seconds["now"].append(child(ROOT, Path(folder))["epochs"])
        trained = child(ROOT, Path(folder), STEP)
    best = {build: min(turns, key=sum) for build, turns in seconds.items()}
    speed = {build: EPOCHS * PICTURES / sum(epochs) for build, epochs in best.items()}
    waited = trained["waited"] / sum(trained["epochs"])
    bars = {
        f"at least 2 times the pictures a second over {EPOCHS} epochs": speed["now"] >= 2 * speed["before"],
        f"a loop with steps of {1000 * STEP:.0f} ms waits 10 % of the time at most": waited <= 0.1,
    }
    first = {build: PICTURES / epochs[0] for build, epochs in best.items()}
    later = {build: (EPOCHS - 1) * PICTURES / sum(epochs[1:]) for build, epochs in best.items()}
    figures = {"pictures_a_second": speed, "in_the_first_epoch": first, "in_later_epochs": later, "waited": waited}
    return write_result("loading", bars, {**figures, "seconds": seconds})


def paint(root: Path) -> None:
    """Ten classes of pictures with something to see at every scale, as photographs have, and one test picture each."""
    draw = np.random.default_rng(0)
    for part, count in (("train", PICTURES // 10), ("val", 1)):
        for label in range(10):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                image = np.zeros((PIXELS, PIXELS, 3))
                for side in (4, 20, 100, 500):
                    noise = Image.fromarray(draw.integers(0, 256, (side, side, 3), np.uint8))
                    image += np.asarray(noise.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)) / 4
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)


def child(package: Path, folder: Path, step: float = 0.0) -> dict[str, Any]:
    """What `read` gives in one of the builds."""
    command = [sys.executable, str(Path(__file__).resolve()), "--read", str(folder), "--step", str(step)]
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(command, cwd=package, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


def read(folder: Path, step: float) -> dict[str, Any]:
    """Seconds of each epoch on two cores; with `step`, how many of them the loop waited."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    import torch

    from polar_deploy import data
    from polar_deploy.config import Normalize, Settings, Training
    from polar_deploy.training import batches as made

    torch.set_num_threads(1)
    spec = data.DataSpec("bar", 10, 224, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), flip=True, crop_padding=28, epochs=1)
    dataset = data.image_folders(spec, folder, shorter=256)
    crops = {"crop_scale": 0.35} if "crop_scale" in Training.model_fields else {"crop_padding": 28}
    training = Training(batch_size=BATCH, flip=True, **crops)
    settings = Settings(model="none", data="bar", normalize=Normalize(mean=spec.mean, std=spec.std), training=training)
    train, device = dataset.train, torch.device("cpu")
    kind: Any = vars(made).get("ImageBatches", made.Batches)  # its name in the other build
    batches = kind(train.images, train.labels, np.arange(len(train.labels)), settings, device)
    epochs = []
    for epoch in range(EPOCHS):
        started = time.monotonic()
        for _ in batches.epoch(epoch):
            time.sleep(step)
        epochs.append(round(time.monotonic() - started, 3))
    return {"epochs": epochs, "waited": getattr(batches, "waited", None)}


if __name__ == "__main__":
    sys.exit(main())
