"""Comparing runs: smoothing, averages, queries to a level, intervals and groups, all against hand-worked numbers."""

import json

import numpy as np
import pytest
from PIL import Image

from ddpo_jax.commands import _cli as cli
from ddpo_jax.commands import compare as command
from ddpo_jax.config import default_config
from ddpo_jax.config.keys import to_json
from ddpo_jax.config.override import override
from ddpo_jax.config.resolve import resolve
from ddpo_jax.studies import compare, curves
from ddpo_jax.studies.curves import Curve


def curve(values, step=10, seconds=2.0):
    n = len(values)
    queries = step * np.arange(1, n + 1, dtype=float)
    return Curve(queries, seconds * np.arange(1, n + 1, dtype=float), np.array(values, float))


def test_running_average_takes_the_last_queries():
    queries, values = np.array([10.0, 20.0, 30.0, 40.0]), np.array([1.0, 2.0, 6.0, 4.0])
    assert curves.running_average(queries, values, 20.0).tolist() == [1.0, 1.5, 4.0, 5.0]
    assert curves.running_average(queries, values, 10.0).tolist() == values.tolist()
    assert curves.running_average(queries, values, 3.0).tolist() == values.tolist()  # less than an epoch
    assert curves.running_average(queries, values, 1e9)[-1] == 13 / 4


def test_running_average_counts_a_point_as_often_as_it_has_queries():
    queries, values = np.array([10.0, 40.0]), np.array([1.0, 5.0])
    assert curves.running_average(queries, values, 100.0).tolist() == [1.0, (10 * 1 + 30 * 5) / 40]


def test_average_of_runs_where_all_have_data():
    both = curves.average([curve([0.0, 2.0, 4.0]), curve([2.0, 2.0])])
    assert both.queries.tolist() == [10.0, 20.0]
    assert both.mean.tolist() == [1.0, 2.0]
    assert both.std.tolist() == [pytest.approx(2**0.5), 0.0]
    interpolated = curves.average([curve([0.0, 4.0], step=20), curve([0.0, 1.0, 2.0, 3.0], step=10)])
    assert interpolated.queries.tolist() == [20.0, 40.0]
    assert interpolated.mean.tolist() == [0.5, 3.5]


def test_queries_to_a_level_are_linear_between_points():
    runs = [curve([0.0, 1.0, 3.0, 2.0])]
    assert curves.queries_to(runs, 2.0) == 25.0  # half way from 20 to 30
    assert curves.queries_to(runs, 3.0) == 30.0
    assert curves.queries_to(runs, 0.0) == 10.0  # there from the start
    assert curves.queries_to(runs, 3.5) is None
    assert curves.queries_to([curve([-3.0, -1.0])], -2.0) == 15.0


def test_interval_is_students():
    assert curves.interval(np.array([4.0])) == (4.0, None)
    mean, half_width = curves.interval(np.array([1.0, 2.0, 3.0]))
    assert mean == 2.0 and half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t(0.975, 2) = 4.302653


def test_speed_up_is_a_ratio_of_queries():
    base, fast, slow = curve([0.0, 1.0, 2.0, 3.0]), curve([1.0, 3.0, 4.0, 4.0]), curve([0.0, 0.0, 1.0, 1.0])
    assert curves.speed_up([base], [fast]) == (40.0 / 20.0, None)
    assert curves.speed_up([base], [slow]) == (None, None)
    assert curves.speed_up([base], [base]) == (1.0, None)
    falling, rising = curve([3.0, 1.0, 2.0]), curve([3.0, 4.0, 5.0])  # the baseline's end is below its beginning
    assert curves.speed_up([falling], [rising]) == (None, None)


def test_speed_up_interval_covers_the_seeds():
    base = [curve([0.0, 1.0, 2.0, 3.0])] * 3
    ratio, (low, high) = curves.speed_up(base, [curve([1.0, 3.0, 3.0, 3.0])] * 3)
    assert ratio == low == high == 2.0  # equal seeds: no spread
    # seeds that reach 3 at 20 and at 40 queries: a resample of either alone has probability 8/27 and 1/27 > 2.5 %
    ratio, (low, high) = curves.speed_up(base, [curve([1.0, 3.0, 3.0, 3.0])] * 2 + [curve([0.0, 1.0, 2.0, 3.0])])
    assert (low, high) == (1.0, 2.0) and 1.0 <= ratio <= 2.0
    never = [curve([1.0, 3.0, 3.0, 3.0]), curve([0.0, 0.0, 0.0, 0.0])]
    assert curves.speed_up(base, never)[1][0] == 0.0


