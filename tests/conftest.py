"""What every test run says at its end: not only what passed, but what could not run on this machine, and why."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from agent.pytest_plugin import Agent
from tests.house import none_is_bad_ocsf


@pytest.fixture
def sekisho_agent(sekisho_agent: Agent) -> Iterator[Agent]:
    """The public fixture; and whatever it recorded must be OCSF 1.8.0."""
    yield sekisho_agent
    none_is_bad_ocsf(sekisho_agent.events())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Group the skipped tests by reason, so that a missing part is read, not overlooked among dots."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in terminalreporter.stats.get("skipped", [])
    )
    if not reasons:
        return
    terminalreporter.section("NOT RUN HERE", sep="=", yellow=True, bold=True)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4} test{'s' if count > 1 else ' '}  {reason}")
