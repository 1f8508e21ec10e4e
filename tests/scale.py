"""Planning and rendering at COCO's size: 118,287 images, of which all but a few are links.

    python tests/scale.py FOLDER [--coco ROOT --split SPLIT] [--images 118287] [--render 3000]

makes the dataset in FOLDER once, and prints seconds and peak memory of every step. Each step runs
in a process of its own, so that its peak is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from panoptic_cache.pipeline.base.files import Storage
from panoptic_cache.pipeline.coco import CocoLayout, read_dataset
from panoptic_cache.pipeline.render.driver import render
from panoptic_cache.pipeline.render.plan import RenderConfig, make_plan
from panoptic_cache.pipeline.scenes.scene import write_dataset

COCO_IMAGES = 118_287
"""Of COCO's train2017."""
SPLIT = "train"


def write_links(source: CocoLayout, root: Path, images: int) -> CocoLayout:
    """Repeats a dataset under new ids: real annotations, and links in the place of pictures.

    Args:
        source: A few real images.
        root: New root, in COCO's layout.
        images: How many to make of them.
    """
    content = json.loads(source.panoptic_json.read_bytes())
    annotations = {row["image_id"]: row for row in content["annotations"]}
    photos, annotated = root / SPLIT, root / "annotations" / f"panoptic_{SPLIT}"
    photos.mkdir(parents=True)
    annotated.mkdir(parents=True)
    target = root / "annotations" / f"panoptic_{SPLIT}.json"
    rows: dict[str, list[str]] = {"images": [], "annotations": []}
    for number in range(images):
        image = content["images"][number % len(content["images"])]
        annotation = annotations[image["id"]]
        key = 4 * number + 9
        photo, png = f"{key:012d}.jpg", f"{key:012d}.png"
        (photos / photo).hardlink_to((source.images / image["file_name"]).resolve())
        (annotated / png).hardlink_to((source.panoptic_dir / annotation["file_name"]).resolve())
        # The real file's rows: more than what is read.
        url = f"http://images.cocodataset.org/train2017/{photo}"
        new = {**image, "id": key, "file_name": photo, "license": 3, "coco_url": url}
        new |= {"date_captured": "2013-11-14 11:18:45", "flickr_url": url}
        rows["images"].append(json.dumps(new))
        # Indented, as only this makes eleven segments an image as large as the real file.
        row = {**annotation, "image_id": key, "file_name": png}
        rows["annotations"].append(json.dumps(row, indent=2))
    with target.open("w") as file:
        file.write('{"categories": ' + json.dumps(content["categories"]))
        for name, lines in rows.items():
            file.write(f', "{name}": [\n' + ",\n".join(lines) + "]")
        file.write("}")
    return CocoLayout.of(root, SPLIT)


def family_memory(pid: int) -> tuple[int, int]:
    """Bytes resident in a process, and in the largest of its descendants."""
    process = psutil.Process(pid)
    below = [0]
    for child in process.children(recursive=True):
        try:
            below.append(child.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return process.memory_info().rss, max(below)


def measured(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Runs a function in a process of its own: its result, its seconds and its memory in MB."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments))
    own: list[int] = []
    workers: list[int] = []
    process.start()
    sender.close()
    while process.is_alive():
        try:
            first, second = family_memory(process.pid or 0)
        except psutil.NoSuchProcess:
            break
        own.append(first)
        workers.append(second)
        time.sleep(0.05)
    process.join()
    result: dict[str, Any] = receiver.recv()
    return result | {"peak_mb": max(own) >> 20, "peak_worker_mb": max(workers) >> 20}


def _send(sender: Any, work: Callable[..., dict[str, Any]], arguments: Sequence[Any]) -> None:
    sender.send(work(*arguments))


def plan_step(root: Path) -> dict[str, Any]:
    """Reads and plans the whole split."""
    start = time.monotonic()
    dataset = read_dataset(CocoLayout.of(root, SPLIT))
    read = time.monotonic()
    plan = make_plan(dataset, SPLIT, RenderConfig())
    return {
        "images": len(dataset.records),
        "shards": len(plan.shards),
        "read_s": round(read - start, 2),
        "plan_s": round(time.monotonic() - read, 2),
        "resident_mb": psutil.Process().memory_info().rss >> 20,
    }


def render_step(root: Path, out: Path, images: int, workers: int) -> dict[str, Any]:
    """Renders the first images with the driver holding the whole split; see `growth`."""
    dataset = read_dataset(CocoLayout.of(root, SPLIT))
    first = dataset.spread(images)
    resident: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            resident.append(psutil.Process().memory_info().rss >> 20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = render(first, SPLIT, Storage(str(out)), RenderConfig(), workers=workers)
    finally:
        done.set()
        watcher.join()
    middle = resident[len(resident) // 4 :]
    return {
        "images": result.written,
        "seconds": result.seconds,
        "images_per_s": round(result.written / result.seconds, 1),
        "driver_mb_early": middle[0] if middle else 0,
        "driver_mb_late": middle[-1] if middle else 0,
    }


def main() -> None:
    """Parses the arguments and prints a JSON object for each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--coco", type=Path)
    parser.add_argument("--split", default="val2017")
    parser.add_argument("--images", type=int, default=COCO_IMAGES)
    parser.add_argument("--render", type=int, default=3000)
    parser.add_argument("--workers", type=int, nargs="*", default=[2])
    options = parser.parse_args()
    root = options.folder / "coco"
    if not root.exists():
        source = options.folder / "source"
        if options.coco is None:
            write_dataset(source, images=16, val_images=1, seed=0, size=640)
        few = CocoLayout.of(options.coco or source, options.split if options.coco else "train")
        write_links(few, root, options.images)
    size = CocoLayout.of(root, SPLIT).panoptic_json.stat().st_size
    show("annotations", {"mb": size >> 20})
    show("plan", measured(plan_step, root))
    for workers in options.workers:
        out = options.folder / "cache"
        shutil.rmtree(out, ignore_errors=True)
        if options.render:
            show(
                f"render, {workers} workers",
                measured(render_step, root, out, options.render, workers),
            )


def show(step: str, values: dict[str, Any]) -> None:
    """Prints a line."""
    sys.stdout.write(json.dumps({"step": step, **values}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
