"""What the log and the metrics say about polls that ended. See docs/reference/events-and-metrics.md."""

from typing import Any

from archiver import observe
from archiver.db.hosts import Trouble
from archiver.errors import ArchiverError
from archiver.model import Claim, PollReport
from archiver.views.poll import counts_json


class Reporter:
    """Any thread may call it."""

    def __init__(self) -> None:
        self.log: Any = observe.get_logger()

    def poll_ended(self, report: PollReport, claim: Claim) -> None:
        """Count a poll in the metrics, and write its one line."""
        observe.POLLS.labels(report.outcome).inc()
        observe.POLL_SECONDS.observe(report.seconds)
        observe.CAPTURED.inc(report.counts.new)
        observe.CAPTURED_BYTES.inc(report.counts.fetched_bytes)
        observe.DELETE_REQUESTED.inc(report.counts.delete_requested)
        observe.LOST.inc(report.counts.lost)
        say = self.log.info if report.outcome == "ok" and not report.warnings else self.log.warning
        if report.outcome == "integrity":
            say = self.log.error
        say(
            "poll.ended",
            account=report.account,
            account_id=claim.account_id,
            token=claim.token,
            outcome=report.outcome,
            listed=report.listed,
            **counts_json(report.counts, report.to_come),
            glanced=report.glanced,
            bytes=report.counts.fetched_bytes,
            segments=report.segments,
            seconds=round(report.seconds, 3),
            implementation=report.implementation,
            warnings=list(report.warnings),
            error=report.error,
            hint=report.hint,
        )

    def not_released(self, account: str, error: Exception) -> None:
        """An end could not be written, so its lease expires by itself."""
        if isinstance(error, ArchiverError):
            self.log.warning("lease.not_released", account=account, error=str(error))
        else:
            self.log.error("lease.not_released", account=account, exc_info=error)

    def host(self, name: str, trouble: Trouble | bool | None) -> None:
        """A host backs off because of a poll (a Trouble), or its trouble is over (True)."""
        if isinstance(trouble, Trouble):
            self.log.warning(
                "host.backing_off",
                host=trouble.host,
                failures=trouble.failures,
                failing_since=trouble.failing_since,
                retry_at=trouble.retry_at,
                error=trouble.error,
            )
        elif trouble:
            self.log.info("host.reached", host=name)

    def not_claimed(self, error: Exception) -> None:
        """No account could be claimed, or queued at its host. A bug is logged with its traceback."""
        bug = None if isinstance(error, ArchiverError) else error
        self.log.warning("claim.failed", error=str(error), exc_info=bug)
