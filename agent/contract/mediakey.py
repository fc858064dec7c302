"""The key of a medium: what the register, events and lists of approvals call it, on every machine and for ever.

Owns: its form, `usb:0951:1666:60A44C413F8CF320` (bus, vendor id, product id, serial; names where there are no ids). One without
a serial number, or with one that its maker gives to every piece, ends in `:noserial`: such a key is weak, all pieces of that
model share it. Must not know: udev, which devices are media.
"""

import re

_NOT_UNIQUE = {"0123456789abcdef", "123456789abcdef", "0123456789", "1234567890", "123456789012", "none", "unknown"}


def slug(text: str, most: int = 64) -> str:
    """Foreign text as a part of a key: letters, digits, dot, dash and underline."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_")[:most]


def key_of(bus: str, vendor: str, model: str, serial: str, vendor_id: str, product_id: str) -> str:
    """The stable key of a medium (form: see above). Arguments are cleaned already."""
    unique = slug(serial)
    if len(set(unique.lower())) < 2 or unique.lower() in _NOT_UNIQUE:
        unique = "noserial"
    maker = slug(vendor_id.lower()) or slug(vendor.lower()) or "?"
    return f"{slug(bus.lower()) or '?'}:{maker}:{slug(product_id.lower()) or slug(model.lower()) or '?'}:{unique}"
