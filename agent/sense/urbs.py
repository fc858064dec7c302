"""How many bytes went out to a USB device that programs drive themselves: the kernel's tracepoint xhci-hcd:xhci_urb_giveback.

Owns: which bulk OUT endpoints of a device are such (an interface for images or of the vendor's own, which no driver of the
kernel's has taken), the filter that lets their completed requests and no others through, and a sum per device. Never a byte of
what was sent. Must not know who sends, nor what was read. Used by `usbfs`.

A request names its device by number, which is unique on one bus only, and none but xHCI's driver has the tracepoint: devices on
other controllers, and those whose number and endpoint another device has too, are not counted (`sent` is None). A record that
the kernel dropped counts as much as the largest request so far: what can't be counted may have been sent.

Sources: drivers/usb/host/xhci-trace.h, <linux/usb.h> (usb_pipe…), USB 2.0 9.6.6, Documentation/ABI/*/sysfs-bus-usb.
"""

import struct
from pathlib import Path

from agent.sense import procfs
from agent.sense.tracepoint import Tracepoint

_EVENT, _PAGES = "xhci-hcd/xhci_urb_giveback", 32
_NEEDED = ("pipe", "actual")
_PIPE_BULK = 3
_CLASSES = {"06", "ff"}
"""Still image (MTP, PTP), vendor's own (adb, and phones that call MTP so)"""
_DRIVERS = {"", "usbfs"}
_DEVICES = Path("/sys/bus/usb/devices")
_MOST = 32
"""Endpoints; the kernel takes no filter of any length"""


class Urbs:
    """`watch` a device when it is plugged in, `sent` by it so far after `count`, `forget` it when it is gone."""

    def __init__(self) -> None:
        self.why = ""
        """Why nothing can be counted, once that is known"""
        self._heard: Tracepoint | None = None
        self._pipes: dict[int, str] = {}
        self._sent: dict[str, int] = {}
        self._largest = 0

    def watch(self, device: str) -> None:
        """Count from now on what goes out to the device with this folder in sysfs, if it can be told from others."""
        pipes = _pipes(device)
        if not pipes or not _on_xhci(device) or pipes & self._pipes.keys() or pipes & _elsewhere(device):
            return
        if len(self._pipes) + len(pipes) > _MOST or self.why:
            return
        self._sent[device] = 0
        self._pipes |= dict.fromkeys(pipes, device)
        self._filter()

    def leave(self, device: str) -> None:
        """Leave what a driver of the kernel's has taken since. What is not there just now may be set up anew, or be pulled."""
        gone = {pipe for pipe, of in self._pipes.items() if of == device} & _pipes(device, taken=True)
        if gone:
            self._pipes = {pipe: of for pipe, of in self._pipes.items() if pipe not in gone}
            if device not in self._pipes.values():
                del self._sent[device]
            self._filter()

    def forget(self, device: str) -> None:
        """It was pulled."""
        if self._sent.pop(device, None) is not None:
            self._pipes = {pipe: of for pipe, of in self._pipes.items() if of != device}
            self._filter()

    def count(self) -> None:
        """Take in what completed since the last call."""
        if self._heard is not None:
            self._take(self._heard)

    def _take(self, heard: Tracepoint) -> None:
        where = heard.at
        for record in heard.drain():
            (pipe,) = struct.unpack_from("=I", record.raw, where["pipe"])
            (size,) = struct.unpack_from("=i", record.raw, where["actual"])
            device = self._pipes.get(pipe)
            if device is not None and size > 0:
                self._sent[device] += size
                self._largest = max(size, self._largest)
        lost, heard.lost = heard.lost, 0
        for device in self._sent if lost else ():
            self._sent[device] += lost * self._largest

    def sent(self, device: str) -> int | None:
        """Bytes that went out to it since it is watched; None: nobody counts."""
        return self._sent.get(device)

    def close(self) -> None:
        """Stop listening."""
        if self._heard is not None:
            self._heard.close()
            self._heard = None

    def _filter(self) -> None:
        """Listen anew, as the kernel changes no filter; what completes meanwhile counts twice rather than not at all. With
        nothing to count, it is not listened to."""
        before, self._heard = self._heard, None
        if self._pipes:
            try:
                said = " || ".join(f"pipe == {pipe}" for pipe in sorted(self._pipes))
                self._heard = Tracepoint(_EVENT, _NEEDED, said, _PAGES)
            except OSError as error:
                self.why = error.strerror or str(error)
                self._pipes, self._sent = {}, {}
        if before is not None:
            self._take(before)
            before.close()


def _pipes(device: str, *, taken: bool = False) -> set[int]:
    """Bulk OUT endpoints of interfaces that programs drive themselves; or those that a driver of the kernel's has taken."""
    found: set[int] = set()
    for interface in Path(device).glob("*:*.*"):
        driver = procfs.link(f"{interface}/driver").rpartition(b"/")[2].decode(errors="replace")
        if _said(interface, "bInterfaceClass") in _CLASSES and (driver not in _DRIVERS) == taken:
            found |= _bulk_out(interface, _said(Path(device), "devnum"))
    return found


def _elsewhere(device: str) -> set[int]:
    """The bulk OUT endpoints of all devices with the same number on other buses, whoever drives them."""
    number, real = _said(Path(device), "devnum"), Path(device).resolve()
    found: set[int] = set()
    for other in _DEVICES.glob("[0-9]*-*[0-9]"):
        if ":" not in other.name and other.resolve() != real and _said(other, "devnum") == number:
            for interface in other.glob("*:*.*"):
                found |= _bulk_out(interface, number)
    return found


def _bulk_out(interface: Path, number: str) -> set[int]:
    """As the kernel writes kind, endpoint and number of the device in one."""
    found = set()
    for endpoint in interface.glob("ep_*"):
        address = _said(endpoint, "bEndpointAddress")
        if address and number.isdigit() and (_said(endpoint, "type"), _said(endpoint, "direction")) == ("Bulk", "out"):
            found.add(_PIPE_BULK << 30 | (int(address, 16) & 0xF) << 15 | int(number) << 8)
    return found


def _on_xhci(device: str) -> bool:
    """Whether it hangs on a controller that xHCI's driver drives: of its bus' root hub, the parent."""
    controller = (_DEVICES / f"usb{_said(Path(device), 'busnum')}").resolve().parent
    return procfs.link(f"{controller}/driver").rpartition(b"/")[2].startswith(b"xhci")


def _said(folder: Path, name: str) -> str:
    return procfs.read(f"{folder}/{name}").strip().decode(errors="replace")
