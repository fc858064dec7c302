# fmt: off
"""A second verifier, written only from docs/reference.md, from "Chain, batches, receipts" to "Bundles".

`python second_verifier.py BUNDLE [KEY]`, KEY being a collector's public key in base64. It is here to show that the page
suffices, and to disagree where the first one errs.
"""
import base64, hashlib, json, sys, zipfile  # noqa: E401, I001
from nacl.exceptions import CryptoError
from nacl.signing import VerifyKey

OURS = {"agent.silent", "agent.back", "review.decided", "register.changed", "record.viewed", "record.erased"}

class Wrong(Exception): ...
def sha(*parts): return hashlib.sha256(b"".join(parts)).digest()
def ident(key): return sha(key).hex()[:32]

def signed(key, data, sig):
    try:
        return VerifyKey(key).verify(data, base64.b64decode(sig, validate=True)) == data
    except (CryptoError, ValueError, TypeError):
        return False

def push(tree, level, node):
    while tree and tree[-1][0] == level:
        node, level = sha(b"\1", tree.pop()[1], node), level + 1
    tree.append((level, node))

def cover(start, end):
    while start < end:
        level = (end - start).bit_length() - 1
        while start % (1 << level):
            level -= 1
        yield level
        start += 1 << level

def stamp(line, own):
    """(place, prev, time, code) of an event; place only by seq for a digest; None if it can't be read."""
    try:
        if line.startswith(b'{"seq":'):
            got = json.loads(line)
            return (got["seq"],), bytes.fromhex(got["digest"]), 0, ""
        got = json.loads(line)
        ours, code = got["unmapped"]["sekisho"], got["metadata"]["event_code"]
        agent = own if code in OURS else got["device"]["uid"]
        return (agent, ours["epoch"], ours["seq"]), ours["prev"], got["time"], code
    except (ValueError, KeyError, TypeError):
        return None

def misplaced(at, want, lines, batches, own):
    found = stamp(lines[at], own) if at < len(lines) else None
    place = found and (found[0] if len(found[0]) == 3 else (*want[:2], found[0][0]))
    later = any(s and s[0] == want for s in (stamp(line, own) for line in lines[at + 1 :]))
    order = [(b["agent"], b["epoch"], seq) for b in batches for seq in range(b["taken"], b["last"] + 1)]
    ahead = place in order and order.index(place) > order.index(want)
    kinds = ("reordered", "inserted") if later else ("removed", "altered")
    return (kinds[not (ahead or at >= len(lines))], (place or want) if later and not ahead else want)

