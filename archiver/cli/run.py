"""``archiver run``: the service."""

import os
import signal
import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from archiver.bootstrap import App

LEFT_SECONDS = 1.0
"""How long threads may take to end after everything is closed."""

AGAIN_SECONDS = 5.0
"""Time between two attempts to open a database or a store that is not ready yet."""


def register(app: typer.Typer) -> None:
    app.command()(run)


def run() -> None:
    """Run the service: poll every account when it is due, until SIGTERM.

    Any number of services may share one PostgreSQL database; only one of them
    polls an account at a time. Logs one JSON object per line on standard error.
    Serves health, metrics and the API at ARCHIVER_HTTP_LISTEN. On SIGTERM,
    running polls finish the messages that they have requested, within
    ARCHIVER_DRAIN_SECONDS.
    """
    from archiver import observe
    from archiver.bootstrap import App
    from archiver.process import private_files
    from archiver.settings import load, unknown

    settings = load()
    lines = observe.log_json(settings.log_level)
    log = observe.get_logger()
    for name in unknown():
        log.warning("setting.unknown", name=name)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    drained = True
    with (
        private_files(group_reads=settings.file_group_read),
        App(settings) as app,
        ExitStack() as stack,
    ):
        is_open = threading.Event()
        if settings.http_listen is not None:
            address = stack.enter_context(_web(app, settings.http_listen, is_open))
            log.info("http.listening", address=address)
        if _open(app, stop, log):
            if settings.accounts_file is not None:
                changed = app.take_in(settings.accounts_file)
                log.info("accounts.read", file=str(settings.accounts_file), changed=changed)
            worker = app.worker
            is_open.set()
            drained = worker.serve(stop, settings.drain_seconds)
    if not drained or _threads_hang():
        # Threads that hang in a socket would keep the process alive. Messages that
        # they have not recorded are still on the server.
        lines.drain()
        os._exit(0)


def _threads_hang() -> bool:
    """Whether a thread is left that the interpreter would wait for, such as one that answers a probe."""
    ends_at = time.monotonic() + LEFT_SECONDS
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(max(0.0, ends_at - time.monotonic()))
            if thread.is_alive():
                return True
    return False


def _open(app: "App", stop: threading.Event, log: Any) -> bool:
    """Wait until database and store can be used. Returns False if the service must stop before.

    On a cluster a pod may start before its database, or before the migration
    of a new release. It is unready then, and does not crash.
    """
    from archiver.db.migrate import WrongSchema
    from archiver.errors import TryLater

    while not stop.is_set():
        try:
            app.open_archive()
        except (TryLater, WrongSchema) as error:
            if app.raw_database.is_sqlite:
                raise
            log.warning("service.waiting", error=str(error))
            stop.wait(AGAIN_SECONDS)
        else:
            return True
    return False


def _web(app: "App", listen: str, is_open: threading.Event) -> "AbstractContextManager[str]":
    from archiver.db import migrate, overview
    from archiver.errors import TryLater, UsageError

    try:
        from archiver import web
    except ModuleNotFoundError as error:
        raise UsageError(
            "ARCHIVER_HTTP_LISTEN is set, but the HTTP server is not installed",
            hint="pip install 'archiver[web]'",
        ) from error

    def ready() -> None:
        if not is_open.is_set():
            raise TryLater("starting: waiting for the database and the store")
        if app.stopping.is_set():
            raise TryLater("draining")
        migrate.ensure(app.raw_database)
        app.check_store()

    def standing() -> overview.Overview:
        with app.raw_database.reading() as connection:
            return overview.overview(connection, app.now())

    health = web.Health(
        alive=lambda: not is_open.is_set() or app.worker.alive,
        ready=ready,
        standing=standing,
    )
    token = app.settings.api_token
    return web.serving(
        listen,
        lambda on_loopback: web.application(
            app.raw_database,
            health,
            token=None if token is None else token.get_secret_value(),
            on_loopback=on_loopback,
            deletion_forbidden=app.settings.forbid_deletion,
            hosts=[listen.rpartition(":")[0], *app.settings.http_hosts],
        ),
    )
