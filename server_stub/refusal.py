"""What may be refused inside the writer's transaction without harm to the others in it.

Owns: that one base class, so that pure rooms can raise it and the writer catch it. Such an error must be raised before anything
is written. Must not know: who refuses what.
"""


class Refusal(Exception):
    """Base of what a submitted function may raise without harm to the others in its group."""
