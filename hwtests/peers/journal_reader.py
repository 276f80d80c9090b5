#!/usr/bin/env python3
"""Reads a journal, written from docs/journal-format.md alone: lists its checkpoints, extracts a disk as it was at one.

    journal_reader.py list FOLDER
    journal_reader.py extract FOLDER --at TAG|SEQ|latest --disk N --out FILE

FOLDER holds journal.hfj and disk-N.raw, which nobody writes meanwhile. `list` prints seq, cut, time in µs and tag of each checkpoint.
"""
import bisect, functools, json, os, struct, sys, tempfile
from collections import namedtuple

PAGE, SECTOR, CHUNK, FOREVER, CONSISTENT, MAX_BATCH_BYTES, MAX_RECORDS, BAD_RANGES, ENCRYPTION = 4096, 512, 1 << 20, 1 << 64, 2, 4 << 20, 16384, 1, 2
WRITE, ZEROES, VOID, CHECKPOINT, SYNC_BEGIN, SYNC_DATA, SYNC_END, RESIZE = 1, 2, 3, 4, 5, 6, 7, 9


class Layout:
    """A structure of the file: how its bytes become a tuple with names. Fields that nobody reads are left out of it."""

    def __init__(self, code, fields):
        self.struct, self.tuple, self.size = struct.Struct("<" + code), namedtuple("Fields", fields), struct.calcsize("<" + code)

    def parse(self, data, at=0):
        return self.tuple(*self.struct.unpack_from(data, at))


SUPERBLOCK = Layout("8xI4xQ16s32xQQII8x4Q4IQ16s16xQQ12xI112xII680x3072s", "version sequence journal_id slot_len first_slot_offset slot_count state"
    " required_features open_count low_water_segment low_water_seq low_water_batch_crc manifest_present manifest_slot manifest_crc"
    " promotion_intent_seq tail_generation generation_first_seq generation_fork_seq volume_count bad_list_slot bad_list_crc volumes")
VOLUME = Layout("16xQQ16x", "base_seq size")
LISTED = Layout("12sI16s8xI20x", "begin crc journal_id count")  # a slot of the manifest, whose text has so many bytes, or of the bad list
BAD_RANGE = Layout("3QH6x", "offset len seq volume")
SEGMENT = Layout("12s4x16s3QII5QII8x", "begin journal_id number open_count after_seq after_batch_crc slot carried_end begin_time_us data_end"
    " footer_len last_seq last_batch_crc footer_crc")
BATCH = Layout("12s5I16s16s3QII32x", "begin flags total_len record_count crc_count payload_offset journal_id generation open_count first_seq last_seq prev_batch_crc crc")
RECORD = Layout("Q8x3Q8x3IHBx", "seq offset len sync_id payload_offset payload_len first_crc volume kind")
FOOTER = Layout("12x3IQ32x", "extent_count crc_count event_count base_seq")
FOOTER_EXTENT = Layout("Q4IHB5x", "offset seq_delta len_sectors payload_sector crc volume kind")
CHECKPOINT_PAYLOAD = Layout("24xQ8xQH14x", "cut time_us tag_len")

Extent = namedtuple("Extent", "seq volume offset len place crcs")  # place: of the payload in the file; None for zeroes
Event = namedtuple("Event", "position record payload")
Content = namedtuple("Content", "extents events last_seq last_batch_crc end is_hiding")
Checkpoint = namedtuple("Checkpoint", "cut seq time_us tag")

CRC_TABLE = range(256)
for _ in range(8):
    CRC_TABLE = [crc >> 1 ^ (0x82F63B78 if crc & 1 else 0) for crc in CRC_TABLE]


class Refused(Exception):
    """The journal can't be read, or doesn't have what was asked for; the text says why."""


def crc32c(data):
    return functools.reduce(lambda crc, byte: crc >> 8 ^ CRC_TABLE[(crc ^ byte) & 0xFF], data, 0xFFFFFFFF) ^ 0xFFFFFFFF


