#!/usr/bin/env python3
"""Reads holdstill images. Written from src/image/FORMAT.md alone, to prove that it suffices.

    reader.py IMAGE FOLDER     checks IMAGE and writes its volumes and streams to FOLDER/N.raw

Checks structure, order, CRC-32 and the index, and, if a module `blake3` is installed (Debian has
none), all hashes. Needs zstandard (Debian: python3-zstandard). Exit status: 0 whole, 4 not."""
import json, os, struct, sys, zlib, zstandard
try:
    from blake3 import blake3
except ImportError:
    blake3 = None

BLOCK, CELL, FRAME, MIB = 4096, 1 << 20, 4096, 1 << 20
MAGIC, FOOTER_MAGIC = b"\x89holdstill\r\n\x1a\n\0\0", b"\x89stillness\r\n\x1a\n\0\0"
FEATURES = {0: "a parent image (incremental)", 1: "encryption", 2: "mirrored extents", 3: "opaque streams",
            4: "one subvolume of a filesystem"}
READS = 1 << 3
MANIFEST, DATA, INDEX, ROOT, TRAILER, STREAM = range(1, 7)
LONGEST = {MANIFEST: 4 * MIB, INDEX: 4096 * 40, ROOT: 262144 * 48, TRAILER: 4 * MIB}

class Bad(Exception):
    """Damaged, or of a newer format."""

def check(fits, what):
    if not fits:
        raise Bad("damaged: " + what)
def refuse(what):
    raise Bad("it needs what this reader does not have: " + what)
def hash_of(data):
    return blake3(data).digest() if blake3 else None

