"""What the collector asks of whatever keeps its records: a short protocol, and the rows that cross it.

Two sides. `Session` is the writer's: one thread, one transaction at a time, durable once `commit` returns. `Store` is
everyone's: it opens that session, and reads committed rows from any thread. Both raise `StoreError` and nothing else
of their engine's. Must not know HTTP, chains, or who may see what.

Plain SQL crosses the protocol, with `?` for parameters, written so that SQLite and PostgreSQL take it alike (`ON CONFLICT`,
an alias for each subquery, `"user"` in quotes); the few things that they say differently are in `query.Dialect`. What one
of them does its own way is a method here. Over a store that is `shared` several collectors write: `begin` waits for its turn
and says whether others wrote since, so that whatever is remembered of the store is read anew.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from agent.contract.wire import Head
from server_stub.intake import Known, Row
from server_stub.query import Dialect
from server_stub.tree import Frontier


class StoreError(Exception):
    """The store can't be used; str() is one sentence that says why and what to do."""


class Session(Protocol):
    """The single writer's hold on the store."""

    def begin(self) -> bool:
        """Start a transaction, alone among all who write this store; whether others wrote since `edge` was asked."""
        ...

    def edge(self) -> Frontier:
        """The tree's growing edge, as stored."""
        ...

    def grown(self, edge: Frontier) -> None:
        """Say, before `commit`, how far the tree has grown."""
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

    def overwriting(self) -> None:
        """From now on, nothing is left of what is overwritten, once `Store.settle` is done."""
        ...

    def erase_months(self, before_ms: int) -> tuple[int, int, int]:
        """Erase at once whole months received before `before_ms`, if kept by months: events, first and last position."""
        ...

    def drop_names(self, before_ms: int) -> None:
        """Drop texts that no event received since `before_ms` uses, and that none names any more."""
        ...

    def execute(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """One statement of plain SQL with `?` parameters, inside the transaction; its rows."""
        ...


class Store(Protocol):
    """Committed records."""

    dialect: Dialect
    """How its engine says what `query` needs."""
    shared: bool
    """Whether other collectors may write it meanwhile."""

    def listen(self, heard: Callable[[int], None]) -> None:
        """Have `heard` called, from a thread, with the log's size whenever another collector has committed."""
        ...

    def session(self) -> Session:
        """The writer's session; asked for once."""
        ...

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Rows of a query over what is committed; from any thread."""
        ...

    def subtree(self, level: int, index: int) -> bytes:
        """Hash of a complete subtree (`tree.Subtree`)."""
        ...

    def fold_months(self, before_ms: int) -> None:
        """Write down, for `Session.erase_months`, what stays of months received before; others write meanwhile."""
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
