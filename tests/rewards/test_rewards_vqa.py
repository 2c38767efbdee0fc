"""BLIP-VQA against transformers on a small network, one question at a time; the noun chunks by hand; wrong input."""

import sys
import types

import numpy as np
import pytest
import tiny_blip
from PIL import Image

from ddpo_jax import errors
from ddpo_jax.rewards import vqa
from ddpo_jax.rewards._shared.chunks import noun_chunks

PROMPTS = [
    "A red circle on top of the blue square.",
    "hello",
    "a red circle and a blue square on the left of the yes, a no and hello",
    "The soft (blue) yes",
    "hello",
]
QUESTIONS = [
    ["a red circle?", "the blue square?"],
    ["hello?"],
    ["a red circle?", "a blue square?", "the yes?", "a no?", "hello?"],
    ["the soft?", "blue?", "yes?"],
    ["the red circle?"],
]
FIVE = ["a red circle", "a blue square", "the left", "the yes", "a no", "hello"]  # "no" alone is no noun by rule
METADATA = [
    {},
    {},
    {"chunks": FIVE},
    {"chunks": ["The SOFT", "(blue)", "yes", "the left"]},
    {"chunks": ["the red circle"]},
]


def make(**options):
    config = vqa.default_config()
    config.update(options)
    return vqa.make(config)


@pytest.fixture(scope="module")
def reward(vqa_options):
    return make(**vqa_options, batch_size=2)


