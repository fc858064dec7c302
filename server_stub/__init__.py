"""Sekisho's collector: receives, verifies, keeps and shows what the agents record."""
