"""What is read from the folder of a run: config.json and metrics.jsonl that are damaged, foreign or hostile."""

import json
import signal

import pytest

from ddpo_jax.config import default_config
from ddpo_jax.config.keys import to_json
from ddpo_jax.config.override import override
from ddpo_jax.config.resolve import resolve
from ddpo_jax.errors import InputError, Interrupted
from ddpo_jax.workdir import folder, metrics


def config_of(**keys):
    config = default_config()
    override(config, [("model", "mini"), *keys.items()])
    return resolve(config, "cpu")[0]


@pytest.fixture(scope="module")
def good():
    return json.loads(to_json(config_of()))


def changed(content, key, value):
    copy = json.loads(json.dumps(content))
    *sections, last = key.split(".")
    place = copy
    for section in sections:
        place = place[section]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return copy


DEEP = "[" * 100_000 + "]" * 100_000
NOT_JSON = {
    "empty": b"",
    "cut short": b'{"seed": 0, "tra',
    "not UTF-8": b'{"model": "caf\xe9"}',
    "binary": bytes(range(256)) * 4,
    "null": b"null",
    "a list": b"[]",
    "a number": b"3",
    "deep": DEEP.encode(),
    "a deep value": b'{"seed": ' + DEEP.encode() + b"}",
    "deep objects": b'{"a":' * 900 + b"1" + b"}" * 900,
    "keys that are none": b'{"a.b": 1, "": {"__class__": 2}}',
}


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("kind", [*NOT_JSON, "a folder", "a dead link"])
def test_a_config_that_is_none_is_one_line(tmp_path, kind, complete):
    path = tmp_path / "config.json"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a dead link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes(NOT_JSON[kind])
    with pytest.raises(InputError) as raised:
        folder.read_config(tmp_path, complete)
    text = str(raised.value)
    assert "\n" not in text and str(tmp_path) in text and len(text) < 1500


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("train", 3, "it lacks train.adam_b1, "),
        ("seed", "0", "seed: received '0'; it must be a whole number"),
        ("seed", True, "seed: received True; it must be a whole number"),
        ("seed", -1, "seed: received -1; it must be from 0 to 2147483647"),
        ("model", 7, "model: received 7; it must be text"),
        ("sample.num_steps", 2.5, "sample.num_steps: received 2.5; it must be a whole number"),
        ("sample.num_steps", 10**9, "sample.num_steps: received 1000000000; it must be from 1"),
        ("sample.guidance_scale", "high", "sample.guidance_scale: received 'high'; it must be a number"),
        ("sample.guidance_scale", [5.0], "sample.guidance_scale: received (5.0,); it must be a number"),
        ("train.lora_targets", [1, 2], "train.lora_targets: received (1, 2); it must be values with commas"),
        ("reward.name", {}, "reward.name"),
        ("reward", None, "it lacks reward.name"),
        ("dtype", "int8", "dtype: received 'int8'; it must be one of"),
        ("train.lora_rank", None, "it lacks train.lora_rank; it is of another version"),
    ],
)
def test_wrong_kinds_are_named(tmp_path, good, key, value, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed(good, key, value)))
    with pytest.raises(InputError) as raised:
        folder.read_config(tmp_path)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(str(path)) and message in line


def test_a_good_config_comes_back_and_free_keys_have_defaults(tmp_path, good):
    for name in ("reward.wait_s", "log.num_images"):
        (tmp_path / "config.json").write_text(json.dumps(changed(good, name, None)))
        config = folder.read_config(tmp_path)
        assert to_json(config) == to_json(config_of()), name
    older = changed(good, "train.ema_decay", None)
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert "ema_decay" not in folder.read_config(tmp_path, complete=False).train


def test_the_config_of_a_run_is_written_once(tmp_path):
    config = config_of()
    folder.refuse_other_run(config, tmp_path)
    before = (tmp_path / "config.json").stat()
    folder.refuse_other_run(config, tmp_path)
    assert (tmp_path / "config.json").stat().st_ino == before.st_ino
    folder.refuse_other_run(config_of(**{"reward.wait_s": "5"}), tmp_path)  # a resumed run may change it
    assert folder.read_config(tmp_path).reward.wait_s == 5.0
    with pytest.raises(InputError, match="^seed: received 1, but the run in this folder has 0"):
        folder.refuse_other_run(config_of(seed="1"), tmp_path)


# ---- metrics.jsonl ----

