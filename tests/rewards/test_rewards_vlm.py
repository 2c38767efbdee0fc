"""The alignment reward: what is asked, what is compared, BERTScore's definition on the whole chain, and bad models."""

import numpy as np
import pytest
import tiny_deberta
import tiny_models

from ddpo_jax.errors import InputError
from ddpo_jax.rewards import vlm
from ddpo_jax.rollout.scoring import RewardError, RewardRunner

IMAGES = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (0, 1, 2)])
PROMPTS = ["a red cat", "a red cat", "the {sky}"]


def make(answerer="tiny_models:answer", encoder="tiny_models:encode", **options):
    config = vlm.default_config()
    config.update({"answerer": answerer, "encoder": encoder, **options})
    return vlm.make(config)


def recall(candidate, reference):
    """BERTScore's recall of one pair of (embeddings, weights), in float64, a cosine at a time."""
    (answers, _), (tokens, weights) = candidate, reference
    total = 0.0
    for token, weight in zip(np.float64(tokens), weights, strict=True):
        cosines = [token @ other / np.linalg.norm(token) / np.linalg.norm(other) for other in np.float64(answers)]
        total += weight * max(cosines)
    return total / weights.sum()


def test_recall_of_the_reference_in_the_answer():
    scores, parts = make()(IMAGES, PROMPTS, [{}] * 3)
    question = "Answer concisely: what is going on in this image?"
    answers = tiny_models.encode(tiny_models.answer(IMAGES, question))
    references = tiny_models.encode([f"The image contains {prompt}" for prompt in PROMPTS])
    expected = [recall(answer, reference) for answer, reference in zip(answers, references, strict=True)]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores.dtype == np.float32 and parts == {} and np.ptp(expected) > 0.05


def test_the_question_and_an_empty_answer(monkeypatch):
    asked = []

    def answer(images, question):
        asked.append(question)
        return ["", " \n", "The image contains the {sky}"]

    monkeypatch.setattr(tiny_models, "answer", answer)
    scores, _ = make(question="what is it?")(IMAGES, PROMPTS, [{}] * 3)
    assert asked == ["what is it?"]
    np.testing.assert_allclose(scores, [0, 0, 1], atol=1e-6)  # the reference itself is recalled wholly
    monkeypatch.setattr(tiny_models, "answer", lambda images, question: [""] * 3)
    np.testing.assert_array_equal(make()(IMAGES, PROMPTS, [{}] * 3)[0], [0, 0, 0])


def test_a_model_on_a_server():
    def reply(payload):
        return {"answers": tiny_models.answer(tiny_models.images_of(payload), payload["question"])}

    with tiny_models.Server(reply) as server:
        np.testing.assert_array_equal(
            make(server.url)(IMAGES, PROMPTS, [{}] * 3)[0], make()(IMAGES, PROMPTS, [{}] * 3)[0]
        )
        assert [len(payload["image"]) for payload in server.asked] == [3]


ONE = np.ones(2, np.float32)


@pytest.mark.parametrize(
    "encode",
    [
        lambda texts: "x",
        lambda texts: [(np.ones((2, 4)), ONE)],
        lambda texts: [None for _ in texts],
        lambda texts: [(np.ones((2, 4)), np.ones(3)) for _ in texts],
        lambda texts: [(np.ones((2, 4)), np.zeros(2)) for _ in texts],
        lambda texts: [(np.ones(4), np.ones(4)) for _ in texts],
        lambda texts: [(np.ones((2, 4 + i)), ONE) for i, _ in enumerate(texts)],
        lambda texts: [([["a"]], ONE) for _ in texts],
    ],
)
def test_encoders_that_are_wrong(encode, monkeypatch):
    monkeypatch.setattr(tiny_models, "encode", encode)
    with RewardRunner(make(), name="vlm") as runner:
        with pytest.raises(RewardError, match=r"reward.encoder gave .*; it must give \(embeddings \[L, D\], ") as error:
            runner.submit(IMAGES, PROMPTS, [{}] * 3).result()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"answerer": ""}, r"^reward.answerer: received ''; it must name a model"),
        ({"encoder": ""}, r"^reward.encoder: received ''; it must be the folder of microsoft/deberta-xlarge-mnli or"),
        ({"encoder": "/nowhere"}, r"^reward.encoder: received '/nowhere'; it must be the folder"),
        ({"encoder": "tiny_models:embed"}, r"^reward.encoder: received 'tiny_models:embed'; .*has no 'embed'"),
    ],
)
def test_models_that_are_not_there(options, why):
    with pytest.raises(InputError, match=why):
        make(**options)


def test_a_folder_of_deberta(tmp_path, monkeypatch):
    """The whole chain against transformers' tokens and hidden states of the chosen layer."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    oracle = tiny_deberta.folder(tmp_path / "model")
    tokenizer = transformers.DebertaTokenizer.from_pretrained(tmp_path / "model")
    answers = ["two striped green dogs", "a photo of the sky, blue as ever", "a cat"]
    monkeypatch.setattr(tiny_models, "answer", lambda images, question: answers)

    def embed(text):
        ids = tokenizer([text], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = oracle(input_ids=ids, output_hidden_states=True).hidden_states
        weights = [float(token not in (tokenizer.cls_token_id, tokenizer.sep_token_id)) for token in ids[0].tolist()]
        return [(state[0].numpy(), np.array(weights)) for state in states]

    for layer in (1, 2):
        reward = make(encoder=str(tmp_path / "model"), layer=layer, batch_size=2)
        scores, _ = reward(IMAGES, PROMPTS, [{}] * 3)
        pairs = [
            (embed(answer), embed(f"The image contains {prompt}"))
            for answer, prompt in zip(answers, PROMPTS, strict=True)
        ]
        expected = [recall(answer[layer], reference[layer]) for answer, reference in pairs]
        np.testing.assert_allclose(scores, expected, atol=1e-4)
        assert np.ptp(expected) > 0.01
    with pytest.raises(ValueError, match=r"layer 40 was asked for; it has layers 1 to 3"):
        make(encoder=str(tmp_path / "model"))
