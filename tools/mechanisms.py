"""What keeps each promise of the README's table: see `tools/prove_promises.py`."""

from __future__ import annotations

from typing import NamedTuple


class Mechanism(NamedTuple):
    """A text that keeps a promise: `out` of `file`, `put` in its place when it is `gone`."""

    promise: str
    gone: str
    file: str
    out: str
    put: str
    tests: tuple[str, ...]


KEPT = "an acknowledged frame is kept"
FSYNC = "every kind of fsync is needed"
DISK = (
    "the store answers a full or failing disk with an error, keeps what it has and takes frames "
    "again later"
)
RESENT = "a resent frame is no second frame"
CLOSED = "closed versions stay as they are, byte for byte"
PROBES = "a later version replaces its parent only if it shows its probes as well"
RESTART = "a restart learns on bit for bit"
LATER = "what a later task sees changes nothing of an ended one's modules"
OTHERS = "the end of a stream's task closes no other stream's modules"
POSE = "one wrong pose does not sink the ground"
EMPTIED = "an emptied ledger is refused, its modules stay"
OPEN = "damaged checkpoints cost open work alone"
ENDED = "a request to close a task is kept"
PICTURES = "no picture of a closed task stays on disk"
DAMAGED = "a damaged module is quarantined, the rest is served"
MIRROR = "a mirror shows what its leader shows, byte for byte"
COPY = "a copy made while the map grows is sound"
MODEST = "a modest stream is answered within 3 s"
LINK = "no frame is lost or doubled on the way"
MEMORY = "bounded memory, others are served"
COMPUTE = "a broken compute thread ends the process with 1"
RESIDENT = "modules in memory stay within `render.resident_mb`, whatever the map holds"
ROOM = "learning goes on with fewer rays, or stops while frames are still taken"
STRANGERS = "strangers get nothing"
FLOOD = "a flood of frames does not hold up views"
MALFORMED = "malformed messages harm nobody"
SLOW = "a slow disk holds up no view and no status: frames wait for it, or are told busy"
FAILING = "a full, read-only or failing disk: publishers are told busy, views go on, then work too"
STUCK = "a disk that never answers ends the process with 1"

BY_HAND = ("memory stays flat",)
"""Promises whose proof takes half an hour: `tools/soak.py`."""

_POWER = "tests/store/test_powerloss.py::"
_LOSS = (_POWER + "test_nothing_promised_is_lost[False]",)
_ORDER = (_POWER + "test_a_cut_right_after_a_promise_finds_it_kept",)
_FAULTS = "tests/daemon/test_faults.py::"
_SERVE = "tests/daemon/test_serve.py::"
_MAP = "tests/store/test_map_store.py::"
_MAPPER = "tests/mapping/test_mapper.py::"
_MIRROR = "tests/daemon/test_mirror.py::"
_CLIENT = "tests/test_client.py::"
_KEYS = "tests/daemon/test_security.py::"
_HWM_SAYS = '"""Messages of one connection that wait inside ZeroMQ before TCP pushes back."""\n\n'

