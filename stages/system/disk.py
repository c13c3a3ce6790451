"""Files and the disk: free space, checksums, and the system's errors as refusals of one line with a way out."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.system.refusal import Refused, in_one_line

FREE_SPACE_HINT = "free some space or choose another folder"
OTHER_FOLDER_HINT = "choose a folder that may be written to"
HINTS = {
    errno.ENOSPC: FREE_SPACE_HINT,
    errno.EDQUOT: FREE_SPACE_HINT,
    errno.EFBIG: FREE_SPACE_HINT,
    errno.EROFS: OTHER_FOLDER_HINT,
    errno.EACCES: OTHER_FOLDER_HINT,
    errno.EPERM: OTHER_FOLDER_HINT,
    errno.EISDIR: "a folder has that name: move it, or choose another name",
    errno.ENOTDIR: "a file stands where a folder should be: move it, or choose another folder",
    errno.EEXIST: "something else stands where a folder should be: move it, or choose another folder",
    errno.ELOOP: "links lead in a circle there: choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "a folder on the way is missing, or a link leads nowhere: make it, or choose another folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system has too many files open",
    errno.EIO: "check the disk, or choose another",
}
"""errno -> what to do."""
RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries written in Rust, such as safetensors, end the message of an error that the system raised."""


def free_bytes(folder: Path) -> int:
    """Free space on the disk where `folder` is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def file_sha256(path: Path) -> str:
    """sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def system_error(error: BaseException) -> OSError | None:
    """The system's error that an exception is, reports, or was raised for; None where there is none.

    A broken connection is not an error about a file: None.
    """
    if isinstance(error, ConnectionError | TimeoutError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error
    if type(error).__module__.startswith("safetensors") and (match := RUST_OS_ERROR.search(str(error))):
        return OSError(int(match[1]), os.strerror(int(match[1])))
    # torch.save raises an error of its own while it handles the disk's.
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        return system_error(error.__context__)
    return None


def hint_for(error: OSError) -> str:
    """What to do about a system error."""
    return HINTS.get(error.errno or 0, "look at it, or choose another")


def path_of_error(error: OSError) -> str | None:
    """The file that a system error names, if any; of a rename, the target."""
    name = error.filename2 if error.filename2 is not None else error.filename
    return None if name is None or isinstance(name, int) else os.fsdecode(name)


def unwritable_error(path: Path, error: OSError) -> Refused:
    """The refusal for a file or folder that cannot be written, with the reason and the part of its path at fault."""
    reason = error.strerror or in_one_line(error)
    at_fault = path_of_error(error)
    if at_fault and Path(at_fault) != path and ".partial" not in at_fault:
        reason = f"{at_fault}: {reason}"
    return Refused(f"{path}: cannot be written ({reason}) - {hint_for(error)}")


@contextmanager
def refuse_write_errors(path: Path) -> Iterator[None]:
    """System errors in this block become `Refused`: a failure to write `path`."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if cause := system_error(error):
            raise unwritable_error(path, cause) from error
        raise


def refuse_unwritable(path: Path) -> None:
    """Raise `Refused` where it is clear, without writing anything, that no file can be written at `path`.

    For commands that compute for long before they write.
    """
    with refuse_write_errors(path):
        if path.is_dir() and not path.is_symlink():
            raise _os_error(errno.EISDIR, path)
        if path.exists() and not (path.is_file() or path.is_symlink()):
            raise Refused(f"{path}: cannot be written (it is a device or a pipe) - choose the name of a file")
        folder = path.parent
        while not os.path.lexists(folder):
            folder = folder.parent
        folder.stat()  # a link that leads nowhere, or in a circle
        if not folder.is_dir():
            raise _os_error(errno.ENOTDIR, folder)
        if os.statvfs(folder).f_flag & os.ST_RDONLY:
            raise _os_error(errno.EROFS, folder)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise _os_error(errno.EACCES, folder)
        if len(os.fsencode(path.name)) > os.pathconf(folder, "PC_NAME_MAX"):
            raise _os_error(errno.ENAMETOOLONG, path)


def _os_error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