def has_own_crc(data, at):
    return crc32c(data[:at] + bytes(4) + data[at + 4 :]) == int.from_bytes(data[at : at + 4], "little")


def is_intact(payload, crcs):
    return [crc32c(payload[at : at + PAGE]) for at in range(0, len(payload), PAGE)] == list(crcs)


def units(length, unit=PAGE):
    return -(-length // unit)


def take(gaps, start, end):
    """Cuts a range out of the sorted gaps, and returns the parts of it that were in them."""
    first = bisect.bisect_right(gaps, start, key=lambda gap: gap[1])
    behind = max(first, bisect.bisect_left(gaps, end, key=lambda gap: gap[0]))
    touched = gaps[first:behind]
    gaps[first:behind] = [rest for gap in touched for rest in ((gap[0], start), (end, gap[1])) if rest[0] < rest[1]]
    return [(max(gap[0], start), min(gap[1], end)) for gap in touched]


class Journal:
    """A journal file: its superblock, and what the segments that count hold."""

    def __init__(self, folder):
        self.file = os.open(os.path.join(folder, "journal.hfj"), os.O_RDONLY)
        self.superblock, self.extents, self.events, self.damage = self.read_superblock(), [], [], ""
        self.bad_ranges, self.left = self.read_bad_list() if self.superblock.required_features & BAD_RANGES else [], self.read_left()
        self.follow_segments()

    def read(self, place, length):
        return os.pread(self.file, length, place).ljust(length, b"\0")  # behind the file's end all is zero

    def read_superblock(self):
        pages = map(self.read, (0, 64 << 10), (PAGE, PAGE))
        copies = [SUPERBLOCK.parse(page) for page in pages if page.startswith(b"HFJOURNL") and has_own_crc(page, 12)]
        if any(copy.version != 1 for copy in copies):
            raise Refused("the journal has a format version that this reader doesn't know")
        features = [copy.required_features & ~BAD_RANGES for copy in copies]
        if not copies or any(features):
            encrypted = "the journal is encrypted, and this reader doesn't decrypt: use vra-journal with --key-file"
            unknown = encrypted if max(features, default=0) == ENCRYPTION else "the journal needs features that this reader doesn't know"
            raise Refused(unknown if copies else "no superblock is valid")
        block = max(copies, key=lambda copy: copy.sequence)
        if block.state != CONSISTENT:
            raise Refused("the journal has no history: a sync is writing its recovery disks")
        return block

    def read_listed(self, begin, place, room, crc, unit):
        """What is listed in a slot, if it is the one that the superblock names."""
        found = LISTED.parse(data := self.read(place, room))
        is_named = found[:3] == (begin, crc, self.superblock.journal_id) and (end := LISTED.size + unit * found.count) <= room
        return data[LISTED.size : end] if is_named and has_own_crc(data[:end], 12) else None

    def read_bad_list(self):
        place, crc = (896 + 64 * self.superblock.bad_list_slot) << 10, self.superblock.bad_list_crc
        if (data := self.read_listed(b"HFBADRNG\1\0\0\0", place, 64 << 10, crc, BAD_RANGE.size)) is None:
            raise Refused("the list of what of the recovery disks is lost can't be read")
        return [BAD_RANGE.parse(data, at) for at in range(0, len(data), BAD_RANGE.size)]

    def read_left(self):
        """Of each disk that left, by its number, the first record at which the VM didn't have it. Without the manifest nobody knows of any."""
        place, crc = (128 + 384 * self.superblock.manifest_slot) << 10, self.superblock.manifest_crc
        text = self.superblock.manifest_present and self.read_listed(b"HFMANIFS\1\0\0\0", place, 384 << 10, crc, 1)
        return {int(disk): seq for disk, seq in json.loads(text or b"{}").get("left", {}).items()}

    def read_segment_page(self, slot, begin, place):
        found = SEGMENT.parse(page := self.read(place, PAGE))
        is_ours = (found.begin, found.journal_id, found.slot) == (begin, self.superblock.journal_id, slot)
        return found if is_ours and has_own_crc(page, 12) else None

    def slot_place(self, slot):
        return self.superblock.first_slot_offset + slot * self.superblock.slot_len

    def survey(self):
        """The header, or of a sealed segment the trailer, in each slot that says that it belongs to this journal."""
        for slot in range(self.superblock.slot_count):
            header = self.read_segment_page(slot, b"HFSEGHDR\1\0\0\0", self.slot_place(slot))
            trailer = self.read_segment_page(slot, b"HFSEGEND\1\0\0\0", self.slot_place(slot + 1) - PAGE)
            segment = trailer if trailer and (not header or header[1:9] == trailer[1:9]) else header  # the bytes from 16 to 79
            if segment and segment.open_count <= self.superblock.open_count:
                yield segment

    def follow_segments(self):
        """Takes the segments that count, one after the other from the low-water mark on."""
        block, slots = self.superblock, sorted(self.survey(), key=lambda slot: -slot.open_count)
        number, position, is_hiding = block.low_water_segment, (block.low_water_seq, block.low_water_batch_crc), False
        while True:
            copies = [slot for slot in slots if (slot.number, slot.after_seq, slot.after_batch_crc) == (number, *position)]
            content = next((content for copy in copies if (content := self.read_segment(copy)).end >= copy.carried_end), None)
            is_hiding = content.is_hiding if content else is_hiding
            if content is None or content.end == PAGE:
                break
            self.extents, self.events = self.extents + content.extents, self.events + content.events
            number, position = number + 1, (content.last_seq, content.last_batch_crc)
        if is_hiding or any(segment.number >= number and segment.after_seq > position[0] for segment in slots):
            self.damage = f"there are records behind record {position[0]} that can't be reached"

    def read_segment(self, segment):
        if segment.begin.startswith(b"HFSEGHDR"):
            return self.walk(segment, self.superblock.slot_len - PAGE)
        if crc32c(footer := self.read(self.slot_place(segment.slot) + segment.data_end, min(segment.footer_len, self.superblock.slot_len))) == segment.footer_crc:
            return self.parse_footer(segment, footer)
        content = self.walk(segment, segment.data_end)
        # What is behind an unreadable batch counts as lost: as if a sync of all volumes began there, without an id that ends it.
        first = content.last_seq + 1 if content.last_seq < segment.last_seq else segment.after_seq + 1
        volumes = range(self.superblock.volume_count if content[2:4] != (segment.last_seq, segment.last_batch_crc) else 0)
        gap = [Event(first, RECORD.tuple(*[0] * 7, volume, SYNC_BEGIN), b"") for volume in volumes]
        return Content(content.extents, content.events + gap, segment.last_seq, segment.last_batch_crc, segment.data_end, False)

    def parse_footer(self, segment, data):
        footer, slot_place = FOOTER.parse(data), self.slot_place(segment.slot)
        extents, events, crcs_at = [], [], FOOTER.size + FOOTER_EXTENT.size * footer.extent_count
        crcs, at = struct.unpack_from(f"<{footer.crc_count}I", data, crcs_at), crcs_at + 4 * footer.crc_count
        for index in range(footer.extent_count):
            found = FOOTER_EXTENT.parse(data, FOOTER.size + FOOTER_EXTENT.size * index)
            seq, length = footer.base_seq + found.seq_delta, found.len_sectors * SECTOR
            own_crcs = (found.crc,) if length <= PAGE else crcs[found.crc : found.crc + units(length)]
            place = None if found.kind == ZEROES else slot_place + found.payload_sector * SECTOR
            extents.append(Extent(seq, found.volume, found.offset, length, place, own_crcs))
        for _ in range(footer.event_count):
            (position,), record, at = struct.unpack_from("<Q", data, at), RECORD.parse(data, at + 8), at + 8 + RECORD.size
            events.append(Event(position, record, data[at : at + record.payload_len]))
            at += units(record.payload_len, 8) * 8
        return Content(extents, events, segment.last_seq, segment.last_batch_crc, segment.data_end, False)

    def walk(self, segment, end):
        """What the batches of a segment hold, up to the first place where none continues it."""
        block, slot_place, extents, events, at, is_hiding = self.superblock, self.slot_place(segment.slot), [], [], PAGE, False
        last_seq, last_crc, last_open_count = segment.after_seq, segment.after_batch_crc, 0
        while found := self.read_batch(slot_place + at, end - at, segment.begin.startswith(b"HFSEGEND")):
            batch, batch_extents, batch_events = found
            is_local, is_tail = batch.flags & 1, batch.generation == block.tail_generation
            is_stale = batch.first_seq < block.generation_first_seq if is_tail else batch.last_seq > block.generation_fork_seq
            if (batch.journal_id != block.journal_id or batch.prev_batch_crc != last_crc or (is_stale and not is_local)
                    or not last_open_count <= batch.open_count <= segment.open_count or at >= segment.carried_end and batch.open_count != segment.open_count
                    or (batch.first_seq != last_seq if is_local else batch.first_seq <= last_seq)):
                break
            extents, events, last_open_count = extents + batch_extents, events + batch_events, batch.open_count
            at, (last_seq, last_crc) = at + batch.total_len, (last_seq, last_crc) if is_local else (batch.last_seq, batch.crc)
        else:  # no valid batch: torn by a power cut, or damaged since, which shows if a later batch is there
            later = ((place, self.read_batch(slot_place + place, end - place)) for place in range(at + PAGE, end, PAGE))
            is_hiding = segment.open_count == block.open_count and any(
                found and found[0].journal_id == block.journal_id and found[0].first_seq > last_seq
                and (found[0].open_count == segment.open_count or place < segment.carried_end) for place, found in later)
        return Content(extents, events, last_seq, last_crc, at, is_hiding)

    def read_batch(self, place, room, is_sealed=False):
        """(header, extents, events) of the batch at a place of the file, or None if no valid one is there. Of a sealed one payloads may be damaged."""
        batch = BATCH.parse(self.read(place, BATCH.size))
        crcs_end = (records_end := BATCH.size + RECORD.size * batch.record_count) + 4 * batch.crc_count
        if (batch.begin != b"HFBATCH\0\1\0\x80\0" or batch.flags > 1 or not 1 <= batch.record_count <= MAX_RECORDS
                or not units(crcs_end, SECTOR) * SECTOR == batch.payload_offset <= batch.total_len <= min(room, MAX_BATCH_BYTES)
                or not has_own_crc((data := self.read(place, batch.total_len))[:crcs_end], 92)):
            return None
        extents, events, crcs = [], [], struct.unpack_from(f"<{batch.crc_count}I", data, records_end)
        for index in range(batch.record_count):
            record = RECORD.parse(data, BATCH.size + RECORD.size * index)
            payload = data[record.payload_offset : record.payload_offset + record.payload_len]
            own_crcs = crcs[record.first_crc : record.first_crc + units(record.payload_len)]
            if not (is_whole := len(payload) == record.payload_len and is_intact(payload, own_crcs)) and not is_sealed:
                return None
            if record.kind in (WRITE, ZEROES, SYNC_DATA):
                at = None if record.kind == ZEROES else place + record.payload_offset
                extents.append(Extent(record.seq, record.volume, record.offset, record.len, at, own_crcs))
            elif record.kind != VOID and is_whole:
                events.append(Event(record.seq or batch.first_seq, record, payload))
        return batch, extents, events

    def syncs(self):
        """(begin, end) of each time during which a sync of any volume was under way."""
        under_way, syncs = {}, []
        for position, record, _ in self.events:
            begin, sync_id = under_way.get(record.volume, (position, None))
            if record.kind == SYNC_BEGIN:
                under_way[record.volume] = (begin, record.sync_id)
            elif record.kind == SYNC_END and record.sync_id == sync_id:
                syncs.append((under_way.pop(record.volume)[0], position))
        return syncs + [(begin, FOREVER) for begin, _ in under_way.values()]

    def checkpoints(self):
        lowest, syncs = max(self.superblock.low_water_seq, self.superblock.promotion_intent_seq), self.syncs()
        for seq, _, payload in (event for event in self.events if event.record.kind == CHECKPOINT):
            cut, time_us, tag_len = CHECKPOINT_PAYLOAD.parse(payload)
            if lowest <= cut <= seq and not any(begin <= cut < end for begin, end in syncs):
                yield Checkpoint(cut, seq, time_us, payload[CHECKPOINT_PAYLOAD.size :][:tag_len].decode(errors="replace"))

    def find(self, at):
        found = [found for found in sorted(self.checkpoints()) if at in ("latest", found.tag, str(found.seq))]
        if not found or at == "latest" and self.damage:
            raise Refused(f"checkpoint {at} isn't there{self.damage and '; ' + self.damage}")
        return found[-1]

    def extract(self, cut, disk, recovery_disk, out):
        volumes = [VOLUME.parse(self.superblock.volumes, VOLUME.size * index) for index in range(self.superblock.volume_count)]
        if disk >= len(volumes) or volumes[disk].base_seq > cut or self.left.get(disk, FOREVER) <= cut:
            raise Refused(f"there is no disk {disk} at record {cut}")
        sizes = [volumes[disk].size] + [record.len for at, record, _ in self.events if record.kind == RESIZE and record.volume == disk and at <= cut]
        base_seq, gaps = volumes[disk].base_seq, [(0, sizes[-1])]
        for extent in sorted(self.extents, key=lambda extent: extent.seq, reverse=True):
            if extent.volume == disk and base_seq < extent.seq <= cut:
                for start, end in take(gaps, extent.offset, extent.offset + extent.len):
                    if extent.place is not None:
                        os.pwrite(out, self.read_payload(extent, start - extent.offset, end - extent.offset), start)
        if lost := [bad for bad in self.bad_ranges if bad.volume == disk and take(gaps[:], bad.offset, bad.offset + bad.len)]:
            raise Refused(f"disk {disk} is lost at {lost[0].offset}: record {lost[0].seq} was damaged before it was promoted")
        for start, end in gaps:
            for place in range(start, end, CHUNK):
                if (data := os.pread(recovery_disk, min(CHUNK, end - place), place)).strip(b"\0"):
                    os.pwrite(out, data, place)
        os.truncate(out, sizes[-1])

    def read_payload(self, extent, start, end):
        first, behind = start // PAGE, units(end)
        data = self.read(extent.place + first * PAGE, min(extent.len, behind * PAGE) - first * PAGE)
        if not is_intact(data, extent.crcs[first:behind]):
            raise Refused(f"the payload of record {extent.seq} is damaged, at {extent.place + first * PAGE} of the journal")
        return data[start - first * PAGE : end - first * PAGE]


def main(arguments):
    match arguments:
        case ["list", folder]:
            journal = Journal(folder)
            for cut, seq, time_us, tag in sorted(journal.checkpoints()):
                print(seq, cut, time_us, tag, sep="\t")
            if journal.damage:
                raise Refused(journal.damage)
        case ["extract", folder, "--at", at, "--disk", disk, "--out", path] if disk.isdecimal():
            journal = Journal(folder)
            with tempfile.TemporaryDirectory(dir=os.path.dirname(path) or ".") as scratch, open(os.path.join(scratch, "out"), "wb") as out:
                journal.extract(journal.find(at).cut, int(disk), os.open(os.path.join(folder, f"disk-{disk}.raw"), os.O_RDONLY), out.fileno())
                os.replace(out.name, path)
        case _:
            raise Refused("wrong arguments; " + __doc__)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Refused, OSError, OverflowError, MemoryError, ValueError, struct.error) as error:
        sys.exit(f"journal_reader.py: {error}")