def write(folder, rewards, seed=0, step=10, **overrides):
    folder.mkdir(parents=True)
    config = default_config()
    override(config, [("model", "mini"), *((key, str(value)) for key, value in overrides.items())])
    config.seed = seed
    (folder / "config.json").write_text(to_json(resolve(config, "cpu")[0]))
    rows = [
        {"epoch": i, "reward_queries": step * (i + 1), "reward/mean": r, "time/rollout_s": 1.0, "time/update_s": 0.5}
        for i, r in enumerate(rewards)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    loop = {"algorithm.name": "loop"}
    return [
        write(tmp_path / "loop0", [1.0, 3.0, 4.0, 4.0], 0, **loop),
        write(tmp_path / "loop1", [1.0, 3.0, 4.0, 4.0], 1, num_epochs=40, **loop),
        write(tmp_path / "ddpo0", [0.0, 1.0, 2.0, 3.0], 0),
        write(tmp_path / "ddpo1", [0.0, 1.0, 2.0, 3.0], 1, **{"log.num_images": 4}),
        write(tmp_path / "k8", [0.0, 0.0, 1.0, 1.0], 0, **{"prompts.samples_per_prompt": 8}),
    ]


def test_runs_are_grouped_by_what_differs(folders):
    groups = compare.group(compare.read_runs(folders))
    assert [group.label for group in groups] == [
        "algorithm=loop, samples_per_prompt=4",
        "algorithm=ddpo, samples_per_prompt=4",
        "algorithm=ddpo, samples_per_prompt=8",
    ]
    assert [len(group.runs) for group in groups] == [2, 2, 1]  # seed, length and logging do not make a group
    (alone,) = compare.group(compare.read_runs(folders[:2]))
    assert alone.label == "all runs"


def test_a_members_option_is_named_where_its_name_does_not_tell_it(tmp_path):
    runs = [
        write(tmp_path / "a", [0.0], **{"algorithm.buffer_size": 8}),
        write(tmp_path / "b", [0.0]),
        write(tmp_path / "c", [0.0], **{"algorithm.name": "loop"}),
    ]
    labels = [group.label for group in compare.group(compare.read_runs(runs))]
    assert labels == ["buffer_size=8, algorithm=ddpo", "buffer_size=32, algorithm=ddpo", "algorithm=loop"]


def test_a_run_of_before_an_option_came_has_its_default(tmp_path):
    """A key of every config, and options of a member's own."""
    old, new = (write(tmp_path / name, [0.0], **{"algorithm.name": "ddpo_iskl"}) for name in ("old", "new"))
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["replay"]["max_gib"], config["algorithm"]["penalty_clip"], config["algorithm"]["penalty_baseline"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert [group.label for group in compare.group(compare.read_runs([old, new]))] == ["all runs"]
    other = write(tmp_path / "other", [0.0], **{"algorithm.name": "ddpo_iskl", "algorithm.penalty_clip": True})
    labels = [group.label for group in compare.group(compare.read_runs([old, other]))]
    assert labels == ["penalty_clip=False", "penalty_clip=True"]


def test_an_absent_key_whose_default_the_machine_decides_makes_no_group(tmp_path):
    old, new = (write(tmp_path / name, [0.0]) for name in ("old", "new"))
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["train"]["recompute_log_prob"], config["train"]["clip_range"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert [group.label for group in compare.group(compare.read_runs([old, new]))] == ["all runs"]


def test_where_a_reward_is_asked_makes_no_group_and_no_token_is_told(tmp_path):
    remote = {"reward.name": "remote", "reward.url": "http://h:8000", "reward.token": "secret"}
    seeds = [
        write(
            tmp_path / str(port), [0.0, 1.0], port, **remote | {"reward.url": f"http://h:{port}", "reward.token": token}
        )
        for port, token in ((8000, "secret"), (8001, "other"))
    ]
    (alone,) = compare.group(compare.read_runs(seeds))
    assert alone.label == "all runs" and alone.differs == {}


def test_numbers_of_a_label_are_short(tmp_path):
    rates = [write(tmp_path / str(i), [0.0], **{"train.learning_rate": 0.1 * i}) for i in (1, 3)]  # 0.30000000000000004
    assert [group.label for group in compare.group(compare.read_runs(rates))] == [
        "learning_rate=0.1",
        "learning_rate=0.3",
    ]


def test_the_baseline_is_the_plainest_or_as_asked(folders):
    groups = compare.group(compare.read_runs(folders))
    assert compare.choose_baseline(groups, "").label == "algorithm=ddpo, samples_per_prompt=4"
    assert compare.choose_baseline(groups, "algorithm=loop").label == "algorithm=loop, samples_per_prompt=4"
    with pytest.raises(ValueError, match="--baseline: received 'algorithm=ddpo', which 2 groups match"):
        compare.choose_baseline(groups, "algorithm=ddpo")
    with pytest.raises(ValueError, match="which no groups match; groups are algorithm=loop"):
        compare.choose_baseline(groups, "algorithm=grpo")


def test_the_command_writes_table_json_and_plots(folders, tmp_path, capsys):
    out = tmp_path / "out"
    code = cli.run(command.main, [*folders, "--smooth=10", f"--out={out}"])
    assert code == 0
    text = capsys.readouterr().out
    assert "algorithm=ddpo, samples_per_prompt=4 (baseline)  2" in text and "not reached" in text
    result = json.loads((out / "compare.json").read_text())
    loop, ddpo, k8 = result["groups"]
    assert (result["level"], result["smoothing_queries"]) == (3.0, 10)
    assert loop["final"] == {"mean": 4.0, "half_width": 0.0}
    assert (loop["queries_to_baseline"], loop["speed_up"], loop["speed_up_interval"]) == (20.0, 2.0, [2.0, 2.0])
    assert (ddpo["queries_to_baseline"], ddpo["speed_up"]) == (40.0, 1.0)
    assert (k8["queries_to_baseline"], k8["speed_up"], k8["final"]["half_width"]) == (None, None, None)
    assert loop["curve"]["wall_s"] == [1.5, 3.0, 4.5, 6.0] and loop["curve"]["mean"] == [1.0, 3.0, 4.0, 4.0]
    for name in ("compare_queries.png", "compare_time.png"):
        assert Image.open(out / name).size[0] > 500


def test_smoothing_follows_the_length_of_the_runs(folders, tmp_path):
    short = compare.compare(compare.read_runs(folders), tmp_path / "short")
    assert short["smoothing_queries"] == 40 / 8
    long = write(tmp_path / "long", [0.0] * 9, step=500)
    assert compare.compare(compare.read_runs([long]), tmp_path / "long_out")["smoothing_queries"] == 500


def test_wrong_input_is_one_line(folders, tmp_path, capsys):
    assert cli.run(command.main, [str(tmp_path / "nowhere"), folders[0]]) == 2
    assert "RUN_DIR: received" in capsys.readouterr().err
    assert cli.run(command.main, [folders[0], "--metric=reward/maen"]) == 2
    assert "use reward/mean" in capsys.readouterr().err
    assert cli.run(command.main, []) == 2


# ---- evaluations in training ----


def evaluated(folder, values, seed, untrained=1.0, calls=100, **overrides):
    """A run whose evaluations are ``values``, one an epoch of 10 queries."""
    write(folder, [0.0] * len(values), seed, **overrides)
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, value in zip(rows, values, strict=True):
        row |= {"eval/reward/mean": value, "eval/reward/difference": value - untrained, "compute/denoiser_calls": calls}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_evaluations_are_compared_from_the_untrained_model_on(tmp_path, capsys):
    """DDPO gains 2 and 2 in 20 queries; the other 4 and 6, reaches +2 after 8 queries, with calls twice as dear."""
    hard = {"replay.name": "hard"}
    runs = [
        evaluated(tmp_path / "a0", [2.0, 3.0], 0),
        evaluated(tmp_path / "a1", [2.0, 3.0], 1),
        evaluated(tmp_path / "b0", [3.5, 5.0], 0, calls=200, **hard),
        evaluated(tmp_path / "b1", [3.5, 7.0], 1, calls=200, **hard),
    ]
    result = compare.compare(compare.read_runs(runs), tmp_path / "out")
    assert result["metric"] == "eval/reward/mean" and result["smoothing_queries"] == 0
    base, other = result["groups"]
    assert base["curve"]["reward_queries"] == [0.0, 10.0, 20.0] and base["curve"]["mean"] == [1.0, 2.0, 3.0]
    assert other["queries_to_baseline"] == 8.0 and other["speed_up"] == 2.5
    told = other["improvement"]
    assert told["gain"]["value"] == 5.0 and told["normalised_gain"]["value"] == 2.5
    assert told["gain"]["interval"] == (4.0, 6.0) and told["normalised_gain"]["interval"] == (2.0, 3.0)
    assert told["probability"] == {"value": 1.0, "interval": (1.0, 1.0)}
    assert told["call_speed_up"]["value"] == 1.25  # 2.5 times fewer queries, each twice as dear
    assert base["improvement"]["probability"]["value"] == 0.5
    text = compare.table(result)
    assert "of the baseline's" in text and "2.5 [2, 3]" in text and "1.25" in text


def test_nothing_is_told_in_units_of_a_baseline_that_gains_nothing(tmp_path):
    runs = [
        evaluated(tmp_path / "a0", [0.9, 0.5], 0),
        evaluated(tmp_path / "a1", [0.9, 0.7], 1),
        evaluated(tmp_path / "b0", [3.5, 5.0], 0, **{"replay.name": "hard"}),
    ]
    result = compare.compare(compare.read_runs(runs), tmp_path / "out")
    base, other = (entry["improvement"] for entry in result["groups"])
    assert other["normalised_gain"] == {"value": None, "interval": None} and other["gain"]["value"] == 4.0
    assert base["normalised_gain"]["value"] == 1.0 and base["gain"]["value"] < 0
    assert "inf" not in compare.table(result)


def test_runs_without_evaluations_are_compared_by_their_training_curves(tmp_path):
    runs = [evaluated(tmp_path / "a", [2.0, 3.0], 0), write(tmp_path / "b", [1.0, 2.0], 1)]
    result = compare.compare(compare.read_runs(runs), tmp_path / "out")
    assert result["metric"] == "reward/mean" and "improvement" not in result["groups"][0]
