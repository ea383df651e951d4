"""Frames on a private pipe, and the four ways a question can end. Standard library only.

Unusual: every reply must repeat the nonce of its question. Code under test shares the process with the
worker and may write to any descriptor it finds; without the nonce such bytes break the frame and are
reported, never believed.

A frame is a fixed header, a JSON document and a blob (arrays as one npz archive, without pickle):
``magic(4) nonce(16) json_bytes(u32) blob_bytes(u64)``.
"""

from __future__ import annotations

import contextlib
import struct
from json import dumps  # bound now: the target may put another one into the module

VERSION = 1
MAGIC = b"NVJ1"
HEADER = struct.Struct(">4s16sIQ")
MAX_JSON_BYTES = 32 * 2**20
MAX_BLOB_BYTES = 512 * 2**20

# How a question ends; the reply's "outcome".
ANSWERED = "answered"
RAISED = "raised"  # the target's code raised: theirs
UNSUPPORTED = "unsupported"  # the target has no such thing, with the reason
UNASKABLE = "unaskable"  # nothing can be asked of this target at all
BROKEN = "broken"  # the worker itself failed: ours


THEIRS = "_compat_raised_by_target"


class ProtocolError(Exception):
    """The bytes on the pipe are not an answer to the question that was asked."""


class NotSupported(Exception):
    """The target has no such thing; the text says what is missing."""


class Unaskable(Exception):
    """No question can be asked of this target; the text is one sentence for its maintainer."""


@contextlib.contextmanager
def theirs():
    """Whatever is raised inside came out of a call into the target."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(AttributeError):
            setattr(error, THEIRS, True)
        raise


def encode(nonce, document, blob=b""):
    """One frame as bytes. Raises ProtocolError when it is larger than a reader accepts."""
    text = dumps(document, allow_nan=True).encode()
    check_sizes(len(text), len(blob))
    return HEADER.pack(MAGIC, nonce, len(text), len(blob)) + text + blob


def decode_header(header, nonce=None):
    """(nonce, json_bytes, blob_bytes) of a frame's header. Raises ProtocolError on anything else."""
    magic, got, json_bytes, blob_bytes = HEADER.unpack(header)
    if magic != MAGIC or (nonce is not None and got != nonce):
        raise ProtocolError("something other than the worker wrote into the answer pipe")
    check_sizes(json_bytes, blob_bytes)
    return got, json_bytes, blob_bytes


def check_sizes(json_bytes, blob_bytes):
    """Raise ProtocolError when a frame is larger than either side accepts."""
    if json_bytes > MAX_JSON_BYTES or blob_bytes > MAX_BLOB_BYTES:
        raise ProtocolError(
            f"a message of {json_bytes + blob_bytes:,} bytes is over the limit "
            f"({MAX_JSON_BYTES:,} JSON, {MAX_BLOB_BYTES:,} array bytes)"
        )
