"""Files are whole or absent, whatever fails; what others wrote is read without trust."""

import errno
import os
import signal
from unittest.mock import Mock

import pytest
from conftest import in_child, server
from typing_extensions import TypedDict

import files
from files import WriteError, atomic_write, lock, read_json, read_text


class Settings(TypedDict):
    a: int
    b: list[dict[str, int]]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_write_replaces_the_file_and_keeps_the_old_one_where_asked(tmp_path):
    path = tmp_path / "new" / "file.pt"
    for content in (b"one", b"two\r\n"):
        with atomic_write(path, keep=path.with_name("previous.pt")) as file:
            file.write(content)
    assert path.read_bytes() == b"two\r\n" and names(path.parent) == ["file.pt", "previous.pt"]
    assert path.with_name("previous.pt").read_bytes() == b"one"
    files.write_file(path, "é\n\udcff")
    assert path.read_bytes() == "é\n\\udcff".encode()


def test_a_write_is_synced_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    calls, path, aside = [], tmp_path / "file", tmp_path / ".file.tmp"
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append(paths))
    with atomic_write(path) as file:
        file.write(b"x")
    assert calls == [str(aside), (aside, path), str(tmp_path)]


@pytest.mark.parametrize("what", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there_and_names_path_and_free_space(
    tmp_path, monkeypatch, what
):
    path = tmp_path / "file"
    path.write_text("old")
    full = Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr(os, what, full)
    with pytest.raises(WriteError, match=r"write .*file: No space.* MB are free") as error:
        with atomic_write(path) as file:
            os.write(file.fileno(), b"new")
    assert error.value.exit_code == 4 and full.called
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_a_killed_write_leaves_the_old_file_and_the_next_one_tidies_up(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(signum):
        with atomic_write(path) as file:
            file.write(b"new")
            file.flush()
            os.kill(os.getpid(), signum)

    assert in_child(write, signal.SIGKILL) == -signal.SIGKILL
    assert path.read_text() == "old" and names(tmp_path) == [".file.tmp", "file"]
    write(0)  # no signal
    assert path.read_text() == "new" and names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "content, why",
    [
        (b'{"a": 1}', "b: is missing"),
        (b'{"a": "1", "b": []}', "a: must be a valid integer"),
        (b'{"a": 1, "b": [{"x": 1.5}]}', r"b\.0\.x: must be a valid integer"),
        (b"[]", "must be an object"),
        (b"[" * 100_000, "Invalid JSON: recursion limit"),
        (b'{"a": ' + b"9" * 5000, "Invalid JSON: number out of range"),
        (b'{"a": "\\ud800"}', "Invalid JSON"),
        (b"\xff\xfe{\x00}\x00", r"not UTF-8 \(byte 0\)"),
    ],
    ids=lambda content: str(content)[:12],
)
def test_hostile_json_is_one_line_with_file_and_field(tmp_path, content, why):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.json: {why}") as error:
        read_json(path, Settings)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 300


def test_only_regular_files_of_a_sensible_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(files.MOST_JSON + 1)
    for name, why in (("fifo", "not a reg"), ("link", "not a reg"), ("large", "67,108,865 bytes")):
        with pytest.raises(ValueError, match=f"{name}: {why}"):
            read_json(tmp_path / name)


def test_a_byte_order_mark_is_left_out(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b'\xef\xbb\xbf{"a":\r\n1}')
    assert read_text(path) == '{"a":\r\n1}' and read_json(path) == {"a": 1}


def test_a_second_process_is_told_who_holds_the_lock(tmp_path):
    def second():
        with pytest.raises(ValueError, match=rf"is in use by process {os.getppid()} \("):
            lock(tmp_path).__enter__()

    def killed():
        with lock(tmp_path):
            (tmp_path / ".other.tmp").mkdir()
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(killed) == -signal.SIGKILL  # blocks nobody, and leaves nothing
    with lock(tmp_path):
        assert in_child(second) == 0 and ".other.tmp" not in names(tmp_path)
    assert names(tmp_path) in ([], [".lock"])


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is not a folder"):
        files.own_folder(tmp_path / "file")
    with pytest.raises(WriteError, match=r"could not write .*file/folder: Not a directory"):
        files.own_folder(tmp_path / "file" / "folder")


def test_a_download_that_breaks_off_is_tried_three_times(tmp_path, only_this_machine):
    with server("a", b"", status=None) as (address, asked):
        with pytest.raises(ValueError, match="Remote end closed"):
            files.download(address, "", tmp_path / "a")
    assert len(asked) == 3 and not any(tmp_path.iterdir())
