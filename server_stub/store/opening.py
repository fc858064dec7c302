"""Which store a site has, by its settings.

Owns: from `database` in the configuration to an open store, and what to say where PostgreSQL's driver is not installed: it is
an extra, and is not even imported for a site that keeps its store in SQLite. Must not know what is in a store.
"""

from server_stub.config import ConfigError, Settings
from server_stub.store import Store
from server_stub.store.sqlite import SqliteStore


def open_store(settings: Settings, alone: bool = False) -> Store:
    """The site's store, made if it is new; `alone`: with no collector on it, as none may be. Raises ConfigError, StoreError."""
    if not settings.postgres:
        store = SqliteStore(settings.store_file)
        settings.store_file.chmod(0o600)
        return store
    try:
        from server_stub.store.postgres import PostgresStore
    except ModuleNotFoundError as error:
        if error.name != "psycopg":
            raise
        raise ConfigError(
            '"database" names PostgreSQL, but its driver is not installed; run: pip install "sekisho[collector,postgres]"'
        ) from None
    return PostgresStore(settings.postgres, alone)
