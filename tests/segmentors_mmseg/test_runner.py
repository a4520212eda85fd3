"""A real mmengine Runner: it learns, is the same on two processes and in mixed precision, and serves inference."""

import json
import socket
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, load_checkpoint, save_checkpoint
from mmseg.registry import MODELS
from PIL import Image

from segmentors.mmseg import measure_cache
from segmentors.mmseg import test as scoring
from segmentors.mmseg import train as training
from tests.segmentors_mmseg.tiny import CONFIGS, config, weights, written


def best_constant(labels):
    """mIoU of the best prediction that is one class everywhere: its share of the pixels over the classes there are."""
    counts = np.bincount(np.concatenate([np.asarray(Image.open(file)).ravel() for file in labels]), minlength=18)
    return counts.max() / counts.sum() / (counts > 0).sum()


def test_a_head_on_the_embedded_model_learns(tmp_path):
    """An untrained head is at chance; eighty steps on 32 scenes must be far above any constant, on unseen scenes."""
    config = Config.fromfile(CONFIGS / "embedded_cached_upernet.py")
    config.work_dir = str(tmp_path / "run")
    config.model.backbone.cache = str(tmp_path / "features")
    for split, count in (("train", 32), ("val", 2), ("test", 12)):
        config[f"{split}_dataloader"].dataset.update(data_root=str(tmp_path / "scenes"), count=count)
    config.train_cfg.update(max_iters=80, val_interval=1000)
    config.param_scheduler[0].end = 80
    runner = Runner.from_cfg(config)
    before = runner.test()["mIoU"] / 100
    runner.train()
    after = runner.test()["mIoU"] / 100
    chance = best_constant((tmp_path / "scenes" / "ann_dir" / "test").glob("*.png"))
    assert before < 0.05 < after, f"mIoU was {before:.3f} untrained and is {after:.3f}"
    assert after > 2 * chance
    assert 0 < (Path(config.work_dir) / "iter_80.pth").stat().st_size < 8e6


def plain(sd15, scenes, work_dir):
    """Nothing random, and a loss that is a mean over images: so that two processes can be compared with one."""
    made = config(sd15, scenes, work_dir)
    made.model.decode_head.update(dropout_ratio=0, loss_decode=dict(type="CrossEntropyLoss"))
    made.model.auxiliary_head.dropout_ratio = 0
    pipeline = made.train_dataloader.dataset.pipeline
    made.train_dataloader.dataset.pipeline = [step for step in pipeline if step.type != "RandomFlip"]
    made.optim_wrapper.optimizer = dict(type="SGD", lr=0.05)
    return made


def one_of_two(rank, port, path):
    import os

    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    training.main([path, "--launcher", "pytorch"])


@pytest.mark.slow
def test_a_run_on_kept_features_is_the_run_without_them(sd15, scenes, tmp_path):
    """Bit for bit, image by image: in a larger batch, the last bits of a feature depend on its neighbours."""
    made = {}
    for name, cache in (("plain", None), ("kept", str(tmp_path / "features"))):
        one = config(sd15, scenes, tmp_path / name, cache=cache)
        one.train_dataloader.batch_size = 1
        training.main([written(one, tmp_path / f"{name}_config")])
        made[name] = weights(tmp_path / name)
    assert made["plain"].keys() == made["kept"].keys()
    assert all(torch.equal(made["kept"][name], value) for name, value in made["plain"].items())
    assert list((tmp_path / "features").rglob("*.safetensors"))


@pytest.mark.slow
def test_two_processes_train_as_one(sd15, scenes, tmp_path):
    training.main([written(plain(sd15, scenes, tmp_path / "one"), tmp_path / "a")])
    two = plain(sd15, scenes, tmp_path / "two")
    two.train_dataloader.batch_size = 1
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(one_of_two, (port, written(two, tmp_path / "b")), nprocs=2)
    expected, found = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = MODELS.build(two.model).state_dict()
    moved = [name for name, value in expected.items() if not torch.allclose(value, start[name])]
    assert len(moved) > len(expected) / 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@HOOKS.register_module()
class DtypeHook(Hook):
    """Notes what goes into the first level's convolution in training, and what comes out."""

    seen: ClassVar[set] = set()

    def before_train(self, runner):
        def note(module, args, out):
            if module.training:
                self.seen.add((args[0].dtype, out.dtype))

        runner.model.backbone.projections[0].mix.conv.register_forward_hook(note)


