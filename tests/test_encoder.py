"""The depth encoder: a small pretraining run, what it says to bad input, and the encoder in assets/."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import ppo_ballbot as ppo
from ballbot_utils import pretrain_encoder as pretrain
from ballbot_utils.checkpoints import load_encoder
from ballbot_utils.geometry import rotation_matrix
from ballbot_utils.model import BALL_RADIUS, BASE_OVER_BALL
from ballbot_utils.terrain import Terrain

SMALL = pretrain.Args(num_threads=1, num_frames=1024, num_val_frames=512, num_terrains=1, epochs=4)


@pytest.mark.slow
def test_small_run(tmp_path):
    result = pretrain.pretrain(replace(SMALL, output=tmp_path / "encoder.pt"))
    assert result["val_loss"] < 0.3 * result["mean_frame_loss"]
    assert result["val_mae_mm"] < 0.7 * result["mean_frame_mae_mm"]
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.pt"]
    saved = torch.load(tmp_path / "encoder.pt", weights_only=True)
    assert saved["seed"] == 1 and saved["args"]["epochs"] == 4 and saved["val_mse"] == result["val_mse"]
    agent = ppo.Agent(ppo.Args(small_encoder=False))
    weights = load_encoder(tmp_path / "encoder.pt", agent)
    assert set(weights) == {key for key in agent.state_dict() if key.startswith("encoder.")}
    assert all(value.is_contiguous() for value in weights.values())


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "encoder.pt exists"),
        ({"output": "absent/encoder.pt"}, "no folder"),
        ({"output": "."}, "a folder"),
        ({"output": "new.pt", "num_frames": 100}, "--num-frames is 100"),
        ({"output": "new.pt", "num_val_frames": 2}, "--num-val-frames is 2"),
        ({"output": "new.pt", "epochs": 0}, "--epochs is 0"),
        ({"output": "new.pt", "seed": -1}, "--seed is -1"),
        ({"output": "new.pt", "learning_rate": 0.0}, "--learning-rate is 0.0"),
        ({"output": "new.pt", "small": True, "picture": "p.png"}, "--picture has no effect with --small"),
        ({"heights": True}, "--heights needs --output"),
        ({"output": "new.pt", "small": True, "heights": True}, "--small and --heights are two encoders"),
        ({"output": "new.pt", "terrain": "hils"}, "terrain"),
        ({"output": "new.pt", "terrain": "flat"}, "--terrain is flat"),
    ],
)
def test_bad_input_fails_first(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(pretrain, "make_frames", lambda *_: pytest.fail("work started"))
    existing = tmp_path / "encoder.pt"
    existing.write_text("precious")
    if "output" in change:
        change = change | {"output": tmp_path / change["output"]}
    with pytest.raises(SystemExit) as error:
        pretrain.pretrain(replace(SMALL, output=existing) if not change else replace(SMALL, **change))
    line = str(error.value)
    assert line.startswith("error: ") and message in line and "\n" not in line
    assert existing.read_text() == "precious"


def test_poses_rest_on_the_terrain():
    heights = Terrain("perlin", 4_000_000, 0.1).heights
    position, quaternion, targets = pretrain.random_poses(np.random.default_rng(0), heights, 2000)
    rotation = rotation_matrix(quaternion)
    cosine = np.cos(np.linalg.norm(targets[:, :2], axis=1))
    np.testing.assert_allclose(rotation[:, 2, 2], cosine, atol=1e-9)
    assert np.degrees(np.arccos(cosine.min())) < 20
    # Up in the robot's frame: a turn about x by +a tips it towards +y, which is seen as sin(a) in the z row.
    upright = np.linalg.norm(targets[:, :2], axis=1) < np.radians(5)
    np.testing.assert_allclose(rotation[upright, 2, 1], targets[upright, 0], atol=2e-4)
    np.testing.assert_allclose(rotation[upright, 2, 0], -targets[upright, 1], atol=2e-4)
    # The ball's centre, below the base along the robot's axis, is a radius above the ground or a little more.
    x, y, z = (position - BASE_OVER_BALL * rotation[:, :, 2]).T
    clearance = z - pretrain.height_at(heights, x, y) - BALL_RADIUS
    assert clearance.min() > -0.005 and clearance.max() < 0.04 and abs(np.median(clearance)) < 0.001


def load_shipped(small):
    agent = ppo.Agent(ppo.Args(small_encoder=small))
    agent.load_state_dict(load_encoder("", agent), strict=False)
    return agent.encoder


def test_the_small_encoder_has_the_features_of_the_large_one(tmp_path):
    frames, _ = pretrain.make_frames(SMALL, np.random.default_rng(4), [4_000_000], 256)
    small, large = (pretrain.encode(load_shipped(small), frames) for small in (True, False))
    assert ((small - large).square().mean(0) < 0.001 * large.var(0)).all()
    result = pretrain.pretrain(replace(SMALL, small=True, output=tmp_path / "small.pt", epochs=8))
    assert 0.9 < min(result["r2"]) < 1
    agent = ppo.Agent(ppo.Args())
    assert set(load_encoder(tmp_path / "small.pt", agent)) == {
        key for key in agent.state_dict() if key.startswith("encoder.")
    }


@pytest.mark.slow
@pytest.mark.parametrize("small", [True, False], ids=["small", "large"])
def test_shipped_encoder_sees_the_ground(small):
    torch.manual_seed(0)
    random_encoder = ppo.DepthEncoder()
    encoder = load_shipped(small)
    rng = np.random.default_rng(4)
    (frames, targets), (val_frames, val_targets) = (
        pretrain.make_frames(SMALL, rng, [seed], 768) for seed in (4_000_000, 4_000_001)
    )
    features, val_features = pretrain.encode(encoder, frames), pretrain.encode(encoder, val_frames)
    assert features.shape == (768, 40)
    assert (features.mean(0).abs() < 0.2).all()
    assert ((features.std(0) > 0.3) & (features.std(0) < 0.7)).all()

    # Frames are noise-free, so even random features determine the tilt, in digits that no policy could use. With
    # noise of 0.05 on each feature they do not, and the pretrained ones do.
    noise = 0.05
    scores = pretrain.probe_all(features, targets[:, :4], val_features, val_targets[:, :4], noise)
    tilt, to_ground, slope_given_tilt = scores[:2], scores[4:6], scores[6:]
    assert min(tilt) > 0.9 and min(to_ground) > 0.95 and min(slope_given_tilt) > 0.8
    features, val_features = pretrain.encode(random_encoder, frames), pretrain.encode(random_encoder, val_frames)
    assert max(pretrain.probe_all(features, targets[:, :4], val_features, val_targets[:, :4], noise)[:2]) < 0.3


def test_an_encoder_that_tells_the_heights_ahead(tmp_path):
    change = dict(heights=True, terrain="potholes:depth=0.1", camera_pitch=25.0, output=tmp_path / "see.pt")
    result = pretrain.pretrain(replace(SMALL, num_frames=8192, epochs=8, **change))
    rows = np.reshape(result["r2"], (6, -1))
    assert rows[0].mean() > 0.6 and rows[0].mean() > rows[5].mean()  # near ground is seen best
