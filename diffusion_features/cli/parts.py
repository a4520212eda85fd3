"""``diffusion-features parts``: label pixels after a few labelled images, from features that ``extract`` wrote."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    import numpy as np

    from diffusion_features.store import Store
    from segmentors.pixel_classifier import Ensemble

DESCRIPTION = """\
Learn to label pixels from a few labelled images, with an ensemble of small classifiers (DatasetDDPM). Both commands
read features that 'diffusion-features extract' has written, and label maps from a folder: a PNG (mode L or P) or an
.npy array named as the image, one class number a pixel, 0 to 254; 255 counts nowhere.
"""
EXAMPLES = """\
  diffusion-features extract photos/ -o features/
  diffusion-features parts train features/ --masks labels/ -o horse.safetensors
  diffusion-features parts predict features/ --classifier horse.safetensors -o predicted/
"""
TRAIN = """\
Train a classifier on every image of FEATURES that has a label map. Killed at any moment and started again with the
same arguments, it goes on from its last 500 steps, and ends with the same classifier.
"""
TRAIN_EXAMPLES = """\
  diffusion-features parts train features/ --masks labels/ -o horse.safetensors
  diffusion-features parts train features/ --masks labels/ -o quick.safetensors --steps 500
"""
PREDICT = """\
Label every image of FEATURES, at the size of its file. For each image NAME this writes into the output folder:
  NAME.labels.png       the labels, a palette image: pixel value i is class i
  NAME.uncertainty.png  how far the classifiers disagree: 0 not at all, 255 completely
and predictions.json. Images are printed the most doubtful first: what to label next. With --masks, the IoU of each
class too. What is there already, of the same classifier and features, is not done again.
"""
PREDICT_EXAMPLES = """\
  diffusion-features parts predict features/ --classifier horse.safetensors -o predicted/
  diffusion-features parts predict test_features/ --classifier horse.safetensors -o test/ --masks test_labels/
