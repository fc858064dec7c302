"""USB devices taken off their bus and let on it again: sysfs `authorized` (Documentation/usb/authorization.rst of the kernel).

Owns: that file, and who else may be in charge of it: where USBGuard runs, it decides which devices are let on, and what
Sekisho wrote it would overwrite at its next restart or rule, so there nothing is written at all. `authorized_default` of a port
is never touched: with it, a stopped agent would leave a machine that takes no keyboard. Must not know why a device is stopped.
"""

from pathlib import Path

_USBGUARD_PID = "/run/usbguard.pid"
_USBGUARD = "usbguard-daemon"


def port(device: str) -> Path | None:
    """The `authorized` file of a device by its sysfs path; None if it has none (no USB device, a hub, simulated)."""
    if not device.startswith("/sys/"):
        return None
    file = Path(device, "authorized")
    is_hub = _read(Path(device, "bDeviceClass")) == "09"
    return file if file.is_file() and not is_hub else None


def is_authorized(file: Path) -> bool | None:
    """Whether the device may be used; None if it is gone."""
    said = _read(file)
    return None if not said else said != "0"


def authorize(file: Path, allowed: bool) -> None:
    """Let a device on the bus, or take it off. Raises OSError (EROFS: the unit keeps /sys read-only)."""
    file.write_text("1" if allowed else "0")


def usbguard_runs(pid_file: str = _USBGUARD_PID) -> bool:
    """Whether a USBGuard daemon is in charge of USB authorization on this machine."""
    pid = _read(Path(pid_file))
    return pid.isdigit() and _read(Path(f"/proc/{pid}/comm")) == _USBGUARD


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
