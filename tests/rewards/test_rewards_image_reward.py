"""ImageReward against transformers, torch and Pillow on a small network; Pillow's sizes by hand; wrong files."""

import shutil

import numpy as np
import pytest
import tiny_blip
from PIL import Image

from ddpo_jax import errors
from ddpo_jax.models.blip.wordpiece import WordPiece
from ddpo_jax.rewards import image_reward
from ddpo_jax.rewards._shared import blip as _blip

PROMPTS = ["a red circle", "The BLUE squares, hello?", "a red circle", "yes " * 50, "no"]
METADATA = [{}] * 5


def make(**options):
    config = image_reward.default_config()
    config.update(options)
    return image_reward.make(config)


@pytest.fixture(scope="module")
def reward(image_reward_options):
    return make(**image_reward_options, batch_size=2)


def test_scores_are_those_of_the_published_code(reward, image_reward_model, image_reward_options, images):
    torch = pytest.importorskip("torch")
    height, width = 38, 32  # 72 x 60 with the shorter side at 32 is 38.4 x 32
    crops = []
    for image in images:
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        crops.append(np.asarray(resized.crop((0, 3, 32, 35))))
    ids, mask = WordPiece.from_folder(image_reward_options["blip"], max_length=35)(PROMPTS)
    raw = tiny_blip.image_reward_scores(
        image_reward_model, tiny_blip.nchw(np.stack(crops)), torch.tensor(ids).long(), torch.tensor(mask).long()
    )
    want = (raw - 0.16717362830052426) / 1.0333394966054072
    assert np.ptp(want) > 0.5
    scores, parts = reward(images, PROMPTS, METADATA)
    assert scores.dtype == np.float32 and parts == {}
    np.testing.assert_allclose(scores, want, atol=1e-4)


def test_shortest_side_and_centre_as_torchvision_has_them():
    """The long side is truncated; a margin of 2k + 1 pixels is halved to the even number below or above."""
    for (height, width), (tall, wide), (top, left) in [
        ((72, 60), (38, 32), (3, 0)),
        ((60, 72), (32, 38), (0, 3)),
        ((33, 64), (32, 62), (0, 15)),
        ((32, 35), (32, 35), (0, 2)),  # margin 3: 1.5 is rounded to 2
        ((33, 32), (33, 32), (0, 0)),  # margin 1: 0.5 is rounded to 0
        ((9, 5), (57, 32), (12, 0)),
    ]:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        want = np.asarray(Image.fromarray(image).resize((wide, tall), Image.Resampling.BICUBIC))
        got = _blip.shortest_side(image[None], 32)
        assert got.shape == (1, 32, 32, 3)
        np.testing.assert_array_equal(got[0], want[top : top + 32, left : left + 32])


def test_a_single_file_and_bfloat16(reward, image_reward_options, images, tmp_path):
    shutil.copy(f"{image_reward_options['blip']}/ImageReward.pt", tmp_path / "mine.pt")
    shutil.copy(f"{image_reward_options['blip']}/vocab.txt", tmp_path)
    exact = reward(images, PROMPTS, METADATA)[0]
    rough = make(blip=str(tmp_path / "mine.pt"), dtype="bfloat16")(images, PROMPTS, METADATA)[0]
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.1 * exact.std()


def test_an_empty_caption_is_refused(reward, images):
    with pytest.raises(errors.InputError, match=r"prompt: received ' ' for image 1; the caption is empty"):
        reward(images[:2], ["a red circle", " "], METADATA[:2])


def test_missing_damaged_and_wrong_weights_are_one_line(image_reward_options, vqa_options, tmp_path):
    folder = image_reward_options["blip"]

    def refused(message, **options):
        with pytest.raises(errors.InputError, match=message) as caught:
            make(**options)
        assert "\n" not in str(caught.value)

    get = "put ImageReward.pt of THUDM/ImageReward and vocab.txt of google-bert/bert-base-uncased there"
    refused(f"reward.blip: received '/no'; it must be a folder with ImageReward.pt; {get}", blip="/no")
    refused(f"received '{tmp_path}'; it must be a folder", blip=str(tmp_path))
    refused("reward.dtype: received 'float16'; it must be float32 or bfloat16", blip=folder, dtype="float16")
    refused("reward.batch_size=0 must be at least 1", blip=folder, batch_size=0)
    weights = (tmp_path / "ImageReward.pt", f"{folder}/ImageReward.pt")
    weights[0].write_bytes(open(weights[1], "rb").read()[:5000])
    refused("reward.blip: received .*ImageReward.pt: refused: not a zip-format torch file", blip=str(tmp_path))
    shutil.copy(weights[1], weights[0])
    refused("reward.blip: received .*no vocab.txt; put that of google-bert", blip=str(tmp_path))
    vocabulary = "".join(f"{token}\n" for token in [*tiny_blip.VOCABULARY, "more"])
    (tmp_path / "vocab.txt").write_text(vocabulary, encoding="utf-8")
    size = len(tiny_blip.VOCABULARY) + 2
    refused(f"has {size + 1} tokens with .* its network {size}; put vocab.txt of google-bert", blip=str(tmp_path))
    refused("missing: mlp.layers.0.bias.*unexpected: text_dec", blip=vqa_options["blip"] + "/model.safetensors")