class Image:
    def __init__(self, file, folder):
        self.file, self.folder, self.at = file, folder, 0
        self.root = blake3() if blake3 else None
        self.pending, self.roots, self.progress = [], [], {}
        self.manifest_json = self.manifest_copy = self.index_root = None

    def take(self, length):
        data = self.file.read(length)
        self.at += len(data)
        check(len(data) == length, "it ends too early")
        return data

    def zeros(self, length):
        check(not any(self.take(length)), "padding is not zero")

    def file_header(self):
        frame = self.file.read(FRAME)
        self.at = len(frame)
        if frame[:16] != MAGIC:
            raise Bad("no holdstill image")
        check(len(frame) == FRAME, "it ends too early")
        check(zlib.crc32(frame[:-4]) == struct.unpack("<I", frame[-4:])[0], "CRC of the file header")
        version, length, _, _, incompatible = struct.unpack_from("<IIQQQ", frame, 16)
        self.image_id = frame[48:64]
        block, cell, self.max_plain, hash_kind, cipher = struct.unpack_from("<IIIBB", frame, 64)
        if version > 1:
            refuse("version %d" % version)
        unknown = [FEATURES.get(bit, "bit %d" % bit) for bit in range(64) if (incompatible & ~READS) >> bit & 1]
        if unknown or hash_kind != 1 or cipher != 0:
            refuse("%s, hash kind %d, cipher %d" % (", ".join(unknown), hash_kind, cipher))
        check((version, length, block, cell) == (1, FRAME, BLOCK, CELL), "the file header makes no sense")
        check(MIB <= self.max_plain <= 8 * MIB and not any(frame[78:-4]), "the file header makes no sense")
        self.header, self.has_streams = frame[:112], incompatible >> 3 & 1
        if self.root:
            self.root.update(frame)

    def record(self, sequence):
        """Reads record number `sequence`; returns True after the last."""
        position, raw = self.at, self.take(96)
        (magic, kind, codec, flags, image_id, number, volume, n_pass, base, extents, hashes, plain_len,
         stored_len, pad, tables_crc, payload_crc, reserved, crc) = struct.unpack("<4sBBH16sQIIQIIIIIII16sI", raw)
        check(magic == b"HsR1" and zlib.crc32(raw[:-4]) == crc, "a record header at %d" % position)
        check((image_id, number, any(reserved)) == (self.image_id, sequence, False), "a record at %d" % position)
        is_data = kind in (DATA, STREAM)
        if flags & ~1 or (kind > STREAM and kind < 128) or kind == 0 or (is_data and codec > 1):
            refuse("kind %d, flags %d, codec %d" % (kind, flags, codec))
        longest = self.max_plain if is_data else LONGEST.get(kind, 16 * MIB)
        check(extents <= 8192 and hashes <= 2048 and pad < 4096 and n_pass < 256, "counts")
        check(stored_len <= plain_len <= longest and (codec or stored_len == plain_len), "lengths")
        tables = self.take(8 * extents + 32 * hashes)
        check(zlib.crc32(tables) == tables_crc, "CRC of tables at %d" % position)
        self.zeros(pad)
        payload = self.take(stored_len)
        check(zlib.crc32(payload) == payload_crc, "CRC of the payload at %d" % position)
        self.zeros(-self.at % 8)
        if self.root:
            self.root.update(raw + tables)
        if is_data:
            if codec:
                payload = zstandard.ZstdDecompressor().decompress(payload, max_output_size=plain_len)
                check(len(payload) == plain_len, "length when decompressed")
            digests = [tables[at:at + 32] for at in range(8 * extents, len(tables), 32)]
            entries = struct.unpack("<%dI" % (2 * extents), tables[:8 * extents])
            span = self.stream(volume, base, flags, n_pass, extents, payload) if kind == STREAM else \
                self.data(volume, base, flags, n_pass, entries, payload)
            check(span[2] == len(digests), "as many hashes as cells")
            if blake3:
                check([self.cell_hash(cell) for cell in span[3]] == digests, "a hash at %d" % position)
            check(not self.pending or self.pending[0][2:4] == (volume, n_pass), "a missing index segment")
            self.pending.append((number, position, volume, n_pass, span[0], span[1]))
            return False
        check((codec, flags, volume, n_pass, base, extents, hashes) == (0, 0, 0, 0, 0, 0, 1), "a record's fields")
        check(not blake3 or hash_of(payload) == tables, "a hash at %d" % position)
        if kind == MANIFEST:
            check(payload == (self.manifest_json if sequence else self.open_volumes(payload)), "the manifests differ")
            self.manifest_copy = position
        elif kind == INDEX:
            check(payload == b"".join(struct.pack("<QQIIQQ", *entry) for entry in self.pending) != b"", "the index")
            n, n_pass, start, end = *self.pending[0][2:5], self.pending[-1][5]
            self.roots.append(struct.pack("<QQIIIIQQ", number, position, n, n_pass, len(self.pending), 0, start, end))
            self.pending = []
        elif kind == ROOT:
            check(payload == b"".join(self.roots) and not self.pending, "the index root")
            self.index_root = position
        elif kind == TRAILER:
            self.trailer, self.trailer_at = json.loads(payload), position
        return kind == TRAILER

    def open_volumes(self, payload):
        self.manifest_json, manifest = payload, json.loads(payload)
        self.volumes, self.streams = manifest["volumes"], manifest.get("streams", [])
        numbers = [each["n"] for each in self.volumes + self.streams]
        check(numbers == list(range(1, len(numbers) + 1)) and len(numbers) <= 4096, "the list of volumes")
        check(bool(self.has_streams) == bool(self.streams) and not manifest.get("parent"), "features and manifest")
        self.files = {n: open(os.path.join(self.folder, "%d.raw" % n), "w+b") for n in numbers}
        for volume in self.volumes:
            check(volume["size"] <= 1 << 62, "the size of a volume")
            self.files[volume["n"]].truncate(volume["size"])
        return payload

    def data(self, n, base, flags, n_pass, entries, payload):
        check(0 < n <= len(self.volumes) and entries and base % BLOCK == 0, "a data record")
        size, at, used, cells, pieces, start = self.volumes[n - 1]["size"], base, 0, [], {}, None
        for gap, packed in zip(entries[::2], entries[1::2]):
            first, kind = at + gap * BLOCK, packed >> 30
            end = min(first + (packed & (1 << 30) - 1) * BLOCK, size)
            check(first < end and kind < 3 and (n_pass or (flags and kind != 2)), "an extent")
            start = first if start is None else start
            self.files[n].seek(first)
            if kind == 0:
                data, used = payload[used:used + end - first], used + end - first
                self.files[n].write(data)
                for offset in range(0, len(data), BLOCK):
                    cell, block = divmod((first + offset) // BLOCK, 256)
                    pieces.setdefault(cell, []).append((block, data[offset:offset + BLOCK]))
            else:
                for offset in range(first, end, CELL):
                    self.files[n].write(bytes(min(CELL, end - offset)))
            at = (end + BLOCK - 1) // BLOCK * BLOCK
        check(used == len(payload), "payload and extents differ in length")
        old_pass, old_end = self.progress.get(n, (0, 0))
        check(n_pass > old_pass or (n_pass == old_pass and start >= old_end), "records are not in order")
        self.progress[n] = (n_pass, end)
        return start, end, len(pieces), pieces.values()

    def stream(self, n, base, flags, n_pass, extents, payload):
        check(0 <= n - len(self.volumes) - 1 < len(self.streams), "a stream record")
        check((flags, n_pass, extents, base % CELL) == (1, 0, 0, 0) and payload, "a stream record")
        check(base == self.progress.get(n, (0, 0))[1], "a gap in a stream")
        self.files[n].write(payload)
        self.progress[n] = (0, base + len(payload))
        cells = [payload[at:at + CELL] for at in range(0, len(payload), CELL)]
        cells = [[(at // BLOCK, cell[at:at + BLOCK]) for at in range(0, len(cell), BLOCK)] for cell in cells]
        return base, base + len(payload), len(cells), cells

    @staticmethod
    def cell_hash(blocks):
        blocks = [(number, block) for number, block in blocks if any(block)]
        bitmap = sum(1 << number for number, _ in blocks).to_bytes(32, "little")
        return hash_of(b"".join(block for _, block in blocks) + bitmap)

    def end(self, records):
        for stream in self.trailer.get("streams", []):
            check(self.progress.get(stream["n"], (0, 0))[1] == stream["len"], "a stream is not whole")
        self.zeros(-self.at % FRAME)
        frame = self.take(FRAME)
        check(frame[:16] == FOOTER_MAGIC and frame[-4:] == struct.pack("<I", zlib.crc32(frame[:-4])), "the footer")
        said = (frame[16:32],) + struct.unpack_from("<QQQQQ", frame, 32) + (frame[104:216], any(frame[216:-4]))
        check(said == (self.image_id, self.manifest_copy, self.index_root, self.trailer_at, records, self.at,
                       self.header, False), "the footer does not fit")
        check(not self.root or self.root.digest() == frame[72:104], "the root hash")
        check(not self.file.read(1), "bytes behind the end")

def main(path, folder):
    with open(path, "rb") as file:
        image, sequence = Image(file, folder), 0
        image.file_header()
        while not image.record(sequence):
            sequence += 1
        image.end(sequence + 1)
    print("%s: whole, grade %s%s" % (path, image.trailer["grade"], "" if blake3 else " (hashes not checked)"))

if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (Bad, ValueError, KeyError, zstandard.ZstdError) as error:
        print("%s: %s" % (sys.argv[1], error), file=sys.stderr)
        sys.exit(4)
