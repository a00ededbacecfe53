"""How the autoscalers of deploy/ meet a load that rises tenfold at once: a simulation.

    python -m benchmarks.autoscale --picture docs/pictures/autoscale.png

A fluid model in steps of a tenth of a second. Each pod serves what one CPU does, queues up to
``max_queue_images``, and refuses the rest; callers do not retry. The autoscaler is Kubernetes' own
formula with the targets and the behaviour that the manifests hold. What is not measured, and
assumed: a pod is ready 15 s after it was asked for (the node is there, and the image on it), and
both metrics are means over the last 45 s.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from service.config import ServerConfig

DEPLOY = Path(__file__).parents[1] / "deploy"
STEP_S = 0.1
SYNC_S = 15.0  # the HPA controller's period
METRIC_WINDOW_S = 45.0  # of the rate in components/hpa/adapter-rule.yaml
POD_START_S = 15.0
TOLERANCE = 0.1
HEADROOM = 1.5  # maxReplicas over what the high load needs
RISE_AT_S, SECONDS = 60.0, 420.0


@dataclass(frozen=True)
class Scaler:
    """What an autoscaler goes by.

    Attributes:
        cpu: Utilisation to reach, 0 to 1.
        wait_s: Mean wait in the queue to reach, in seconds, or None.
        percent, pods: May be added each ``period_s``, the larger of the two.
        period_s: Of that.
    """

    cpu: float
    wait_s: float | None
    percent: float
    pods: int
    period_s: float


def scaler(with_queue: bool) -> Scaler:
    """As components/hpa-cpu has it, or components/hpa."""
    spec = yaml.safe_load((DEPLOY / "components/hpa-cpu/hpa.yaml").read_text())["spec"]
    policies = {p["type"]: p for p in spec["behavior"]["scaleUp"]["policies"]}
    (cpu,) = (metric["resource"]["target"]["averageUtilization"] for metric in spec["metrics"])
    return Scaler(
        cpu / 100,
        _wait_target_s() if with_queue else None,
        policies["Percent"]["value"],
        policies["Pods"]["value"],
        policies["Percent"]["periodSeconds"],
    )


def _wait_target_s() -> float:
    component = yaml.safe_load((DEPLOY / "components/hpa/kustomization.yaml").read_text())
    (operation,) = yaml.safe_load(component["patches"][0]["patch"])
    quantity: str = operation["value"]["pods"]["target"]["averageValue"]
    return float(quantity.removesuffix("m")) / 1000


@dataclass
class Pods:
    """Pods that became ready together.

    Attributes:
        count: How many.
        ready_s: When.
        queued: Images that wait in each.
    """

    count: int
    ready_s: float
    queued: float = 0.0


@dataclass
class Run:
    """What came of it, a value for each step.

    Attributes:
        offered, answered: Images per second.
        pods: Ready.
    """

    offered: list[float] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    pods: list[int] = field(default_factory=list)

    @property
    def refused_share(self) -> float:
        """Of all images after the rise."""
        first = round(RISE_AT_S / STEP_S)
        return 1 - sum(self.answered[first:]) / sum(self.offered[first:])

    @property
    def recovered_s(self) -> float:
        """From the rise until, for good, less than 1 % is refused."""
        late = [
            step * STEP_S
            for step, (o, a) in enumerate(zip(self.offered, self.answered, strict=True))
            if a < 0.99 * o
        ]
        return max(0.0, late[-1] + STEP_S - RISE_AT_S) if late else 0.0


class Cluster:
    """Pods, their queues, and what the autoscaler sees of them.

    Args:
        scaler: What the autoscaler goes by.
        capacity: Images per second of one pod.
        age_s: Connections' age, over which callers find new pods; 0 where calls are balanced.
        pods: At the start.
        most: ``maxReplicas``.
    """

    def __init__(self, scaler: Scaler, capacity: float, age_s: float, pods: int, most: int) -> None:
        self._scaler, self._capacity, self._age_s, self._most = scaler, capacity, age_s, most
        self._groups = [Pods(pods, -math.inf)]
        window = round(METRIC_WINDOW_S / STEP_S)
        self._used: deque[float] = deque(maxlen=window)  # CPUs, over all pods
        self._waits: deque[float] = deque(maxlen=window)  # mean seconds, over all pods
        self._asked = [(-math.inf, pods)]

    def step(self, now: float, offered: float) -> tuple[float, int]:
        """Answers for one step; images per second that were, and pods that were ready."""
        ready = [group for group in self._groups if group.ready_s <= now]
        weights = [group.count * self._known(group, now) for group in ready]
        answered = waited = 0.0
        for group, weight in zip(ready, weights, strict=True):
            arriving = offered * weight / sum(weights) / group.count * STEP_S
            room = ServerConfig.max_queue_images
            waiting = min(group.queued + arriving, room + self._capacity * STEP_S)
            served = min(waiting, self._capacity * STEP_S)
            group.queued = waiting - served
            answered += served * group.count / STEP_S
            waited += group.queued / self._capacity * group.count
        count = sum(group.count for group in ready)
        self._used.append(answered / self._capacity)
        self._waits.append(waited / count)
        return answered, count

    def _known(self, group: Pods, now: float) -> float:
        """Share of the callers that have found these pods."""
        return min(1.0, (now - group.ready_s + STEP_S) / self._age_s) if self._age_s else 1.0

    def scale(self, now: float) -> None:
        """One look of the autoscaler. Pods that start count, with nothing to do."""
        ready = sum(group.count for group in self._groups if group.ready_s <= now)
        total = sum(group.count for group in self._groups)
        used = sum(self._used) / len(self._used) / self._scaler.cpu
        desired = used if abs(used / total - 1) > TOLERANCE else total
        if self._scaler.wait_s is not None:
            wait = sum(self._waits) / len(self._waits)
            by_wait = ready * wait / self._scaler.wait_s
            desired = max(desired, by_wait if abs(by_wait / total - 1) > TOLERANCE else 0)
        before = next(n for at, n in reversed(self._asked) if at <= now - self._scaler.period_s)
        limit = max(before * (1 + self._scaler.percent / 100), before + self._scaler.pods)
        added = min(math.ceil(min(desired, limit)), self._most) - total
        if added > 0:  # fewer only after five minutes without need: not within this picture
            self._groups.append(Pods(added, now + POD_START_S))
            self._asked.append((now, total + added))


def simulate(with_queue: bool, *, capacity: float, age_s: float, low: float, high: float) -> Run:
    """One load that is ``low`` images per second, and ``high`` from ``RISE_AT_S`` on."""
    goal = scaler(with_queue)
    few, many = (math.ceil(load / capacity / goal.cpu) for load in (low, high))
    cluster = Cluster(goal, capacity, age_s, few, math.ceil(many * HEADROOM))
    run = Run()
    for number in range(round(SECONDS / STEP_S)):
        now = number * STEP_S
        offered = high if now >= RISE_AT_S else low
        answered, pods = cluster.step(now, offered)
        if number % round(SYNC_S / STEP_S) == 0:
            cluster.scale(now)
        run.offered.append(offered)
        run.answered.append(answered)
        run.pods.append(pods)
    return run


def draw(runs: dict[str, Run], path: Path) -> None:
    """Load and pods over time, a column for each run."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import, and seldom needed

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(
        2, len(runs), figsize=(12, 5), sharex=True, sharey="row", layout="constrained"
    )
    for column, (title, run) in enumerate(runs.items()):
        seconds = [step * STEP_S - RISE_AT_S for step in range(len(run.pods))]
        load, pods = axes[:, column]
        load.fill_between(seconds, run.answered, run.offered, color="#d1495b", label="refused")
        load.fill_between(seconds, run.answered, color="#8fb8a8", label="answered")
        load.set_title(title, fontsize=10)
        load.yaxis.set_major_formatter(lambda value, _: f"{value / 1e6:.1f} M")
        pods.plot(seconds, run.pods, color="#30638e")
        pods.set_xlabel("seconds after the rise")
    axes[0, 0].set_ylabel("images per second")
    axes[0, 0].legend(loc="lower right", fontsize=8)
    axes[1, 0].set_ylabel("pods ready")
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def cases(arguments: Any) -> dict[str, Run]:
    """Each autoscaler, with callers that find new pods as connections age, and with a balancer."""
    load = {"capacity": arguments.capacity, "low": arguments.high / 10, "high": arguments.high}
    return {
        f"{scales}, {spreads}": simulate(with_queue, age_s=age_s, **load)
        for scales, with_queue in (("CPU alone", False), ("CPU and queue", True))
        for spreads, age_s in (("connections of 60 s", 60.0), ("calls balanced", 0.0))
    }


def main(argv: list[str]) -> int:
    """Prints a table, and draws a picture if asked to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.autoscale", description=__doc__)
    parser.add_argument("--capacity", type=float, default=20_000, help="images/s of a pod")
    parser.add_argument("--high", type=float, default=1e6, help="images/s after the rise")
    parser.add_argument("--picture", type=Path, help="where to draw it")
    arguments = parser.parse_args(argv)
    runs = cases(arguments)
    print(
        "| scaled by | refused in the 6 minutes | until less than 1 % is refused | pods at most |"
    )
    print("|---|---|---|---|")
    for title, run in runs.items():
        print(
            f"| {title} | {run.refused_share:.1%} | {run.recovered_s:.0f} s | {max(run.pods):,} |"
        )
    if arguments.picture:
        draw(runs, arguments.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
