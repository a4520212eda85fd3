"""A real mmengine Runner: it learns, goes on where it stopped, is the same on two processes, and serves inference."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, load_checkpoint
from mmseg.registry import MODELS
from PIL import Image

from segmentors.mmseg import test as scoring
from segmentors.mmseg import train as training
from tests.segmentors_mmseg.tiny import CONFIGS, config


@HOOKS.register_module()
class StopHook(Hook):
    """A run that ends badly after eight iterations."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 8:
            raise KeyboardInterrupt


def written(config, folder):
    """The config as a file, as the commands take it."""
    path = folder / "config.py"
    folder.mkdir(parents=True, exist_ok=True)
    config.dump(path)
    return str(path)


def weights(work_dir, iteration=12):
    state = torch.load(Path(work_dir) / f"iter_{iteration}.pth", weights_only=False)["state_dict"]
    return {name: value for name, value in state.items() if value.is_floating_point()}


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


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(sd15, scenes, tmp_path):
    through = config(sd15, scenes, tmp_path / "through")
    training.main([written(through, tmp_path / "a")])
    stopped = config(sd15, scenes, tmp_path / "stopped")
    stopped.custom_hooks.append(dict(type="StopHook", priority="LOWEST"))
    with pytest.raises(KeyboardInterrupt):
        training.main([written(stopped, tmp_path / "b")])
    assert (tmp_path / "stopped" / "iter_6.pth").is_file() and not (tmp_path / "stopped" / "iter_12.pth").exists()
    stopped.custom_hooks.pop()
    torch.manual_seed(1234)  # whatever a new process begins with
    training.main([written(stopped, tmp_path / "c"), "--resume"])
    expected, found = weights(tmp_path / "through"), weights(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


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
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="--amp needs a GPU"):
            training.main([path, "--amp"])
