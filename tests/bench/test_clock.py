"""A GPU's time is the GPU's: a made-up device, whose host time and device time are known, shows what enters which."""

import pytest

from bench.clock import LONGEST_LEAD_SECONDS, DeviceClock, lead
from bench.harness import Arm, Budget, Call, Runner, once, time_rounds, warm_up
from bench.report import row as report_row

US = 1e-6
BUDGET = Budget(seconds=0.0, min_rounds=1, max_rounds=1, warmup_seconds=0.0)


class Device:
    """A device with a queue, and the host beside it. Time passes only where a call or the device takes some."""

    def __init__(self):
        self.host = self.free = 0.0
        self.spun = []

    def work(self, host, device):
        """What a call does: so much Python, then a launch of so much work."""
        self.host += host
        self.free = max(self.free, self.host) + device

    def block(self):
        """What a call does that wants a value back: the host waits."""
        self.host = max(self.host, self.free)

    def now(self):
        return self.host

    # A stream's methods.

    def synchronize(self):
        self.block()

    def spin(self, seconds):
        self.spun.append(seconds)
        self.work(0.0, seconds)

    def mark(self):
        return max(self.free, self.host)

    def passed(self, mark):
        return mark <= self.host

    def between(self, begin, end):
        self.host = max(self.host, end)
        return end - begin


@pytest.fixture
def device():
    return Device()


def timed(device, call, *, paced=False, copies=1):
    runner = Runner(Arm("a", "", "peer", lambda _: call), [call] * copies, [], paced=paced)
    clock = DeviceClock(device, device.now)
    warm_up(runner, clock, BUDGET)
    time_rounds([runner], clock, BUDGET)
    return runner


def calling(device, host, work):
    return Call(lambda: device.work(host, work) or [])


@pytest.mark.parametrize("host", [5 * US, 110 * US, 490 * US, 660 * US])
@pytest.mark.parametrize("work", [15 * US, 143 * US, 2200 * US])
def test_host_time_before_and_between_launches_does_not_enter_a_gpu_time(device, host, work):
    runner = timed(device, calling(device, host, work))
    assert runner.times == [pytest.approx(work)]
    assert runner.host_seconds == pytest.approx(host)
    assert runner.queued


def test_on_an_idle_device_it_would(device):
    """What the lead is for: without it the first call's Python is in the time."""
    clock = DeviceClock(device, device.now)
    timing = clock.time([lambda: device.work(490 * US, 66 * US)])
    assert timing.seconds == pytest.approx(556 * US)
    assert not timing.queued


def test_one_timing_spans_at_least_a_millisecond_of_the_devices_own_work(device):
    assert timed(device, calling(device, 490 * US, 50 * US)).inner == 20
    assert timed(device, calling(device, 490 * US, 5000 * US)).inner == 1
    assert timed(device, calling(device, 490 * US, 50 * US), copies=3).inner == 21


def test_a_replay_is_counted_per_call_it_holds(device):
    replay = Call(lambda: device.work(8 * US, 64 * US) or [], count=8)
    runner = timed(device, replay)
    assert runner.times == [pytest.approx(8 * US)]
    assert runner.host_seconds == pytest.approx(US)


def test_a_call_that_waits_for_the_device_is_told_apart(device):
    """Its host time cannot be hidden: the device idles until the host goes on."""

    def run():
        device.work(10 * US, 100 * US)
        device.block()
        device.work(300 * US, 100 * US)
        return []

    runner = timed(device, Call(run))
    assert runner.times[0] >= 500 * US * 0.99
    assert not runner.queued


def test_a_paced_setting_is_timed_as_a_loop_runs_it(device):
    """A training step: what the host does between the launches is part of what the user waits for."""
    runner = timed(device, calling(device, 3000 * US, 1000 * US), paced=True)
    assert runner.times == [pytest.approx(4000 * US)]
    assert device.spun == []


def test_the_lead_is_bounded(device):
    assert lead(490 * US) > 490 * US
    assert lead(10.0) == LONGEST_LEAD_SECONDS
    runner = timed(device, calling(device, 0.2, 1e-3))
    assert max(device.spun) == LONGEST_LEAD_SECONDS
    assert not runner.queued
    assert once(runner, DeviceClock(device, device.now)).seconds == pytest.approx(0.2 - LONGEST_LEAD_SECONDS + 1e-3)


def test_the_report_shows_what_the_host_takes_and_where_it_is_in_the_time_too():
    def arm(name, queued):
        seconds = {"p20": 1e-3, "p50": 1e-3, "p80": 1e-3, "rounds": 1, "calls_per_round": 1}
        return {"name": name, "kind": "ours", "status": "ok", "seconds": seconds, "host_us": 490.0, "queued": queued}

    lines = report_row({"arms": [arm("one", True), arm("two", False)], "ours": "one"}).splitlines()
    assert "host" in lines[0]
    assert "490 us" in lines[1] and "490 us +" not in lines[1]
    assert "490 us +" in lines[2]
