"""Conformance of the server as libnbd sees it, with libnbd's own checks switched off. Arguments: a writable URI, a
read-only URI of the same size (64 MiB)."""

import errno
import sys

import nbd

SIZE = 64 << 20
writable, frozen = sys.argv[1:]


def connect(uri, structured=True, contexts=True):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    if contexts:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_uri(uri)
    return h


def refused(expected, call, *arguments, **named):
    try:
        call(*arguments, **named)
    except nbd.Error as error:
        assert error.errno == errno.errorcode[expected], (error.errno, expected, arguments)
    else:
        raise AssertionError(f"{call} {arguments} was accepted")


def check(h):
    data = bytes(range(256)) * 16
    assert h.get_size() == SIZE
    h.pwrite(data, 1)
    assert h.pread(4096, 1) == data
    h.pwrite(data, 5000, nbd.CMD_FLAG_FUA)
    assert h.pread(4096, 5000) == data
    # The end of the export.
    h.pwrite(data, SIZE - 4096)
    refused(errno.ENOSPC, h.pwrite, data, SIZE - 4095)
    refused(errno.EINVAL, h.pread, 4096, SIZE - 4095)
    refused(errno.EINVAL, h.pread, 1, (1 << 63) - 1)
    refused(errno.EINVAL, h.trim, 4096, SIZE)
    refused(errno.ENOSPC, h.zero, 4096, SIZE)
    refused(errno.EINVAL, h.cache, 4096, SIZE)
    # Flags that do not exist or do not belong.
    refused(errno.EINVAL, h.pread, 512, 0, flags=nbd.CMD_FLAG_NO_HOLE)
    refused(errno.EINVAL, h.pwrite, data, 0, nbd.CMD_FLAG_REQ_ONE)
    refused(errno.EINVAL, h.trim, 512, 0, nbd.CMD_FLAG_DF)
    refused(errno.EINVAL, h.cache, 512, 0, 0x4000)
    refused(errno.EINVAL, h.flush, 0x8000)
    # Larger than what is advertised, and than what is served.
    big = b"x" * (40 << 20)
    h.pwrite(big, 0)
    assert h.pread(len(big), 0) == big
    assert h.pread(512, 0) == b"x" * 512
    # Effects without data.
    h.zero(1 << 20, 0)
    h.zero(1 << 20, 2 << 20, nbd.CMD_FLAG_NO_HOLE)
    # Zeroing may have to copy what a snapshot keeps first, so nobody is promised that it is fast.
    refused(errno.EINVAL, h.zero, 1 << 20, 4 << 20, nbd.CMD_FLAG_FAST_ZERO)
    h.zero(1 << 20, 4 << 20)
    h.trim(1 << 20, 6 << 20, nbd.CMD_FLAG_FUA)
    h.cache(SIZE, 0)
    h.flush()
    for at in (0, 2, 4, 6):
        assert h.pread(1 << 20, at << 20) == bytes(1 << 20), at
        assert h.pread(1 << 20, (at + 1) << 20) == big[: 1 << 20], at


def check_many_in_flight(h):
    blocks = [bytes([seed]) * 65536 for seed in range(64)]
    done = []

    def completed(error):
        done.append(error.value)
        return 1

    for i, block in enumerate(blocks):
        h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(block)), i * 65536, completed)
    while len(done) < len(blocks):
        h.poll(-1)
    assert done == [0] * len(blocks), done
    for i, block in enumerate(blocks):
        assert h.pread(65536, i * 65536) == block, i


def check_status(h):
    h.zero(SIZE, 0)
    h.pwrite(b"d" * (1 << 20), 8 << 20)
    h.flush()
    seen = []

    def extents(context, offset, entries, error):
        assert context == "base:allocation"
        seen.append(entries)

    h.block_status(SIZE, 0, extents)
    assert seen[-1] == [8 << 20, 3, 1 << 20, 0, 55 << 20, 3], seen
    h.block_status(SIZE, 0, extents, nbd.CMD_FLAG_REQ_ONE)
    assert seen[-1] == [8 << 20, 3], seen
    refused(errno.EINVAL, h.block_status, 512, SIZE, extents)


def check_read_only(h):
    assert h.is_read_only()
    refused(errno.EPERM, h.pwrite, b"x" * 512, 0)
    refused(errno.EPERM, h.trim, 512, 0)
    refused(errno.EPERM, h.zero, 512, 0)
    h.flush()
    h.pread(4096, 0)


def check_multi_conn(a, b):
    assert a.can_multi_conn() and b.can_multi_conn()
    a.pwrite(b"m" * 4096, 0)
    assert b.pread(4096, 0) == b"m" * 4096
    b.flush()
    a.shutdown()
    assert b.pread(4096, 0) == b"m" * 4096


for structured in (True, False):
    check(connect(writable, structured))
    check_many_in_flight(connect(writable, structured))
    check_read_only(connect(frozen, structured))
check_status(connect(writable))
deaf = connect(writable, contexts=False)
refused(errno.EINVAL, deaf.block_status, 512, 0, lambda *_: 0)
check_multi_conn(connect(writable), connect(writable, structured=False))
chunks = []
h = connect(writable)
h.pread_structured(1 << 20, 0, lambda data, offset, status, error: chunks.append((offset, len(data))), nbd.CMD_FLAG_DF)
assert chunks == [(0, 1 << 20)], chunks
print("all as it should be")
