"""Captures every message of many POP3 mailboxes into an archive that can prove itself."""

__version__ = "0.1.0"