"""
NOTE = "pixel_classifier"
SAME = ("model", "revision", "variant", "t", "attention")
"""Settings of features that those of a training and of a prediction must share."""


def add(commands: Any) -> None:
    parser = options.command(commands, "parts", "label pixels after a few labelled images", DESCRIPTION, EXAMPLES)
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    train = options.command(actions, "train", "train a classifier", TRAIN, TRAIN_EXAMPLES)
    train.add_argument("--masks", type=Path, required=True, metavar="FOLDER", help="label maps named as the images")
    train.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="the classifier (.safetensors)")
    train.add_argument("--steps", type=int, default=4000, metavar="N", help="batches of 64 pixels for each member of "
                       "the ensemble (default: %(default)s)")  # fmt: skip
    train.add_argument("--seed", type=int, default=0, help="of the training (default: 0)")
    train.add_argument("--overwrite", action="store_true", help="replace a classifier of other settings")
    train.set_defaults(run=run_train)
    predict = options.command(actions, "predict", "label images", PREDICT, PREDICT_EXAMPLES)
    predict.add_argument("--classifier", type=Path, required=True, metavar="FILE", help="what 'parts train' wrote")
    predict.add_argument("-o", "--output", required=True, type=Path, metavar="FOLDER", help="where the labels go")
    predict.add_argument("--masks", type=Path, metavar="FOLDER", help="label maps to compare with")
    predict.set_defaults(run=run_predict)
    for action in (train, predict):
        action.add_argument("features", type=Path, metavar="FEATURES", help="a folder that 'extract' wrote")
        action.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def run_train(args: argparse.Namespace) -> int:
    import numpy as np

    from diffusion_features.store import Store
    from segmentors.pixel_classifier import Ensemble, load, masks, save, train

    if args.steps < 1 or args.seed < 0:
        raise ValueError(f"--steps must be at least 1 and --seed at least 0, not {args.steps} and {args.seed}")
    store = Store.open(args.features)
    ids = _ids(store)
    labels = masks(args.masks, store)
    about = {
        "features": {name: store.settings.get(name) for name in SAME},
        "activations": {id: store.settings["activations"][id]["channels"] for id in ids},
        "images": {key: [_digest(map.tobytes()), store.record(key).get("sha256")] for key, map in labels.items()},
        "steps": args.steps, "seed": args.seed,
    }  # fmt: skip
    about = json.loads(json.dumps(about))
    if args.output.is_file() and not args.overwrite:
        _refuse_other(args.output, load(args.output)[1], about)
        print(f"{args.output} is there already, trained with these settings", file=sys.stderr)
        return 0
    classes = 1 + max(int(map[map != 255].max(initial=0)) for map in labels.values())
    ensemble = Ensemble(sum(about["activations"].values()), max(2, classes), seed=args.seed).to(_device(args.device))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint = args.output.with_name(f".{args.output.name}.{_digest(json.dumps(about).encode())[:12]}.training")
    with _progress("steps", args.steps) as done:
        losses = train(
            ensemble, lambda key: store.read(key, ids), labels, args.steps, args.seed, checkpoint=checkpoint, done=done
        )
    save(args.output, ensemble, about)
    print(
        f"{args.output}: {classes} classes, {len(labels)} of the {len(store)} images have labels, "
        f"loss {np.mean(losses[-100:]):.3f}", file=sys.stderr,
    )  # fmt: skip
    return 0


def run_predict(args: argparse.Namespace) -> int:
    import torch

    from diffusion_features.store import Store
    from segmentors.pixel_classifier import load, masks

    store = Store.open(args.features)
    ensemble, about = load(args.classifier)
    _check_features(store, about, args)
    truths = masks(args.masks, store) if args.masks else {}
    ensemble.to(_device(args.device))
    digest = _digest(args.classifier.read_bytes() + json.dumps(store.settings, sort_keys=True).encode())
    found: dict[str, float] = {}
    with _progress("images", len(store)) as done:
        for key in store:
            made = _digest(f"{digest}{store.record(key).get('sha256')}".encode())
            doubt = _doubt(args.output / f"{key}.labels.png", made)
            if doubt is None:
                with torch.no_grad():
                    doubt = _label(store, key, [*about["activations"]], ensemble, args.output, made)
            found[key] = doubt
            done()
    summary: dict[str, Any] = {"classifier": str(args.classifier), "doubt": found}
    if truths:
        summary |= _compared(args.output, truths)
    _write(args.output / "predictions.json", lambda part: part.write_text(json.dumps(summary, indent=1) + "\n"))
    _print(summary)
    print(f"{len(found)} labelled in {args.output}", file=sys.stderr)
    return 0


def _ids(store: Store) -> list[str]:
    """The activations of a store, in the order that they were written in.

    Raises:
        ValueError: the store is empty, or has what is no feature of a place in the image.
    """
    if not len(store):
        raise ValueError(f"{store.folder} has no features of any image")
    if len(store.settings["t"]) > 1:
        raise ValueError(f"{store.folder} has features of several timesteps {store.settings['t']}; extract one --t")
    ids: list[str] = store.record(next(iter(store)))["order"]
    if other := [id for id in ids if store.settings["activations"][id]["kind"] != "spatial"]:
        raise ValueError(f"{other[0]} has no place in the image: parts takes spatial activations")
    return ids


def _check_features(store: Store, about: Mapping[str, Any], args: argparse.Namespace) -> None:
    """Raise ValueError where features were made otherwise than those the classifier was trained on."""
    there = {id: store.settings["activations"][id]["channels"] for id in _ids(store)}
    if missing := [id for id, channels in about["activations"].items() if there.get(id) != channels]:
        raise ValueError(f"{args.classifier} was trained on {missing[0]}, which {args.features} does not have")
    for name, trained in about["features"].items():
        if store.settings.get(name) != trained:
            raise ValueError(
                f"{args.classifier} was trained on features with {name} {trained}, "
                f"but those in {args.features} have {store.settings.get(name)}"
            )


def _refuse_other(path: Path, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    names = {"features": "model or t", "images": "images or labels"}
    if other := [names.get(name, name) for name in wanted if there.get(name) != wanted[name]]:
        raise ValueError(
            f"{path} was trained with other settings ({', '.join(other)}): choose another file, or pass --overwrite"
        )


def _label(store: Store, key: str, ids: Sequence[str], ensemble: Ensemble, folder: Path, made: str) -> float:
    """Write the pictures of one image and return its doubt."""
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from segmentors.training_free.pictures import label_image, palette

    stored, device = store.read(key, list(ids)), next(ensemble.parameters()).device
    height, width = store.record(key)["original_size"]
    found = ensemble.predict({id: stored[id].to(device) for id in ids}, (height, width))
    most = np.log(min(ensemble.classes, len(ensemble.members)))
    shade = (found.uncertainty / most).clamp(0, 1).mul(255).round().cpu().numpy().astype(np.uint8)
    uncertainty = Image.fromarray(shade)
    _write(folder / f"{key}.uncertainty.png", lambda part: uncertainty.save(part, format="PNG"))
    names = ["background", *(f"class {i}" for i in range(1, ensemble.classes))]
    note, labels = PngInfo(), label_image(found.labels, palette(names))
    note.add_text(NOTE, json.dumps({"made": made, "doubt": found.doubt}))
    _write(folder / f"{key}.labels.png", lambda part: labels.save(part, format="PNG", pnginfo=note))
    return found.doubt


def _doubt(path: Path, made: str) -> float | None:
    """What the note in a label image says, if it was made in this way."""
    from PIL import Image

    if not path.is_file():
        return None
    with Image.open(path) as image:
        note = json.loads(image.info.get(NOTE, "{}"))
    return float(note["doubt"]) if note.get("made") == made else None


def _compared(folder: Path, truths: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """IoU of what was predicted with the label maps, brought to its size: of each class, and the mean."""
    import numpy as np
    from PIL import Image

    from diffusion_features.atlas.probing import confusion_matrix, mean_iou

    together = np.zeros((256, 256), np.int64)
    for key, truth in truths.items():
        with Image.open(folder / f"{key}.labels.png") as image:
            predicted = np.asarray(image)
        fitted = Image.fromarray(truth).resize(predicted.shape[::-1], Image.Resampling.NEAREST)
        together += confusion_matrix(np.asarray(fitted), predicted, 256)
    union = together.sum(0) + together.sum(1) - np.diag(together)
    each = {str(i): float(together[i, i] / union[i]) for i in np.flatnonzero(union)}
    return {"compared": len(truths), "iou": each, "miou": mean_iou(together)}


def _print(summary: Mapping[str, Any]) -> None:
    width = max(map(len, summary["doubt"]))
    for key, doubt in sorted(summary["doubt"].items(), key=lambda item: -item[1]):
        print(f"{key:{width}}  doubt {doubt:.3f}")
    for number, iou in summary.get("iou", {}).items():
        print(f"class {number}: IoU {iou:.3f}")
    if "miou" in summary:
        print(f"mean IoU {summary['miou']:.3f} over {summary['compared']} images with labels")


def _device(name: str | None) -> str:
    import torch

    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, write_to: Callable[[Path], object]) -> None:
    """Write through a file beside ``path``, so that a kill leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    write_to(part)
    part.replace(path)
