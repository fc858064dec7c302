"""What asks to be run when a medium is mounted: names at its top that desktops and Windows know.

Question: is there an autorun here? Owns: those names: freedesktop's Desktop Application Autostart Specification, "Autostart Of
Applications After Mount", and Windows' autorun.inf. Nothing is read or followed; nothing but a lookup a name. Must not know
media. Asked once a mount, of file systems that the kernel itself serves.
"""

import os

NAMES = (".autorun", "autorun", "autorun.sh", ".autoopen", "autoopen", "autorun.inf", "AUTORUN.INF", "Autorun.inf")


def look(mount: str) -> list[str]:
    """Those that are there. A file system that ignores case is asked for one spelling after the other, and named once."""
    found: dict[tuple[int, int], str] = {}
    for name in NAMES:
        try:
            seen = os.lstat(os.path.join(mount, name))  # noqa: PTH118 (paths are the os module's here)
        except (OSError, ValueError):
            continue
        found.setdefault((seen.st_dev, seen.st_ino), name)
    return list(found.values())
