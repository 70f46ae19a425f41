"""Accounts as an operator describes them: their settings, the rules among these, and files of accounts."""
