"""What the collector asks of whatever keeps its records: a short protocol, and the rows that cross it.

Two sides. `Session` is the writer's: one thread, one transaction at a time, durable once `commit` returns. `Store` is
everyone's: it opens that session, and reads committed rows from any thread. Both raise `StoreError` and nothing else
of their engine's. Must not know HTTP, chains, or who may see what.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from agent.contract.wire import Head
from server_stub.intake import Known, Row


class StoreError(Exception):
    """The store can't be used; str() is one sentence that says why and what to do."""


class Session(Protocol):
    """The single writer's hold on the store."""

    def begin(self) -> None:
        """Start a transaction."""
        ...

    def commit(self) -> None:
        """Make it durable: when this returns, a power cut loses nothing of it."""
        ...

    def rollback(self) -> None:
        """Drop it."""
        ...

    def add(self, first_pos: int, rows: Sequence[Row], received_at: int) -> None:
        """Append events at `first_pos`, `first_pos` + 1, ..."""
        ...

    def add_head(self, first_pos: int, head: Head, taken: int) -> None:
        """Keep the signed head of a batch whose rows were added from `first_pos` on, the first being seq `taken`."""
        ...

    def add_nodes(self, nodes: Iterable[tuple[int, int, bytes]]) -> None:
        """Keep hashes of complete subtrees: (level, index, hash)."""
        ...

    def known(self, agent: str, epoch: int) -> Known | None:
        """Where a chain ends, or None."""
        ...

    def held(self, agent: str, epoch: int, seq: int) -> tuple[int, bytes] | None:
        """`pos` and chain hash of an event, or None."""
        ...

    def set_known(self, agent: str, epoch: int, known: Known) -> None:
        """Say where a chain ends now."""
        ...

    def forget(self) -> None:
        """Hold nothing in memory of what the store says: it was changed by plain SQL."""
        ...

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """One statement of plain SQL with `?` parameters, inside the transaction; its rows."""
        ...


class Store(Protocol):
    """Committed records."""

    def session(self) -> Session:
        """The writer's session; asked for once."""
        ...

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query over what is committed; from any thread."""
        ...

    def subtree(self, level: int, index: int) -> bytes:
        """Hash of a complete subtree (`tree.Subtree`)."""
        ...

    def settle(self) -> None:
        """Have what was erased gone from the disk, as far as no reader still needs it."""
        ...

    def size_bytes(self) -> int:
        """What the store takes on disk."""
        ...

    def close(self) -> None:
        """Give back every connection; no thread may be reading any more."""
        ...
