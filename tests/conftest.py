"""Rules for the whole suite.

Where ``NOWCAST_REQUIRE`` is set (``.ci/run`` sets it) a skipped test is a failed one: a machine that quietly lacks an
engine, a signal or a socket must not turn green. Only tests that need a GPU, or the reference material beside the
repository, may skip there.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

REQUIRED = os.environ.get("NOWCAST_REQUIRE", "")


def may_skip(reason: str, markers: set[str]) -> bool:
    """Whether a test may be left out where everything is required.

    Args:
        reason: What the test said when it skipped.
        markers: Names of the test's markers.
    """
    return "gpu" in markers or "shared" in reason.lower()


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


def _refuse(report: pytest.TestReport | pytest.CollectReport, markers: set[str]) -> None:
    if REQUIRED and report.skipped and not hasattr(report, "wasxfail") and not may_skip(_reason(report), markers):
        report.outcome = "failed"
        report.longrepr = f"skipped where NOWCAST_REQUIRE={REQUIRED} allows no skip: {_reason(report)}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where nothing may be skipped."""
    report = yield
    _refuse(report, {marker.name for marker in item.iter_markers()})
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for modules that skip as a whole when they are collected."""
    report = yield
    _refuse(report, set())
    return report