ROW = {"epoch": 1, "reward_queries": 16, "reward/mean": 0.5}
WRONG_ROWS = {
    "no reward": json.dumps({"epoch": 1, "reward_queries": 16}),
    "reward is text": json.dumps(ROW | {"reward/mean": "high"}),
    "reward is a list": json.dumps(ROW | {"reward/mean": [0.5]}),
    "reward is true": json.dumps(ROW | {"reward/mean": True}),
    "reward is NaN": json.dumps(ROW | {"reward/mean": float("nan")}),
    "another metric is text": json.dumps(ROW | {"time/reward_s": "long"}),
    "no queries": json.dumps({"epoch": 1, "reward/mean": 0.5}),
    "queries are null": json.dumps(ROW | {"reward_queries": None}),
    "queries go back": json.dumps(ROW | {"reward_queries": 8}),
    "an epoch twice": json.dumps(ROW | {"epoch": 0}),
    "half an epoch": json.dumps(ROW | {"epoch": 1.5}),
    "a number without end": '{"epoch": 1, "reward_queries": 1' + "0" * 400 + ', "reward/mean": 1}',
    "null": "null",
    "a list": "[1]",
    "deep": DEEP,
    "an empty line": "",
}


@pytest.mark.parametrize("kind", [*WRONG_ROWS, "not UTF-8", "a folder"])
def test_metrics_that_are_none_are_one_line(tmp_path, kind):
    path = tmp_path / "metrics.jsonl"
    first = json.dumps(ROW | {"epoch": 0, "reward_queries": 8}).encode()
    if kind == "a folder":
        path.mkdir()
    else:
        line = b"\xff\xfe{}" if kind == "not UTF-8" else WRONG_ROWS[kind].encode()
        path.write_bytes(first + b"\n" + line + b"\n")
    with pytest.raises(InputError) as raised:
        metrics.read_metrics(tmp_path)
    text = str(raised.value)
    assert "\n" not in text and str(path) in text and len(text) < 1000
    assert kind == "a folder" or "line 2" in text


def test_a_reward_that_is_null_is_read(tmp_path):
    rows = [ROW | {"epoch": 0, "reward_queries": 8, "reward/mean": None}, ROW]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert metrics.read_metrics(tmp_path) == rows
    folder.finish(tmp_path)
    assert (tmp_path / "reward.png").exists()


def test_the_result_of_a_run_is_on_standard_output(tmp_path, capsys):
    with metrics.Writer(tmp_path) as writer:
        writer.write({"epoch": 0, "reward/mean": 1.0, "reward/std": 0.5, "reward_queries": 64})
        writer.write({"epoch": 1, "reward/mean": 1.75, "reward/std": 0.1, "reward_queries": 128})
    folder.finish(tmp_path)
    printed = capsys.readouterr()
    assert printed.out.startswith("reward 1 -> 1.75 in 128 queries (+1.50 standard deviations of the first epoch). ")
    assert not printed.err


@pytest.mark.parametrize(("epochs", "when"), [(2, ""), (3, " after 128")])
def test_the_result_of_an_evaluated_run_tells_its_last_evaluation(tmp_path, capsys, epochs, when):
    with metrics.Writer(tmp_path) as writer:
        for epoch, gain in list(enumerate((0.1, 0.5678, None)))[:epochs]:
            numbers = {"difference": gain, "standard_error": 0.123, "deviations": 1.25}
            evaluation = {f"eval/reward/{key}": value for key, value in numbers.items()} if gain else {}
            writer.write(
                {"epoch": epoch, "reward/mean": 1.0, "reward/std": 0.5, "reward_queries": 64 * (epoch + 1)} | evaluation
            )
    folder.finish(tmp_path)
    told = (
        f" queries; on equal prompts and noise +0.568 ± 0.12{when} (+1.25 standard deviations of the untrained model's)"
    )
    assert f"{told}. In " in capsys.readouterr().out


def test_a_finished_run_whose_metrics_are_gone_ends_well(tmp_path):
    folder.finish(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- signals ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_is_noted_and_the_second_stops_what_may_be_stopped(number):
    before = [signal.getsignal(other) for other in folder.SIGNALS]
    with folder.Signals(lambda: "the reward") as signals:
        signal.raise_signal(number)
        signal.raise_signal(number)  # not in what may be stopped: a save, say
        assert signals.received == number
        with pytest.raises(Interrupted, match="stopped at once while it waited for the reward") as raised:
            with signals.stoppable():
                signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(number)
    assert raised.value.exit_code == 143
    assert Interrupted(number).exit_code == 128 + number
    assert [signal.getsignal(other) for other in folder.SIGNALS] == before


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with folder.Signals(lambda: "") as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_resumed_run_may_compute_its_reward_elsewhere(tmp_path):
    chosen = {"reward.name": "aesthetic"}
    folder.refuse_other_run(config_of(**chosen), tmp_path)
    folder.refuse_other_run(config_of(**chosen, **{"reward.device": "host", "reward.batch_size": "4"}), tmp_path)
    with pytest.raises(InputError, match="^reward.weights: received 'laion'"):
        folder.refuse_other_run(config_of(**chosen, **{"reward.weights": "laion"}), tmp_path)
