"""The clock: a registry of what runs in the background, by name.

Owns when a job runs. It promises that a job never runs beside itself, and that a
run which comes too late happens once instead of several times. What a job does,
and which errors it survives, is its owner's affair.

Threads: APScheduler runs each job in a thread of its own pool.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from apscheduler.schedulers.background import BackgroundScheduler

SOONEST_SECONDS = 1.0
"""A job with jitter first runs after this time at the earliest."""


@dataclass(frozen=True, slots=True)
class Job:
    """Something that the clock runs again and again."""

    name: str
    run: Callable[[], object]
    every_seconds: float
    jitter_seconds: float = 0.0
    """Each run is moved by up to this time, and the first comes within it. So processes that were started
    together do not all run the job at once."""
    for_commands: bool = False
    """Whether commands need it too, or only the service."""


class Jobs:
    """The jobs of this process. Without ``start`` nothing runs in the background: tests call ``run``."""

    def __init__(self, *, now: Callable[[], datetime], uniform: Callable[[float, float], float]) -> None:
        self._now = now
        self._uniform = uniform
        self._jobs: dict[str, Job] = {}
        self._scheduler = BackgroundScheduler(timezone="UTC")

    def add(self, job: Job) -> None:
        """Register a job, before ``start``. Raises ValueError if there is one of this name."""
        if job.name in self._jobs:
            raise ValueError(f"there is a job named {job.name!r} already")
        self._jobs[job.name] = job

    def run(self, name: str) -> None:
        """Run a job once, in this thread. Raises KeyError if there is none of this name."""
        self._jobs[name].run()

    def start(self, *, service: bool) -> None:
        """Run the jobs from now on: all of them, or only those that commands need."""
        for job in self._jobs.values():
            if service or job.for_commands:
                self._schedule(job)
        self._scheduler.start()

    def _schedule(self, job: Job) -> None:
        first = {}
        if job.jitter_seconds:
            soon = self._uniform(SOONEST_SECONDS, job.jitter_seconds)
            first["next_run_time"] = self._now() + timedelta(seconds=soon)
        self._scheduler.add_job(
            job.run,
            "interval",
            id=job.name,
            seconds=job.every_seconds,
            jitter=job.jitter_seconds or None,
            max_instances=1,
            coalesce=True,
            **first,
        )

    def close(self) -> None:
        """Stop the clock. Runs that are under way are not waited for."""
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
