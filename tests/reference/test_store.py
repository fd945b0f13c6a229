"""The store: what is put in comes out, bit for bit; everything else is refused by name; nothing is half written."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from tokenpo.errors import InputError
from tokenpo.reference.store import Store, decode, encode

KEY = {"model": "aa", "tokenizer": "bb"}
RECORDS = {
    "logps": {"logps": torch.tensor([-1.5, -0.25, -3.0])},
    "wide": {"logps": torch.tensor([-1.5, -0.1], dtype=torch.float64)},
    "hidden": {"logps": torch.tensor([-1.0, -2.0]), "hidden": torch.tensor([[0.5, -3.0], [7.0, 0.1]]).bfloat16()},
    "topk": {
        "logps": torch.tensor([-1.0]),
        "top_ids": torch.tensor([[70_000, 2]], dtype=torch.int32),
        "top_logps": torch.tensor([[-0.5, -1.0]]),
        "rest": torch.tensor([[-3.0, 1.25, -11.0]]),
    },
}


def key(i=0):
    return bytes([i]) * 16


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_comes_back_bit_for_bit(name, tmp_path):
    Store(tmp_path, KEY, name, write=True).put({key(): RECORDS[name]})
    (found,) = Store(tmp_path, KEY, name).get([key()], ["row"])
    assert found.keys() == RECORDS[name].keys()
    for field, value in RECORDS[name].items():
        assert found[field].dtype == value.dtype and torch.equal(found[field], value), field


def test_every_changed_byte_is_seen():
    data = encode(RECORDS["hidden"], key(), b"storeid8")
    assert decode(data, key(), b"storeid8")[1] == ""
    for place in range(len(data)):
        wrong = bytearray(data)
        wrong[place] ^= 1
        assert decode(wrong, key(), b"storeid8")[0] is None, place


def test_every_cut_and_lengthened_record_is_seen():
    data = encode(RECORDS["topk"], key(), b"storeid8")
    for size in range(len(data)):
        assert decode(data[:size], key(), b"storeid8")[0] is None, size
    assert decode(data + b"\0", key(), b"storeid8")[0] is None


def test_records_of_another_row_or_store_are_seen():
    data = encode(RECORDS["logps"], key(), b"storeid8")
    assert decode(data, key(1), b"storeid8") == (None, "a corrupt record (its checksum is wrong)")
    assert decode(data, key(), b"storeid9") == (None, "a record of another store")


def test_a_missing_or_corrupt_row_is_named(tmp_path):
    store = Store(tmp_path, KEY, "logps", write=True)
    store.put({key(): RECORDS["logps"]})
    with pytest.raises(InputError, match="has no record for train row 7, chosen: run tokenpo cache build"):
        store.get([key(), key(1)], ["train row 3, chosen", "train row 7, chosen"])
    with store.env.begin(write=True) as transaction:
        transaction.put(key(), transaction.get(key())[:-1] + b"!")
    with pytest.raises(InputError, match=r"a corrupt record .its checksum is wrong. for train row 3, chosen"):
        store.get([key()], ["train row 3, chosen"])


@pytest.mark.parametrize(
    ("wanted", "keep", "sentence"),
    [
        ({**KEY, "tokenizer": "cc"}, "logps", r"the tokenizer is another \('tokenizer' was bb, is now cc\)"),
        ({**KEY, "torch": "9"}, "logps", r"torch has another version \('torch' was none, is now 9\)"),
        (KEY, "hidden", r"keeps logps and hidden is needed \('keep' differs\): give another cache.folder"),
    ],
)
def test_another_fingerprint_is_refused_by_field(wanted, keep, sentence, tmp_path):
    Store(tmp_path, KEY, "logps", write=True)
    for write in (False, True):
        with pytest.raises(InputError, match=sentence):
            Store(tmp_path, wanted, keep, write=write)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"there is no reference cache in .*nothing"):
        Store(tmp_path / "nothing")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("a")
    with pytest.raises(InputError, match="is not empty and holds no reference cache"):
        Store(tmp_path / "letters", KEY, "logps", write=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write the reference cache in .*Not a directory"):
        Store(tmp_path / "file" / "below", KEY, "logps", write=True)
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "data.mdb").write_bytes(b"no LMDB" * 4096)
    with pytest.raises(InputError, match="cannot read the reference cache"):
        Store(tmp_path / "wrong")


def test_a_store_that_another_process_makes_just_now_is_opened(tmp_path, monkeypatch):
    """Between the look for its file and the look into its folder."""
    other = (
        "import sys; from tokenpo.reference.store import Store; Store(sys.argv[1], {'model': 'a'}, 'logps', write=True)"
    )
    make = lambda: subprocess.run([sys.executable, "-c", other, str(tmp_path / "cache")], check=True)
    looked = []

    def not_yet(path):
        if path.name == "data.mdb" and not looked:
            looked.append(path)
            make()
            return False
        return path.exists()

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.is_file", not_yet)
        assert Store(tmp_path / "cache", {"model": "a"}, "logps", write=True).keep == "logps" and looked


TOGETHER = """
import sys, time
from tokenpo.reference.store import Store
print(flush=True)
start = float(sys.stdin.readline())
for k in range(200):
    while time.time() < start + k / 100:
        pass
    Store(f"{sys.argv[1]}/{k}", {"model": "a"}, "logps", write=True)
