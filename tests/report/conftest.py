"""Shared by the tests of logs and pages."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """Whole files come from replacing, not from fsync, which only a loss of power would show."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