def test_mixed_precision_trains_nearly_as_full_precision(sd15, scenes, tmp_path):
    """Weights stay float32; after twelve steps they are where float32 brings them, up to bfloat16's eight bits."""
    full, mixed = (plain(sd15, scenes, tmp_path / name) for name in ("full", "mixed"))
    mixed.custom_hooks.append(dict(type="DtypeHook"))
    training.main([written(full, tmp_path / "a")])
    training.main([written(mixed, tmp_path / "b"), "--amp"])
    half = torch.float16 if torch.cuda.is_available() else torch.bfloat16
    assert DtypeHook.seen == {(torch.float32, half)}
    expected, found = weights(tmp_path / "full"), weights(tmp_path / "mixed")
    start = MODELS.build(full.model).state_dict()
    assert all(value.dtype == torch.float32 for value in found.values())
    name = "decode_head.conv_seg.weight"
    moved = (expected[name] - start[name]).norm()
    assert 0 < (found[name] - expected[name]).norm() < 0.1 * moved


@pytest.fixture(scope="module")
def trained(sd15, scenes, tmp_path_factory):
    """Config file and checkpoint of a short run."""
    folder = tmp_path_factory.mktemp("trained")
    made = config(sd15, scenes, folder / "run")
    path = written(made, folder)
    training.main([path])
    return path, str(folder / "run" / "iter_12.pth")


def test_the_test_command_scores_draws_and_writes(trained, tmp_path):
    path, checkpoint = trained
    out, drawn = tmp_path / "labels", tmp_path / "drawn"
    arguments = ["--work-dir", str(tmp_path), "--out", str(out), "--show-dir", str(drawn)]
    scoring.main([path, checkpoint, *arguments])
    assert len(list(out.glob("*.png"))) == 2 and len(list(drawn.rglob("*.png"))) == 2
    scoring.main([path, checkpoint, "--work-dir", str(tmp_path / "tta"), "--tta"])
    assert list((tmp_path / "tta").rglob("*.json"))


def labels_of(out):
    return {file.name: file.read_bytes() for file in out.glob("*.png")}


def test_without_a_checkpoint_the_configs_own_weights_are_scored(trained, tmp_path):
    path, checkpoint = trained
    own, begun = Config.fromfile(path), Config.fromfile(path)
    own.load_from = checkpoint
    begun.model.init_cfg = dict(type="Pretrained", checkpoint=checkpoint)
    runs = {"named": [path, checkpoint], "own": [written(own, tmp_path)], "begun": [written(begun, tmp_path / "b")]}
    for name, arguments in runs.items():
        scoring.main([*arguments, "--work-dir", str(tmp_path / f"{name}_run"), "--out", str(tmp_path / name)])
    expected = labels_of(tmp_path / "named")
    assert len(expected) == 2 and expected == labels_of(tmp_path / "own") == labels_of(tmp_path / "begun")


def test_a_training_free_model_needs_no_checkpoint(scenes, tmp_path):
    made = Config.fromfile(CONFIGS / "embedded_training_free.py")
    made.test_dataloader.dataset.update(data_root=str(scenes), count=1, size=64)
    scoring.main([written(made, tmp_path), "--work-dir", str(tmp_path / "run"), "--out", str(tmp_path / "labels")])
    assert len(labels_of(tmp_path / "labels")) == 1


def test_every_view_of_an_image_is_told_its_caption(scenes, tmp_path):
    made = Config.fromfile(CONFIGS / "embedded_captions_upernet.py")
    made.test_dataloader.dataset.update(data_root=str(scenes), count=1, size=64)
    save_checkpoint(dict(state_dict=MODELS.build(made.model).state_dict()), str(tmp_path / "untrained.pth"))
    arguments = ["--tta", "--work-dir", str(tmp_path / "run"), "--out", str(tmp_path / "labels")]
    scoring.main([written(made, tmp_path), str(tmp_path / "untrained.pth"), *arguments])
    assert len(labels_of(tmp_path / "labels")) == 1