"""


def test_processes_that_make_stores_in_step_disturb_none(tmp_path):
    """Readers may see the state before a commit whose pages are there already: found in one of 25 such openings."""
    command = [sys.executable, "-c", TOGETHER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in both:
        process.stdout.readline()  # it has imported everything
    start = str(time.time() + 0.2)
    for process in both:
        process.stdin.write(start + "\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors


def test_a_file_cut_short_is_refused_before_it_is_read(tmp_path):
    store = Store(tmp_path / "a", KEY, "logps", write=True)
    store.put({key(i): {"logps": torch.zeros(5000)} for i in range(8)})
    data = (tmp_path / "a" / "data.mdb").read_bytes()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "data.mdb").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"data.mdb is cut short: it has \d+ of \d+ bytes"):
        Store(tmp_path / "b")


def run(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
    )  # fmt: skip


def test_two_processes_read_while_one_writes(tmp_path):
    """A reader sees whole records only, more and more of them, and never waits for the writer."""
    store = Store(tmp_path, KEY, "logps", write=True)
    reader = """
        import sys, time, torch
        from tokenpo.reference.store import Store
        store, seen, last = Store(sys.argv[1]), [], time.time() + 30
        while len(store) < 200 and time.time() < last:
            keys = store.keys()
            for key, record in zip(keys, store.get(keys, ["row"] * len(keys))):
                assert torch.equal(record["logps"], torch.full((300,), float(key[0]))), key
            seen.append(len(keys))
        print(len(store), len(set(seen)))
    """
    readers = [run(reader, tmp_path) for _ in range(2)]
    for i in range(200):
        store.put({key(i): {"logps": torch.full((300,), float(i))}})
        time.sleep(0.03)
    for process in readers:
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
        found, steps = map(int, out.split())
        assert found == 200 and steps > 2


def test_a_full_disk_loses_nothing(tmp_path):
    """The limit on the size of a file fails the write as a full disk does; what was committed before stays."""
    writer = """
        import resource, sys, torch
        from tokenpo.reference.store import Store
        store = Store(sys.argv[1], {"model": "aa"}, "logps", write=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        for i in range(200):
            store.put({bytes([i]) * 16: {"logps": torch.full((5000,), float(i))}})
            print(i, flush=True)
    """
    process = run(writer, tmp_path)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "could not write to the reference cache" in error and "disk full" in error
    written = [int(line) for line in out.split()]
    assert 10 < len(written) < 100
    store = Store(tmp_path, {"model": "aa"}, "logps", write=True)
    for i, record in enumerate(store.get([key(i) for i in written], ["row"] * len(written))):
        assert torch.equal(record["logps"], torch.full((5000,), float(i)))
    store.put({key(250): {"logps": torch.zeros(5000)}})
    assert len(store) == len(written) + 1
