"""A captured message, as JSON. Fields are only ever added."""

from typing import Any

from archiver.db.captures import Capture
from archiver.model import capture_id, message_key, uidl_text


def capture_json(found: Capture) -> dict[str, Any]:
    """A capture in the form that scripts rely on."""
    return {
        "capture": capture_id(found.account_id, found.sha256),
        "account": found.account_name,
        "uidl": uidl_text(found.uidl),
        "sha256": found.sha256.hex(),
        "size": found.size,
        "key": message_key(found.account_id, found.sha256),
        "captured_at": found.captured_at.isoformat(),
        "version_id": found.version_id,
        "epoch": found.epoch,
        "token": found.token,
        "segment": found.sequence,
    }