def test_what_compressed_features_cost_is_measured(trained, tmp_path, capsys):
    path, checkpoint = trained
    arguments = [path, checkpoint, "--work-dir", str(tmp_path), "--ways", "float16", "int8:1"]
    measure_cache.main(arguments)
    rows = {row[0]: row[1:] for line in capsys.readouterr().out.splitlines() if len(row := _cells(line)) == 5}
    size, error = ({name: float(row[i].rstrip("%")) for name, row in rows.items() if name != "kept as"} for i in (0, 1))
    assert [*size] == ["float32", "float16", "int8, 1 components"]
    assert size["float32"] > 1.5 * size["float16"] and error["float32"] == 0
    assert 0 < error["float16"] < 100 * 2**-11 < error["int8, 1 components"]  # of a float16, 2⁻¹¹ at most
    scoring.main([path, checkpoint, "--work-dir", str(tmp_path / "plain")])
    (plain,) = [json.loads(file.read_text()) for file in (tmp_path / "plain").rglob("2*.json")]
    assert f"{plain['mIoU'] / 100:.4f}" == rows["float32"][2]


def _cells(line):
    return [cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")]


def test_slide_and_whole_inference(trained):
    path, checkpoint = trained
    made = Config.fromfile(path)
    model = MODELS.build(made.model)
    load_checkpoint(model, checkpoint, strict=True)
    model.eval()
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    meta = [dict(ori_shape=(64, 96), img_shape=(64, 96))]
    with torch.no_grad():
        whole = model.inference(image, meta)
        model.test_cfg = dict(mode="slide", crop_size=(64, 96), stride=(32, 32))
        model.test_cfg = type(made)(model.test_cfg)
        one_window = model.inference(image, meta)
        model.test_cfg.crop_size = (64, 64)
        windows = model.inference(image, meta)
        left = model.encode_decode(image[..., :64], meta)
    assert torch.equal(one_window, whole)
    assert windows.shape == whole.shape and torch.equal(windows[..., :32], left[..., :32])


def test_mmsegs_own_inferencer(trained, tmp_path):
    from mmseg.apis import MMSegInferencer

    path, checkpoint = trained
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    result = MMSegInferencer(path, checkpoint, device="cpu")(str(tmp_path / "a.png"))
    assert result["predictions"].shape == (70, 90)


def test_a_checkpoint_of_a_run_is_small_and_loads_strictly(trained):
    path, checkpoint = trained
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    frozen = [name for name in state if "backbone" in name and "projections" not in name]
    assert frozen == ["backbone._extra_state"]
    load_checkpoint(MODELS.build(Config.fromfile(path).model), checkpoint, strict=True)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_channels_that_do_not_fit_are_an_error_with_the_right_ones(sd15, scenes, tmp_path):
    made = config(sd15, scenes, tmp_path)
    made.model.decode_head.in_channels = [8, 16, 8]
    with pytest.raises(ValueError, match=r"decode_head has in_channels=\[8, 16, 8\].*in_channels=\[8, 8, 8\]"):
        MODELS.build(made.model)
    made.model.decode_head.update(in_channels=[8, 8, 8], in_index=[0, 1, 3])
    with pytest.raises(ValueError, match="the backbone has 3 levels"):
        MODELS.build(made.model)


def test_commands_say_what_is_wrong(sd15, scenes, tmp_path):
    path = written(config(sd15, scenes, tmp_path / "run"), tmp_path)
    with pytest.raises(SystemExit, match=r"did you mean .*embedded_practical_fpn\.py"):
        training.main([str(CONFIGS / "embedded_practical_fp.py")])
    with pytest.raises(SystemExit, match="cannot be written"):
        training.main([path, "--work-dir", f"{path}/run"])
    with pytest.raises(SystemExit, match="there is no checkpoint"):
        scoring.main([path, str(tmp_path / "none.pth")])
    parts = config(sd15, scenes, tmp_path / "run")
    parts.model.init_cfg = dict(type="Pretrained", checkpoint="other.pth", prefix="backbone.")
    for one in (path, written(parts, tmp_path / "parts")):
        with pytest.raises(SystemExit, match=r"config\.py describes a model that must be trained.* set load_from"):
            scoring.main([one, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
    other = config(sd15, scenes, tmp_path / "run")
    other.optim_wrapper.type = "DeepSpeedOptimWrapper"
    with pytest.raises(SystemExit, match="the config has DeepSpeedOptimWrapper"):
        training.main([written(other, tmp_path / "other"), "--amp"])