def walk(files, manifest, keys, signers, own):
    whole, lines = not manifest["filter"], files["events.ndjson"].split(b"\n")[:-1]
    batches = [json.loads(line) for line in files["batches.ndjson"].splitlines()]
    leaves, gaps = (iter([files[n][i : i + 32] for i in range(0, len(files[n]), 32)]) for n in ("leaves", "gaps"))
    ends, times, tree, after, at, events = {}, {}, [], 0, 0, 0
    for b in batches:
        name, taken, last = (b["agent"], b["epoch"]), b["taken"], b["last"]
        seq, link = ends.get(name, (0, sha(f"{name[0]}\n{name[1]}".encode()).hex()))
        for holds, kind, number in (
            (1 <= b["first"] <= taken <= last < taken + 2000, "unreadable", None), (taken > seq, "inserted", taken),
            (not whole or taken == seq + 1, "removed", seq + 1), (taken != seq + 1 or b["start"] == link, "altered", taken),
            (b["first"] != taken or b["start"] == b["prev"], "forged", taken), (b["pos"] >= after, "reordered", taken),
            (not whole or b["pos"] == after, "removed", taken)):
            if not holds:
                raise Wrong(kind, number and (*name, number))
        [push(tree, level, next(gaps)) for level in cover(after, b["pos"])]
        h = bytes.fromhex(b["start"])
        for seq in range(taken, last + 1):
            want, got = (*name, seq), stamp(lines[at], own) if at < len(lines) else None
            if not got or got[0] not in (want, (seq,)):
                raise Wrong(*misplaced(at, want, lines, batches, own))
            if len(got[0]) == 1:
                push(tree, 0, next(leaves))
                h, at = sha(h, got[1]), at + 1
                continue
            _, prev, time, code = got
            if prev != h.hex():
                follows = b["hash"] if seq == last else (stamp((lines[at + 1 :] or [b""])[0], own) or ("", ""))[1]
                intact = seq > taken and sha(bytes.fromhex(prev), sha(lines[at])).hex() == follows
                raise Wrong("altered", (*name, seq - 1 if intact else seq))
            if code in ("agent.clock", "agent.started"):
                times[name] = time
            elif name[0] != own and time < times.get(name, 0) - 86_400_000:
                raise Wrong("back-dated", want)
            times[name] = max(time, times.get(name, 0))
            push(tree, 0, sha(b"\0", lines[at]))
            h, at, events = sha(h, sha(lines[at])), at + 1, events + 1
        fields = [b[n] for n in ("agent", "epoch", "first", "last", "prev", "hash", "sent_at")]
        text = "\n".join(["sekisho/batch/v1", *map(str, fields), ""]).encode()
        theirs = base64.b64decode(keys["agents"].get(name[0], ""))
        fit = signers if name[0] == own else [theirs] if ident(theirs) == name[0] else []
        if not any(signed(k, text, b["sig"]) for k in fit):
            raise Wrong("forged", (*name, taken))
        if h.hex() != b["hash"]:
            raise Wrong("altered", (*name, last))
        ends[name], after = (last, b["hash"]), b["pos"] + last - taken + 1
    if at < len(lines):
        got = stamp(lines[at], own)
        raise Wrong("inserted", got and (*("", 0), *got[0])[-3:])
    if whole and after != manifest["size"]:
        raise Wrong("removed", None)
    [push(tree, level, next(gaps)) for level in cover(after, manifest["size"])]
    root = tree.pop()[1] if tree else sha()
    while tree:
        root = sha(b"\1", tree.pop()[1], root)
    return root, at, events

def verify(path, key=None):
    """("whole", None), or the kind of what is wrong and the place (agent, epoch, seq) named, if any."""
    try:
        with zipfile.ZipFile(path) as file:
            files = {name: file.read(name) for name in file.namelist()}
        manifest, keys = json.loads(files["manifest.json"]), json.loads(files["keys.json"])
        signers = [base64.b64decode(keys["collector"][0])]
        for r in keys["rotations"]:
            old, new = base64.b64decode(r["old"]), base64.b64decode(r["new"])
            text = f"sekisho/rotation/v1\n{r['old']}\n{r['new']}\n{r['size']}\n".encode()
            if old == signers[-1] and signed(old, text, r["old_sig"]) and signed(new, text, r["new_sig"]):
                signers.append(new)
        own, note, newest = ident(signers[0]), files["checkpoint"].decode(), signers[-1]
        text, _, sigs = note.partition("\n\n")
        lines = [line.split(" ") for line in sigs.splitlines()]
        theirs = [base64.b64decode(line[2]) for line in lines if line[:2] == ["—", f"sekisho/{own}"]]
        name = sha(f"sekisho/{own}\n\1".encode(), newest)[:4]
        good = any(s[:4] == name and signed(newest, text.encode() + b"\n", base64.b64encode(s[4:])) for s in theirs)
        good = good and manifest["origin"] == f"sekisho/{own}" and (not key or base64.b64decode(key) in signers)
        if not good or not signed(newest, b"sekisho/bundle/v1\n" + files["manifest.json"], files["manifest.sig"].strip()):
            raise Wrong("forged", None)
        origin, size, root = text.split("\n")[:3]
        if origin != manifest["origin"] or int(size) != manifest["size"]:
            raise Wrong("unreadable", None)
        got, lines, events = walk(files, manifest, keys, signers, own)
        if got != base64.b64decode(root):
            raise Wrong("tree", None)
        return ("whole", None) if (lines, events) == (manifest["lines"], manifest["events"]) else ("unreadable", None)
    except Wrong as wrong:
        return wrong.args
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, IndexError, StopIteration, EOFError, OSError) as error:
        return "unreadable", str(error) and None

if __name__ == "__main__":
    print(*(verdict := verify(*sys.argv[1:3])))
    sys.exit(verdict[0] != "whole")
