"""The child's main loop: read a question, ask the model, write the answer.

Started by path as ``worker.py QUESTION_FD ANSWER_FD``. Unusual: this file's folder leaves ``sys.path`` at
once and the worker's modules are loaded under a private package name, because the target may own top-level
modules called ``compat``, ``protocol`` or ``worker``.
"""

import os
import sys

if __name__ == "__main__" and sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]

import importlib.util
import io
import traceback
from json import loads  # bound now: the target may put another one into the module

PACKAGE = "_compat_child"


def forget_judge():
    """Take the judge's own checkout off sys.path: an editable install puts it there for every interpreter run.

    In an installed wheel that folder is site-packages, which the target needs.
    """
    checkout = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    if os.path.basename(checkout) not in ("site-packages", "dist-packages"):
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or ".") != checkout]


def load_package():
    """Load this folder as the private package and return its modules protocol, session and forks."""
    here = os.path.dirname(os.path.abspath(__file__))
    spec = importlib.util.spec_from_file_location(
        PACKAGE, os.path.join(here, "__init__.py"), submodule_search_locations=[here]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
    return [importlib.import_module(f"{PACKAGE}.{name}") for name in ("protocol", "session", "forks")]


def limit_memory(size):
    """Bound the process's data in bytes where the system offers it; 0 means no limit."""
    if size:
        try:
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        except (ImportError, ValueError, OSError):
            return


def main(question_fd, answer_fd):
    forget_judge()
    protocol, session, forks = load_package()
    # Children of the target must not inherit the pipes; the target's prints go to the kept output.
    os.set_inheritable(question_fd, False)
    os.set_inheritable(answer_fd, False)
    questions = os.fdopen(question_fd, "rb", buffering=0)
    answers = os.fdopen(answer_fd, "wb", buffering=0)
    state = None
    while True:
        header = read_exactly(questions, protocol.HEADER.size)
        if header is None:
            return
        nonce, json_bytes, _ = protocol.decode_header(header)
        request = loads(read_exactly(questions, json_bytes))
        blob = b""
        try:
            if request["question"] in forks.QUESTIONS:
                if forks.answered_elsewhere(request):
                    continue
                answer = forks.answer(request, "" if state is None else state.target["folder"])
            elif request["question"] == "hello":
                limit_memory(request["memory_bytes"])
                state = session.Session(request["target"], request["device"])
                answer = state.hello()
            else:
                answer = state.answer(request["question"], request["combo"], request["parameters"])
            plain, blob = split_arrays(answer)
            reply = {"outcome": protocol.ANSWERED, "answer": plain}
        except protocol.NotSupported as error:
            reply = {"outcome": protocol.UNSUPPORTED, "message": str(error)}
        except protocol.Unaskable as error:
            reply = {"outcome": protocol.UNASKABLE, "message": str(error)}
        except BaseException as error:  # SystemExit and KeyboardInterrupt raised by the target included
            reply = describe_error(protocol, error, request["target"] if state is None else state.target)
        flush_output()
        try:
            frame = protocol.encode(nonce, reply, blob)
        except protocol.ProtocolError as error:
            frame = protocol.encode(nonce, {"outcome": protocol.BROKEN, "message": str(error)})
        write_all(answers, frame)


def describe_error(protocol, error, target):
    """A raised exception as a reply: the target's when a frame of its files is on the stack, else ours."""
    frames = traceback.extract_tb(error.__traceback__)
    folder = os.path.realpath(target["folder"]) + os.sep
    here = os.path.dirname(os.path.abspath(__file__)) + os.sep
    theirs = [
        f
        for f in frames
        if os.path.realpath(f.filename).startswith(folder) and not os.path.realpath(f.filename).startswith(here)
    ]
    guarded = getattr(error, protocol.THEIRS, False)
    try:  # an exception of the target may be unable to say what it is
        message = " ".join(str(error)[:100_000].split())[:2000] or "(no message)"
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))[-8000:]
    except Exception:
        message, text = "(its message cannot be shown)", "".join(traceback.format_list(frames))[-8000:]
    name = type(error).__name__[:200]
    if not theirs and not guarded:
        return {"outcome": protocol.BROKEN, "message": f"{name}: {message}\n{text}"}
    where = f"{os.path.realpath(theirs[-1].filename)[len(folder) :]}:{theirs[-1].lineno}" if theirs else ""
    return {"outcome": protocol.RAISED, "type": name, "message": message, "where": where, "traceback": text}


def split_arrays(answer):
    """(JSON-able part, npz bytes) of an answer dict whose values may be numpy arrays."""
    import numpy

    arrays = {name: value for name, value in answer.items() if isinstance(value, numpy.ndarray)}
    plain = {name: value for name, value in answer.items() if name not in arrays}
    if not arrays:
        return plain, b""
    buffer = io.BytesIO()
    numpy.savez(buffer, **arrays)
    return plain, buffer.getvalue()


def read_exactly(stream, size):
    data = b""
    while len(data) < size:
        chunk = stream.read(size - len(data))
        if not chunk:
            return None
        data += chunk
    return data


def write_all(stream, data):
    view = memoryview(data)
    while view:
        view = view[stream.write(view) :]


def flush_output():
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, ValueError, OSError):
            continue


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
