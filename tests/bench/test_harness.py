"""The harness measures what it says: wrong answers get no time, arms are interleaved, ratios are the rounds' own."""

import contextlib
import math
import time
from dataclasses import replace

import pytest
import torch

from bench.clock import clock_of
from bench.harness import (
    Absent,
    Arm,
    Budget,
    Call,
    Model,
    OutOfTime,
    Runner,
    Setting,
    largest_error,
    measure,
    paired,
    percentiles,
    time_rounds,
)
from bench.memory import extra_peak

CPU = torch.device("cpu")
BUDGET = Budget(seconds=0.0, min_rounds=4, max_rounds=4, warmup_seconds=0.0)


def doubling(name, factor=2.0, kind="ours", **options):
    """An arm that multiplies x by `factor`, where 2 is asked for."""
    return Arm(name, "", kind, lambda inputs: Call(lambda: [factor * inputs["x"]]), **options)


def setting(*arms):
    return Setting(
        op="double",
        name="double",
        config={},
        inputs=lambda copy: {"x": torch.linspace(1, 2, 100)},
        truth=lambda inputs: [2 * inputs["x"].double()],
        plain=lambda inputs: [inputs["x"] + inputs["x"]],
        outputs=("y",),
        dtype=torch.float32,
        arms=arms,
        model=Model(floor_bytes=800, kernel_bytes=800, flops=0),
    )


def arms_of(row):
    return {arm["name"]: arm for arm in row["arms"]}


def test_a_wrong_answer_gets_no_time():
    row = measure(setting(doubling("right"), doubling("wrong", 2.001)), CPU, BUDGET, lambda _: None)
    told = arms_of(row)
    assert told["right"]["status"] == "ok"
    assert told["right"]["seconds"]["rounds"] == 3  # its share of the time is zero
    assert told["wrong"]["status"] == "wrong"
    assert "seconds" not in told["wrong"]
    assert "off by 0.002" in told["wrong"]["reason"]
    assert row["ours"] == "right"


def test_ours_is_held_to_twice_the_error_of_plain_pytorch_and_peers_to_ten_times_that():
    off = 2 * (1 + 8 * torch.finfo(torch.float32).eps)
    row = measure(setting(doubling("ours", off), doubling("peer", off, "peer")), CPU, BUDGET, lambda _: None)
    assert arms_of(row)["ours"]["status"] == "wrong"
    assert arms_of(row)["peer"]["status"] == "ok"


def test_an_answer_that_is_not_finite_is_wrong():
    row = measure(setting(doubling("nan", float("nan"), "peer")), CPU, BUDGET, lambda _: None)
    assert arms_of(row)["nan"]["status"] == "wrong"


def test_an_arm_may_be_held_to_its_own_law():
    law = doubling("halves", 0.5, "peer", check=lambda inputs, results: largest_error(results[0], inputs["x"] / 2))
    assert arms_of(measure(setting(law), CPU, BUDGET, lambda _: None))["halves"]["status"] == "ok"
    broken = doubling("thirds", 0.3, "peer", check=lambda inputs, results: largest_error(results[0], inputs["x"] / 2))
    assert arms_of(measure(setting(broken), CPU, BUDGET, lambda _: None))["thirds"]["status"] == "wrong"


def test_absent_and_broken_arms_are_named_and_the_rest_go_on():
    def absent(inputs):
        raise Absent("libdouble is not installed (pip install libdouble)")

    def broken(inputs):
        raise RuntimeError("no kernel image\nsecond line")

    said = []
    asked = setting(Arm("a", "", "peer", absent), Arm("b", "", "peer", broken), doubling("c"))
    told = arms_of(measure(asked, CPU, BUDGET, said.append))
    assert told["a"]["status"] == "absent"
    assert told["a"]["reason"] == "libdouble is not installed (pip install libdouble)"
    assert told["b"]["status"] == "failed"
    assert told["b"]["reason"] == "RuntimeError: no kernel image"
    assert told["c"]["status"] == "ok"
    assert len(said) == 2


