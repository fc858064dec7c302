"""What the agent does to media in mode "enforce": it carries out the core's wishes (`core/stopping.py`) and judges nothing."""
