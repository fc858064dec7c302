"""What every test run says at its end: not only what passed, but what could not run on this machine, and why."""

import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from agent.pytest_plugin import Agent
from tests import postgres
from tests.house import Stores, none_is_bad_ocsf


@pytest.fixture
def sekisho_agent(sekisho_agent: Agent) -> Iterator[Agent]:
    """The public fixture; and whatever it recorded must be OCSF 1.8.0."""
    yield sekisho_agent
    none_is_bad_ocsf(sekisho_agent.events())


def pytest_generate_tests(metafunc: Any) -> None:
    """Run over each store the tests whose collector asks for `store_kind`, but those with the mark `sqlite`."""
    if "store_kind" not in metafunc.fixturenames:
        return
    kinds = ["sqlite"] if metafunc.definition.get_closest_marker("sqlite") else ["sqlite", "postgresql"]
    metafunc.parametrize("store_kind", kinds, indirect=True, scope="module")


@pytest.fixture(scope="session")
def postgres_node() -> Iterator[postgres.Node]:
    """A PostgreSQL server for this run of tests."""
    if lacking := postgres.missing():
        pytest.skip(lacking)
    room = postgres.room()
    node = postgres.Node(room)
    try:
        node.make()
        node.start()
        yield node
    finally:
        node.stop(signal.SIGQUIT)  # nothing of it is needed: no last checkpoint over a hundred databases
        shutil.rmtree(room)


@pytest.fixture(scope="module")
def store_kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """The store that collectors are made over; each over a new one.

    A fixture that makes a collector asks for this one, even if it only needs to be set: so it is made anew with it.
    """
    if request.param == "postgresql":
        Stores.new_database = request.getfixturevalue("postgres_node").database
    yield request.param
    Stores.new_database = None


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
