"""The judge's server, for the tests of its command."""

from fake_judge import results, server

__all__ = ["results", "server"]