MECHANISMS = (
    Mechanism(
        KEPT, "commits are not synced", "mclnf_edge/store/database.py",
        '"synchronous=full"', '"synchronous=off"', _LOSS,
    ),
    Mechanism(
        KEPT, "a module's row, which lets frames go, comes before its file",
        "mclnf_edge/store/module_store.py",
        "        write_durably(self.folder / file, data, self._files)\n"
        "        digest = hashlib.sha256(data).hexdigest()\n"
        "        record = new_record(module, version, digest, file, len(data), meta)\n"
        "        self._ledger.put_module(record, let_go)\n",
        "        digest = hashlib.sha256(data).hexdigest()\n"
        "        record = new_record(module, version, digest, file, len(data), meta)\n"
        "        self._ledger.put_module(record, let_go)\n"
        "        write_durably(self.folder / file, data, self._files)\n",
        _LOSS,
    ),
    Mechanism(
        KEPT, "frames are acknowledged half a second before they are committed",
        "mclnf_edge/daemon/desk.py",
        "            statuses = self.store.put_frames([put.row for put in puts], self._rejected)\n",
        '            statuses = ["accepted" for _ in puts]\n'
        "            late = ([put.row for put in puts], dict(self._rejected))\n"
        "            threading.Timer(0.5, self.store.put_frames, late).start()\n",
        (_SERVE + "test_twenty_kills_lose_no_acknowledged_frame",),
    ),
    Mechanism(
        FSYNC, "a file's contents are not synced", "mclnf_edge/store/files.py",
        "            files.fsync(fd)\n", "", _ORDER,
    ),
    Mechanism(
        FSYNC, "a file's name is not synced", "mclnf_edge/store/files.py",
        "        files.rename(temporary, path)\n        files.fsync_dir(path.parent)\n",
        "        files.rename(temporary, path)\n", _ORDER,
    ),
    Mechanism(
        FSYNC, "a new directory's name is not synced", "mclnf_edge/store/files.py",
        "        files.mkdir(path)\n        files.fsync_dir(path.parent)\n",
        "        files.mkdir(path)\n", _ORDER,
    ),
    # The ledger's own name needs no line: SQLite syncs the directory with its log's name.
    Mechanism(
        FSYNC, "after a failed fsync the log is not written anew", "mclnf_edge/store/database.py",
        "                write_durably(wal, wal.read_bytes(), self._files)\n",
        "                pass\n",
        (_POWER + "test_nothing_promised_is_lost[True]",),
    ),
    Mechanism(
        DISK, "a failing disk is no DiskFull", "mclnf_edge/store/files.py",
        "kind = DiskFull if error.errno in _NO_ROOM else StoreError", "kind = StoreError",
        ("tests/store/test_faults.py::test_every_file_call_may_fail_once",),
    ),
    Mechanism(
        DISK, "SQLite's full disk is no DiskFull", "mclnf_edge/store/database.py",
        '("disk is full", "disk I/O error", ', '("disk I/O error", ',
        ("tests/store/test_faults.py::test_a_full_disk_refuses_and_goes_on_when_there_is_room",),
    ),
    Mechanism(
        RESENT, "the ledger does not look for the frame's number", "mclnf_edge/store/ledger.py",
        "    if seen is not None:\n", "    if False:\n",
        (_SERVE + "test_resends_are_duplicates_and_a_new_session_is_not",),
    ),
    Mechanism(
        RESENT, "a second answer counts again", "mclnf_edge/wire/window.py",
        "        entry = self._entries.pop(identity, None)\n",
        "        entry = self._entries.get(identity)\n",
        (_CLIENT + "test_lost_acknowledgement_is_resent_and_makes_no_second_frame",),
    ),
    Mechanism(
        RESENT, "nothing is sent again", "mclnf_edge/wire/window.py",
        "entry.due, entry.held = now + resend_s, False",
        'entry.due, entry.held = float("inf"), False',
        (_CLIENT + "test_one_lost_answer_among_others_is_asked_for_again",),
    ),
    Mechanism(
        CLOSED, "a version may be committed twice", "mclnf_edge/store/module_store.py",
        "        if self._ledger.has_module(module, version):\n", "        if False:\n",
        (_MAP + "test_a_module_comes_back_as_committed",),
    ),
    Mechanism(
        CLOSED, "a closed module still takes steps", "mclnf_edge/mapping/modules.py",
        "        self.rewritten.add(module.slot)\n        self.owner[module.slot] = -1\n",
        "        self.rewritten.add(module.slot)\n",
        (_MAPPER + "test_what_is_closed_stays_as_it_is",),
    ),
    Mechanism(
        PROBES, "any later version replaces its parent", "mclnf_edge/mapping/revisits.py",
        "        if new[-1] >= old - LOSS_DB:\n", "        if True:\n",
        ("tests/mapping/test_revisits.py::test_a_revisit_that_spoils_the_map_does_not_stay",),
    ),
    Mechanism(
        RESTART, "the order of rays starts anew", "mclnf_edge/mapping/checkpoint.py",
        '    mapper.random.bit_generator.state = meta["random"]\n', "",
        (_MAPPER + "test_a_restart_changes_no_bit",),
    ),
    Mechanism(
        RESTART, "the networks' moments start anew", "mclnf_edge/mapping/checkpoint.py",
        "            own[m.row] = kept\n", "            pass\n",
        (_MAPPER + "test_a_restart_changes_no_bit",),
    ),
    Mechanism(
        ENDED, "the request is not in the ledger", "mclnf_edge/daemon/worker.py",
        '        self.store.put_task(name, state, {"stream": stream, "task": task})\n',
        "        pass\n",
        (_SERVE + "test_a_close_request_outlives_a_kill",),
    ),
    Mechanism(
        PICTURES, "a frame that is let go keeps its payload", "mclnf_edge/store/ledger.py",
        "SET state = 'done', payload = NULL, rays", "SET state = 'done', rays",
        (_SERVE + "test_a_flight_is_mapped_closed_and_served_again",),
    ),
    Mechanism(
        PICTURES, "free pages are not wiped", "mclnf_edge/store/database.py",
        '"secure_delete=on"', '"secure_delete=off"',
        (_MAP + "test_no_byte_of_a_let_go_frame_stays_on_disk",),
    ),
    Mechanism(
        PICTURES, "the log is not emptied", "mclnf_edge/store/database.py",
        'return not self._connection.execute("PRAGMA wal_checkpoint(truncate)").fetchone()[0]',
        "return True",
        (_MAP + "test_no_byte_of_a_let_go_frame_stays_on_disk",),
    ),
    Mechanism(
        DAMAGED, "a file's digest is not compared", "mclnf_edge/store/module_store.py",
        "        if digest != record.digest:\n", "        if False:\n",
        (_MAP + "test_flipped_bits_and_cut_files_are_named",),
    ),
    Mechanism(
        DAMAGED, "nothing is quarantined for its size", "mclnf_edge/store/module_store.py",
        "            self._ledger.quarantine(record.id, record.version)\n", "            pass\n",
        (_MAP + "test_flipped_bits_and_cut_files_are_named",),
    ),
    Mechanism(
        DAMAGED, "the daemon does not survive a damaged module", "mclnf_edge/daemon/worker.py",
        "            self._replace(mapper, module, error)\n", "            raise\n",
        (_SERVE + "test_a_damaged_module_is_quarantined_and_the_rest_is_served",),
    ),
    Mechanism(
        MIRROR, "a damaged chunk counts", "mclnf_edge/daemon/follower.py",
        "            if _is_sound(asked, reply):\n", "            if True:\n",
        (_MIRROR + "test_a_cut_link_is_gone_on_with_and_a_damaged_chunk_is_refused",),
    ),
    Mechanism(
        MIRROR, "another map is followed", "mclnf_edge/daemon/follower.py",
        "            if ours.digest != reply.last:\n", "            if False:\n",
        (_MIRROR + "test_another_map_is_not_followed",),
    ),
    Mechanism(
        COPY, "the ledger is copied without its log", "mclnf_edge/store/inspection.py",
        "        _copy_ledger(path / LEDGER, partial / LEDGER)\n",
        "        shutil.copyfile(path / LEDGER, partial / LEDGER)\n",
        (_FAULTS + "test_a_snapshot_of_a_map_that_adapts_is_sound_and_can_be_served",),
    ),
    Mechanism(
        MODEST, "all that one connection sends is taken in, and in one round",
        "mclnf_edge/daemon/sockets.py",
        "RECEIVE_HWM = 16\n" + _HWM_SAYS + "ROUND = 8\n",
        "RECEIVE_HWM = 100_000\n" + _HWM_SAYS + "ROUND = 100_000\n",
        (_FAULTS + "test_four_flooding_streams_do_not_starve_a_modest_one",),
    ),
    Mechanism(
        MODEST, "a client sends beyond its credit", "mclnf_edge/wire/window.py",
        "fits = self._bytes + size <= self.credit_bytes or not self._entries", "fits = True",
        (_CLIENT + "test_unanswered_bytes_stay_within_the_credit",),
    ),
    Mechanism(
        FLOOD, "pictures are checked while a view is made", "mclnf_edge/daemon/service.py",
        "                    self._give_way()\n", "                    pass\n",
        (_FAULTS + "test_a_flood_is_held_back_while_a_view_is_made",),
    ),
    Mechanism(
        LINK, "frames of a broken connection are not sent over the next",
        "mclnf_edge/wire/window.py",
        "            entry.due, entry.held = 0.0, False\n",
        '            entry.due, entry.held = float("inf"), False\n',
        (
            _CLIENT + "test_publishing_survives_cuts",
            _FAULTS + "test_a_bad_network_loses_and_doubles_nothing",
            "tests/daemon/test_network.py::test_a_lossy_reordering_link_loses_and_doubles_nothing",
        ),
    ),
    Mechanism(
        LINK, "a spooled record is forgotten when it is sent", "mclnf_edge/outbox.py",
        "            self._spool.append([entry.record])\n", "            pass\n",
        (_CLIENT + "test_frames_of_a_dead_link_are_spooled_and_sent_later_once",),
    ),
    Mechanism(
        MEMORY, "the spool has no cap", "mclnf_edge/spool.py",
        "        if self.disk_bytes + size > self.max_bytes:\n", "        if False:\n",
        (_CLIENT + "test_full_spool_refuses_the_new_frame_and_keeps_the_old",),
    ),
    Mechanism(
        MEMORY, "answers to a client that never reads pile up", "mclnf_edge/daemon/sockets.py",
        "(zmq.SNDHWM, SEND_HWM)", "(zmq.SNDHWM, 0)",
        (_FAULTS + "test_a_client_that_never_reads_costs_bounded_memory",),
    ),
    Mechanism(
        MEMORY, "a part may have any size", "mclnf_edge/daemon/sockets.py",
        "(zmq.MAXMSGSIZE, MAX_PART_BYTES)", "(zmq.MAXMSGSIZE, -1)",
        (_FAULTS + "test_oversized_messages_end_their_connection_or_are_named",),
    ),
    Mechanism(
        MEMORY, "a picture may have any size", "mclnf_edge/geometry.py",
        "MAX_PIXELS: Final = 2**26", "MAX_PIXELS: Final = 2**40",
        (_FAULTS + "test_a_decompression_bomb_is_rejected_unopened",),
    ),
    Mechanism(
        COMPUTE, "an ended thread is not seen", "mclnf_edge/daemon/service.py",
        "if self.worker.error is not None or not self.worker.is_alive():", "if False:",
        (_FAULTS + "test_a_broken_compute_thread_ends_the_process",),
    ),
    Mechanism(
        COMPUTE, "the watchdog is fed whether the thread moves or not",
        "mclnf_edge/daemon/service.py",
        "        if stalled > self.config.watch.hang_s:\n", "        if False:\n",
        (_FAULTS + "test_a_broken_compute_thread_ends_the_process",),
    ),
    Mechanism(
        SLOW, "reads wait for the commit that is under way", "mclnf_edge/store/database.py",
        '        with self._read_lock, self._translated("reading"):\n',
        '        with self._lock, self._translated("reading"):\n',
        (_FAULTS + "test_a_slow_disk_holds_up_no_view",),
    ),
    Mechanism(
        SLOW, "the socket waits for the desk", "mclnf_edge/daemon/service.py",
        "_PATIENCE_S = 0.1\n", "_PATIENCE_S = 100.0\n",
        (_FAULTS + "test_a_slow_disk_holds_up_no_view",),
    ),
    Mechanism(
        SLOW, "the compute thread waits for the disk", "mclnf_edge/daemon/worker.py",
        "                result = self._on_disk(act)\n", "                result = act()\n",
        (_FAULTS + "test_a_slow_disk_holds_up_no_view",),
    ),
    Mechanism(
        SLOW, "nobody is told that the disk is slow", "mclnf_edge/daemon/desk.py",
        "self.stalled_s > _SLOW_S or", "False or",
        (_FAULTS + "test_a_slow_disk_holds_up_no_view",),
    ),
    Mechanism(
        FAILING, "a frame that the disk refuses is forgotten", "mclnf_edge/daemon/desk.py",
        "        except DiskFull as error:\n", "        except MemoryError as error:\n",
        (_FAULTS + "test_a_failing_disk_is_busy_and_work_goes_on_after_it",),
    ),
    Mechanism(
        FAILING, "the compute thread ends when the disk refuses", "mclnf_edge/daemon/worker.py",
        "            except DiskFull as error:\n", "            except MemoryError as error:\n",
        (_FAULTS + "test_a_failing_disk_is_busy_and_work_goes_on_after_it",),
    ),
    Mechanism(
        STUCK, "the thread at the ledger is not watched", "mclnf_edge/daemon/service.py",
        "        if self.desk.stalled_s > self.config.watch.hang_s:\n", "        if False:\n",
        (_FAULTS + "test_a_disk_that_never_answers_ends_the_process",),
    ),
    Mechanism(
        RESIDENT, "no module ever leaves memory", "mclnf_edge/mapping/residency.py",
        "idle = [c for c in self._pool.slot_of if self._may_go(c)]", "idle: list[Cell] = []",
        (
            "tests/mapping/test_residency.py::"
            "test_a_view_of_more_than_the_budget_is_whole_and_the_budget_holds_again_after_it",
        ),
    ),
    Mechanism(
        ROOM, "a step for which there is no room is an error", "mclnf_edge/mapping/torch_engine.py",
        "        except torch.cuda.OutOfMemoryError as error:\n"
        "            reason = str(error)\n"
        "        torch.cuda.empty_cache()  # only here",
        "        except MemoryError as error:\n"
        "            reason = str(error)\n"
        "        torch.cuda.empty_cache()  # only here",
        ("tests/mapping/test_engines.py::test_a_full_device_gets_fewer_rays",),
    ),
    Mechanism(
        STRANGERS, "roles are not compared", "mclnf_edge/daemon/security.py",
        "    if not user.roles & needed:\n", "    if False:\n",
        (_KEYS + "test_each_role_may_do_its_own_and_nothing_else",),
    ),
    Mechanism(
        STRANGERS, "the daemon does not ask for roles", "mclnf_edge/daemon/service.py",
        "                check_role(incoming.user, message)\n", "",
        (_MIRROR + "test_keys_with_the_role_follow_and_a_module_damaged_at_the_leader",),
    ),
    Mechanism(
        STRANGERS, "an unknown key gets in", "mclnf_edge/daemon/security.py",
        'STRANGER = User("stranger", frozenset())', 'STRANGER = User("stranger", frozenset(ROLES))',
        (_KEYS + "test_unknown_key_gets_nothing",),
    ),
    Mechanism(
        STRANGERS, "connections are not encrypted", "mclnf_edge/daemon/sockets.py",
        "            self._socket.curve_server = True\n", "",
        (_KEYS + "test_plain_connection_gets_nothing",),
    ),
    Mechanism(
        MALFORMED, "a header that is no MessagePack is not named", "mclnf_edge/wire/codec.py",
        "    except (ValueError, TypeError, msgpack.UnpackException) as error:\n",
        "    except MemoryError as error:\n",
        ("tests/wire/test_fuzz.py::test_decoder_survives_twenty_thousand_malformed_messages",),
    ),
    Mechanism(
        MALFORMED, "anything passes for a number", "mclnf_edge/wire/codec.py",
        "        if type(value) not in (int, float) or not math.isfinite(value):\n",
        "        if False:\n",
        ("tests/wire/test_fuzz.py::test_decoder_survives_twenty_thousand_malformed_messages",),
    ),
    Mechanism(
        LATER, "an ended task's module learns from the next one's frames",
        "mclnf_edge/mapping/mapper.py",
        "return module is None or not self._ended_all(module) or frame.task in module.tasks",
        "return True",
        (_MAPPER + "test_what_a_later_task_sees_waits_for_the_next_version",),
    ),
    Mechanism(
        OTHERS, "every open module is asked to close", "mclnf_edge/mapping/mapper.py",
        "if stream in self.streams_of(module) if name is None else name in module.tasks:",
        "if True:",
        (_MAPPER + "test_the_end_of_a_streams_task_closes_what_its_frames_are_in",),
    ),
    Mechanism(
        POSE, "ground at any depth is believed", "mclnf_edge/mapping/structure.py",
        "                points = points[points[:, 2] > deepest]\n", "",
        (_MAPPER + "test_one_wrong_pose_does_not_sink_the_ground",),
    ),
    Mechanism(
        EMPTIED, "a ledger that knows nothing is a new map's", "mclnf_edge/store/map_store.py",
        "            _refuse_empty_ledger(store)\n", "",
        (_MAP + "test_an_emptied_ledger_is_no_reason_to_tidy_modules_away",),
    ),
    Mechanism(
        OPEN, "a damaged checkpoint ends the start", "mclnf_edge/daemon/worker.py",
        "            self.store.checkpoint_set_aside(OPEN_WORK)\n            return None\n",
        "            raise\n",
        ("tests/daemon/test_worker.py::test_damaged_checkpoints_lose_open_work_not_the_map",),
    ),
)  # fmt: skip