def test_nothing_is_begun_after_the_deadline_but_the_arm_that_is_at_work():
    begun = []

    def slow(inputs):
        begun.append("b")
        time.sleep(0.03)
        return Call(lambda: [2.0 * inputs["x"]])

    asked = setting(doubling("a"), Arm("b", "", "peer", slow), doubling("c"))
    told = []
    with pytest.raises(OutOfTime):
        measure(asked, CPU, replace(BUDGET, deadline=time.monotonic() + 0.02), lambda _: None, told.append)
    assert begun == ["b"] and not any("c:" in line for line in told)
    assert [line.split(":")[0].strip() for line in told[1:]] == ["a", "b"], "a line for each arm"


@pytest.mark.parametrize(("rounds", "given_up"), [(1, True), (3, False)])
def test_times_count_where_the_deadline_leaves_three_rounds(rounds, given_up, monkeypatch):
    """The time is over after so many rounds of ten."""
    runner = Runner(doubling("x"), [Call(list)], [])
    monkeypatch.setattr(Budget, "over", property(lambda _: len(runner.times) >= rounds))
    with pytest.raises(OutOfTime) if given_up else contextlib.nullcontext():
        time_rounds([runner], clock_of("cpu"), Budget(seconds=1e9, min_rounds=10, max_rounds=10))
    assert len(runner.times) == rounds


def test_every_round_runs_every_arm_once_in_changing_order_after_its_reset():
    ran = []

    def noting(name):
        call = Call(lambda: ran.append(name) or [], reset=lambda: ran.append(f"reset {name}"))
        return Runner(Arm(name, "", "peer", lambda _: call), [call], [])

    runners = [noting(name) for name in "abc"]
    time_rounds(runners, clock_of("cpu"), Budget(seconds=0.0, min_rounds=12, max_rounds=12))
    rounds = [ran[i : i + 6] for i in range(0, len(ran), 6)]
    # An arm that has used its share of the time stops after three rounds; the share is zero here.
    assert len(rounds) == 3
    for one in rounds:
        assert sorted(one[1::2]) == ["a", "b", "c"]
        assert all(one[i] == f"reset {one[i + 1]}" for i in (0, 2, 4))
    assert len({tuple(one) for one in rounds}) > 1


def test_ratios_are_medians_of_the_rounds_own_ratios():
    call = Call(list)
    fast, slow = (Runner(doubling("x"), [call], [], times=times) for times in ([1.0, 10.0, 1.0], [3.0, 30.0, 3.0]))
    assert paired(slow, fast) == {"p20": 3.0, "p50": 3.0, "p80": 3.0}


def test_percentiles():
    assert percentiles([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx({"p20": 1.8, "p50": 3.0, "p80": 4.2})
    assert percentiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}


def test_largest_error():
    exact = torch.arange(6.0).view(2, 3).double()
    assert largest_error(exact.float(), exact) == 0
    assert largest_error(exact.float() + torch.tensor([0.0, 0.5, -0.25]), exact) == 0.5
    assert math.isinf(largest_error(torch.full((2, 3), float("nan")), exact))
    with pytest.raises(ValueError, match="shape"):
        largest_error(exact[:1], exact)


def test_extra_peak_sees_what_a_call_allocates():
    """A call that holds 64 MB beside a 64 MB result, and one that makes nothing."""

    def large():
        held = torch.ones(2**24)
        return [held + 1]

    peak, how = extra_peak(large, CPU)
    if peak is None:
        pytest.skip(how)
    assert 1.9 * 2**26 < peak < 2.4 * 2**26
    kept = torch.ones(2**24)
    small, _ = extra_peak(lambda: kept.add_(1), CPU)
    assert small < 2**24


def test_an_arm_that_breaks_while_it_is_timed_is_named():
    """Say, a peer that runs out of memory the third time."""
    runs = []

    def bind(inputs):
        def run():
            runs.append(1)
            if len(runs) > 2:
                raise RuntimeError("out of everything")
            return [2 * inputs["x"]]

        return Call(run)

    row = measure(setting(doubling("a"), Arm("b", "", "peer", bind)), CPU, BUDGET, lambda _: None)
    told = arms_of(row)
    assert told["b"]["status"] == "failed"
    assert told["b"]["reason"] == "RuntimeError: out of everything"
    assert "seconds" not in told["b"]
    assert told["a"]["status"] == "ok"
