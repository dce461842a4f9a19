"""What a daemon answers to those that follow it: which modules there are, and their bytes."""

from __future__ import annotations

import hashlib

from mclnf_edge.errors import Corrupt
from mclnf_edge.store import MapStore
from mclnf_edge.wire.messages import Committed, FetchModule, Follow, ModuleChunk
from mclnf_edge.wire.mirroring import MAX_LISTED, Listed, pack_list


def committed(store: MapStore, asked: Follow, frame_bytes: int) -> Committed:
    """The modules after those that the follower has."""
    before = min(asked.after, 1)
    records = store.modules_after(asked.after - before, MAX_LISTED + before)
    listed = [
        Listed(record.id, record.version, record.state, record.bytes, record.digest, record.meta)
        for record in records[before:]
    ]
    return Committed(
        id=asked.id,
        body=pack_list(store.meta(), listed),
        last=records[0].digest if before and records else "",
        total=sum(store.counts_of_modules().values()),
        frame_bytes=frame_bytes,
    )


def chunk(store: MapStore, asked: FetchModule) -> ModuleChunk:
    """Bytes of a module's file; a damaged one is quarantined, and Corrupt raised."""
    try:
        data = store.read_module(asked.module, asked.version, asked.offset, asked.length)
    except Corrupt:
        store.quarantine(asked.module, asked.version)
        raise
    digest = hashlib.sha256(data).hexdigest()
    return ModuleChunk(id=asked.id, data=data, offset=asked.offset, sha256=digest)