@pytest.fixture(scope="module")
def probability(vqa_model, vqa_options):
    """P(yes) / (P(yes) + P(no)) by transformers: (image, question) alone, without padding."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.BertTokenizer.from_pretrained(vqa_options["blip"])
    start, question_mark = len(tiny_blip.VOCABULARY), len(tiny_blip.VOCABULARY) + 1
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])

    def ask(image, question):
        resized = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
        ids = tokenizer(question, return_tensors="pt").input_ids
        ids[:, 0] = question_mark
        logits = tiny_blip.vqa_logits(vqa_model, tiny_blip.nchw(resized[None]), ids, start)
        both = torch.softmax(torch.tensor(logits[0]).double(), 0)[[yes, no]]
        return float(both[0] / both.sum())

    return ask


def test_score_is_the_product_over_the_chunks(reward, probability, images):
    scores, parts = reward(images, PROMPTS, METADATA)
    assert scores.dtype == np.float32 and list(parts) == [f"chunk_{i}" for i in range(1, 6)]
    for row, (image, questions) in enumerate(zip(images, QUESTIONS, strict=True)):
        want = [probability(image, question) for question in questions]
        got = [parts[f"chunk_{i + 1}"][row] for i in range(5)]
        np.testing.assert_allclose(got[: len(want)], want, atol=1e-4)
        assert np.isnan(got[len(want) :]).all()
        np.testing.assert_allclose(scores[row], np.prod(want), atol=1e-4)
    asked = np.stack(list(parts.values()))
    assert np.nanstd(asked) > 0.05


def test_only_the_first_eight_chunks_are_asked_and_directions_are_not(reward, images):
    few = ["a", "b", "c", "d", "e", "f", "g", "h"]
    scores, parts = reward(
        images[:1], ["hello"], [{"chunks": ["top", *few[:4], "the side", *few[4:], "i", "the right"]}]
    )
    again, same = reward(images[:1], ["hello"], [{"chunks": few}])
    assert len(parts) == 8
    np.testing.assert_array_equal(scores, again)
    np.testing.assert_array_equal(np.stack(list(parts.values())), np.stack(list(same.values())))


def test_spacy_may_find_the_chunks(vqa_options, reward, images, monkeypatch):
    class Chunk:
        def __init__(self, text):
            self.text = text

    def load(name):
        if name != "en_core_web_sm":
            raise OSError(f"[E050] Can't find model '{name}'.\nIt is not installed.")
        return lambda prompt: types.SimpleNamespace(noun_chunks=[Chunk(word) for word in prompt.split()])

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    parsed = make(**vqa_options, chunker="en_core_web_sm", batch_size=2)
    scores, _ = parsed(images[:1], ["red blue"], [{}])
    want, _ = reward(images[:1], ["hello"], [{"chunks": ["red", "blue"]}])
    np.testing.assert_allclose(scores, want, rtol=1e-6)
    with pytest.raises(errors.InputError, match=r"chunker: received 'en_x'.*Can't find model.*download en_x") as caught:
        make(**vqa_options, chunker="en_x")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(errors.InputError, match="chunker: received 'en_x'.*spaCy is not installed; pip install spacy"):
        make(**vqa_options, chunker="en_x")


@pytest.mark.parametrize(
    ("prompt", "metadata", "message"),
    [
        ("", {}, "prompt: received '' for image 0; the caption is empty"),
        ("on top of", {}, "prompt: received 'on top of', in which no noun chunk to ask for was found"),
        ("a dog", {"chunks": []}, "prompt: received 'a dog', in which no noun chunk"),
        ("a dog", {"chunks": "a dog"}, "chunks: received 'a dog' for prompt 'a dog'; they must be a list of texts"),
        ("a dog", {"chunks": [1]}, r"chunks: received \[1\]"),
    ],
)
def test_prompts_without_a_question_are_refused(reward, images, prompt, metadata, message):
    with pytest.raises(errors.InputError, match=message):
        reward(images[:1], [prompt], [metadata])


def test_wrong_weights_are_one_line(vqa_options, image_reward_options, tmp_path):
    get = "put model.safetensors of Salesforce/blip-vqa-capfilt-large and vocab.txt of google-bert/bert-base-uncased"
    with pytest.raises(errors.InputError, match=f"reward.blip: received '/no'; .* model.safetensors; {get}"):
        make(blip="/no")
    with pytest.raises(errors.InputError, match="missing: text_decoder.*unexpected: mlp.layers"):
        make(blip=image_reward_options["blip"] + "/ImageReward.pt")
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00not json")
    with pytest.raises(errors.InputError, match="reward.blip: received .*not a safetensors file") as caught:
        make(blip=str(tmp_path))
    assert "\n" not in str(caught.value)
    tiny_blip.write_vocabulary(tmp_path)
    text = (tmp_path / "vocab.txt").read_text(encoding="utf-8").replace("\nyes\n", "\nmaybe\n")
    (tmp_path / "vocab.txt").write_text(text, encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(open(vqa_options["blip"] + "/model.safetensors", "rb").read())
    with pytest.raises(errors.InputError, match="the vocabulary has no 'yes'"):
        make(blip=str(tmp_path))


@pytest.mark.parametrize(
    ("prompt", "chunks"),
    [
        ("a red apple and a green bowl", ["a red apple", "a green bowl"]),
        ("A black and white dog sits on the sofa.", ["A black and white dog", "the sofa"]),
        ("wooden chairs and a glass door", ["wooden chairs", "a glass door"]),
        ("the long, narrow street", ["the long, narrow street"]),
        ("a yellow, red, and blue kite", ["a yellow, red, and blue kite"]),
        ("A kitchen has red stools, and white lamps.", ["A kitchen", "red stools", "white lamps"]),
        ("The mug was on top of the shelf", ["The mug", "top", "the shelf"]),
        ("a cup on the left of a lamp", ["a cup", "the left", "a lamp"]),
        ("a horse in front of an old barn", ["a horse", "an old barn"]),
        ("a fox playing chess", ["a fox", "chess"]),
        ("an ant is washing dishes", ["an ant", "dishes"]),
        ("a flying bird over a wooden cutting board", ["a flying bird", "a wooden cutting board"]),
        ("The pale blue light shone on the wall", ["The pale blue light", "the wall"]),
        ("The spoon and the fork rest on a napkin", ["The spoon", "the fork", "a napkin"]),
        ("a tin can and a soda can", ["a tin can", "a soda can"]),
        ("The fluffy snow covered the roof", ["The fluffy snow", "the roof"]),
        ("a snow covered street", ["a snow covered street"]),
        ("the farmer's hat and Rubik's cube", ["the farmer's hat", "Rubik's cube"]),
        ("A woman in pink next to a man in orange", ["A woman", "pink", "a man", "orange"]),
        ("The wall is white and the door is open", ["The wall", "the door"]),
        ("two men who wear three red hats", ["two men", "three red hats"]),
        ("a very small freshly painted house", ["a very small freshly painted house"]),
        ("they look at all the animals", ["all the animals"]),
        ("Two dogs sit side by side", ["Two dogs"]),
        ("a clock that reads 11:44", ["a clock", "11:44"]),
        ("ostrich", ["ostrich"]),
        ("", []),
        ("?!", []),
    ],
)
def test_noun_chunks_by_hand(prompt, chunks):
    assert noun_chunks(prompt) == chunks
