"""Certificates for servers that tests start: the demo's, which is what such servers need."""

from archiver.demo.certificates import self_signed

__all__ = ["self_signed"]
