"""The restricted unpickler: it reads what the original project wrote, and nothing in a pickle ever runs.

Every attack would create a marker file; `test_the_attacks_are_real` shows that they do under `pickle`.
"""

import bdb
import collections
import copyreg
import cProfile
import functools
import importlib
import io
import marshal
import operator
import os
import pathlib
import pickle
import re
import runpy
import struct
import subprocess
import sys
import timeit
import trace

import numpy as np
import pytest
import torch
import torch.jit.unsupported_tensor_ops
import torch.utils.collect_env
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_fast.data.pickle_doors import DOORS
from blip3o_fast.data.safe_pickle import UnsafePickleError, safe_load, safe_loads


def dumps_with_core_of_numpy_1(value: object, protocol: int) -> bytes:
    """numpy before 2.0 wrote `numpy.core`; one byte shorter, so only length-free opcodes may hold it."""
    data = pickle.dumps(value, protocol)
    assert protocol == 2, "GLOBAL's names end with a newline; STACK_GLOBAL's carry a length"
    return data.replace(b"cnumpy._core.", b"cnumpy.core.")


# --- what must be readable -------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_original_projects_file(tmp_path: pathlib.Path, protocol: int) -> None:
    rng = np.random.default_rng(0)
    eva = rng.standard_normal((3, 64, 5), dtype=np.float32)
    saved = {
        "eva_blip3o_embeddings": torch.from_numpy(eva),
        "clip_blip3o_embeddings": eva[..., :3].copy(),
        "captions": ["a frog", "ein Füßchen 🐸", ""],
        "keys": np.array(["00", "01", "02"]),
        "total_samples": np.int64(3),
        "config": {"dims": (5, 3), "half": True, "none": None, "share": 0.5, "big": 1 << 80, "np": np.float32(1.5)},
    }
    path = tmp_path / "grid.pkl"
    path.write_bytes(pickle.dumps(saved, protocol))
    read = safe_load(path)
    assert list(read) == list(saved)
    assert torch.equal(read["eva_blip3o_embeddings"], saved["eva_blip3o_embeddings"])
    assert np.array_equal(read["clip_blip3o_embeddings"], eva[..., :3])
    assert read["captions"] == saved["captions"]
    assert read["keys"].tolist() == ["00", "01", "02"]
    assert read["total_samples"] == 3
    assert read["config"] == {**saved["config"], "np": 1.5}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "dtype", ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">f4", ">i2", "U3", ">U2"]
)
def test_numpy_dtypes_layouts_and_shapes(dtype: str, protocol: int) -> None:
    base = np.arange(24).astype(dtype)
    for array in (
        base.reshape(2, 3, 4),
        np.asfortranarray(base.reshape(4, 6)),
        base[::3],
        base[:0],
        base[5:6],
        base[0],
    ):
        read = safe_loads(pickle.dumps(array, protocol))
        assert np.array_equal(read, array)
        if array.ndim:
            assert read.dtype == array.dtype
        else:
            assert type(read) is type(array.item())  # numpy scalars become Python's


def test_numpy_1_names() -> None:
    value = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "s": np.float64(0.25)}
    data = dumps_with_core_of_numpy_1(value, 2)
    assert b"numpy.core.multiarray" in data and b"numpy._core" not in data
    read = safe_loads(data)
    assert np.array_equal(read["a"], value["a"]) and read["s"] == 0.25


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_tensors(dtype: torch.dtype, protocol: int) -> None:
    base = torch.arange(24).to(dtype)
    for tensor in (base.view(2, 3, 4), base.view(4, 6).T, base[5::7], base[:0], base[3]):
        read = safe_loads(pickle.dumps(tensor, protocol))
        assert read.dtype == dtype and torch.equal(read, tensor)
    if dtype.is_floating_point:
        parameter = safe_loads(pickle.dumps(torch.nn.Parameter(base), protocol))
        assert torch.equal(parameter, base) and not parameter.requires_grad


def test_sharing_is_kept_and_costs_nothing() -> None:
    value: list = [0]
    for _ in range(60):  # 2**60 items if each reference were visited
        value = [value, value]
    read = safe_loads(pickle.dumps(value))
    assert read[0] is read[1]


def test_errors_name_the_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(os.getcwd))
    with pytest.raises(UnsafePickleError, match=r"evil\.pkl: it asks for 'posix.getcwd'; allowed are numpy arrays"):
        safe_load(path)
    path.write_bytes(pickle.dumps([1, 2, 3])[:-2])
    with pytest.raises(ValueError, match=r"evil\.pkl: not a whole pickle"):
        safe_load(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a whole pickle"):
        safe_load(path)
    path.write_bytes(b"PK\x03\x04 this is a zip")
    with pytest.raises(ValueError, match=r"evil\.pkl"):
        safe_load(path)


# --- what must never run ---------------------------------------------------------------------------


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments, state=None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts

    def __call__(self) -> None: ...  # so that pickle takes what a call returns for a function to call


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def stack_global(module: str, name: str) -> bytes:
    return short(module) + short(name) + b"\x93"


def program(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def legacy_storage_with(payload: bytes) -> bytes:
    """torch's legacy format, its third pickle (the storage) replaced by a program."""
    whole = torch.ones(2)._typed_storage().__reduce__()[1][0]
    start = io.BytesIO(whole)
    for _ in range(3):
        pickle.load(start)
    return whole[: start.tell()] + payload


def attacks(marker: str) -> dict[str, bytes]:
    touch = f"open({marker!r}, 'w').close()"
    shell = f"touch {marker}"
    system = pickle.dumps(Call(os.system, shell), 2)
    evil_object = np.empty(1, dtype=object)
    evil_object[0] = Call(exec, touch)
    found: dict[str, bytes] = {}
    for protocol in range(6):
        found[f"os.system, protocol {protocol}"] = pickle.dumps(Call(os.system, shell), protocol)
        found[f"eval, protocol {protocol}"] = pickle.dumps({"captions": [Call(eval, touch)]}, protocol)
        found[f"object array, protocol {protocol}"] = pickle.dumps({"eva": evil_object}, protocol)
    load_from_bytes = torch.storage._load_from_bytes
    zipped = io.BytesIO()
    torch.save(Call(os.system, shell), zipped)
    old = io.BytesIO()
    torch.save(Call(os.system, shell), old, _use_new_zipfile_serialization=False)
    found["nested torch.save, zip"] = pickle.dumps(Call(load_from_bytes, zipped.getvalue()))
    found["nested torch.save, legacy"] = pickle.dumps(Call(load_from_bytes, old.getvalue()))
    magic = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)
    found["nested, after the magic number"] = pickle.dumps(Call(load_from_bytes, magic + system))
    found["nested, as the protocol version"] = pickle.dumps(
        Call(load_from_bytes, magic + pickle.dumps(1001, 2) + system)
    )
    found["nested, as the storage"] = pickle.dumps(Call(load_from_bytes, legacy_storage_with(system)))
    found["inside a tensor"] = pickle.dumps(
        Call(torch._utils._rebuild_tensor_v2, Call(load_from_bytes, old.getvalue()), 0, (2,), (1,), False, {})
    )
    found["in a tensor's hooks"] = pickle.dumps(
        Call(torch._utils._rebuild_tensor_v2, torch.ones(2)._typed_storage(), 0, (2,), (1,), False, Call(exec, touch))
    )
    found["pickle.loads"] = pickle.dumps(Call(pickle.loads, system))
    found["memo, then getattr"] = program(
        stack_global("builtins", "getattr"), b"\x940", short("marker"), b"0", b"h\x00",
        stack_global("os", "path"), short("os"), b"\x86R\x94",
        b"0h\x00h\x01", short("system"), b"\x86R", short(shell), b"\x85R",
    )  # fmt: skip
    found["INST"] = b"(S" + repr(shell).encode() + b"\nios\nsystem\n."
    found["OBJ"] = b"(cos\nsystem\nS" + repr(shell).encode() + b"\no."
    found["OrderedDict of a call"] = pickle.dumps(collections.OrderedDict(a=Call(exec, touch)))
    # numpy's array accepts any state: an object dtype there makes its data a list of live objects
    found["object dtype in an array's state"] = program(
        stack_global("numpy._core.multiarray", "_reconstruct"), stack_global("numpy", "ndarray"),
        b"K\x00\x85", b"C\x01b", b"\x87R",
        b"(K\x01K\x01\x85", stack_global("numpy", "dtype"), short("O8"), b"\x89\x88\x87R",
        b"(K\x03", short("|"), b"NNN", b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK?tb",
        b"\x89]", stack_global("builtins", "exec"), short(touch), b"\x85Ratb",
    )  # fmt: skip
    found |= gadgets(touch, shell, marker) | tricks_on_scanners(touch, shell)
    return found


def gadgets(touch: str, shell: str, marker: str) -> dict[str, bytes]:
    """Functions that run or write something and that lists of forbidden names forgot, one after the other."""
    code = marshal.dumps(compile(touch, "x", "exec"))
    calls = {
        "a code object": Call(runpy._run_code, Call(marshal.loads, code), {}),
        "timeit": Call(timeit.timeit, "0", touch, timeit.default_timer, 1),
        "cProfile": Call(cProfile.runctx, touch, {}, {}),
        "bdb": Call(operator.methodcaller("run", touch, {}, {}), Call(bdb.Bdb)),
        "trace": Call(operator.methodcaller("run", touch), Call(trace.Trace, 0, 0)),
        "numpy's runstring": Call(np.testing.runstring, touch, {}),
        "torch's execWrapper": Call(torch.jit.unsupported_tensor_ops.execWrapper, touch, {}, {}),
        "torch's collect_env": Call(torch.utils.collect_env.run, shell),
        "subprocess": Call(subprocess.check_output, ["touch", marker]),
        "open": Call(open, marker, "w"),
        "FileIO": Call(io.FileIO, marker, "w"),
        "lazy map": Call(list, Call(map, exec, [touch])),
        "sorted by exec": Call(operator.methodcaller("sort", key=exec), [touch]),
        "partial": Call(Call(functools.partial, exec, touch)),
        "attrgetter": Call(Call(operator.attrgetter("system"), Call(importlib.import_module, "os")), shell),
        "defaultdict": Call(operator.getitem, Call(collections.defaultdict, Call(functools.partial, exec, touch)), 0),
        "reduce": Call(functools.reduce, exec, [{}], touch),
        "torch rebuild with a class": Call(torch._tensor._rebuild_from_type_v2, exec, type, (touch,), {}),
    }
    return {f"gadget: {name}": pickle.dumps(call) for name, call in calls.items()}


def tricks_on_scanners(touch: str, shell: str) -> dict[str, bytes]:
    """Streams that scanners of opcodes read otherwise than the machine does: the reader here is the machine."""
    long = struct.pack("<Q", len(shell)) + shell.encode()
    names = {
        "names from the memo": short("system") + b"\x94" + short("posix") + b"\x940" + b"0h\x01h\x00\x93",
        "names swapped in the memo": short("posix") + b"q\x05" + short("system") + b"q\x0600h\x05h\x06\x93",
        "names as BINUNICODE8": b"\x8d" + struct.pack("<Q", 5) + b"posix\x8d" + struct.pack("<Q", 6) + b"system\x93",
        "names as UNICODE": b"Vposix\nVsystem\n\x93",
        "names as STRING": b"S'posix'\nS'system'\n\x93",
        "noise between the names": short("posix") + short("system") + b"N0K\x010\x93",
        "a dotted name": short("subprocess") + short("os.system") + b"\x93",
    }
    found = {
        f"trick: {name}": program(head, short(shell), b"\x85R") for name, head in names.items() if "alias" not in name
    }
    found["trick: called by the import system"] = program(
        b"cimportlib._bootstrap\n_call_with_frames_removed\n(cposix\nsystem\n\x8d", long, b"tR"
    )
    system = stack_global("posix", "system") + short(shell) + b"\x85R"
    found["trick: broken after the call"] = b"\x80\x04" + system + b"\xff\xff\xff"
    found["trick: no end"] = b"\x80\x04" + system
    found["trick: a second pickle's start in the first"] = b"\x80\x04" + system + b"\x80\x02" + b"0N."
    found["trick: a protocol that does not exist yet"] = b"\x80\x00" + system + b"."
    found["trick: thrown away"] = program(system, b"0N")
    found["trick: in a dict's key"] = program(b"}", system, b"K\x01s")
    found["trick: behind a mark"] = program(b"(", system, b"1N")
    return found


@pytest.mark.parametrize("name", sorted(attacks("x")))
def test_attacks_are_refused_and_leave_no_marker(tmp_path: pathlib.Path, name: str) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(UnsafePickleError) as caught:
        safe_loads(attacks(str(marker))[name])
    assert not marker.exists()
    # a global, an opcode, numpy's dtype of objects, or a zip, in which the names lie a level deeper
    told = re.search(
        r"asks for '([\w.]+)'|opcode [A-Z_0-9]+|numpy dtype 'O8'|storage that is not in torch's", str(caught.value)
    )
    assert told, f"does not say what is forbidden: {caught.value}"
    assert tuple((told[1] or "").rsplit(".", 1)) not in DOORS


def test_the_attacks_are_many() -> None:
    assert len(attacks("x")) >= 20 + 3 * 5  # the first three are there in six protocols


@pytest.mark.parametrize("name", sorted(attacks("x")))
def test_the_attacks_are_real(tmp_path: pathlib.Path, name: str) -> None:
    marker = tmp_path / "marker"
    try:
        pickle.loads(attacks(str(marker))[name])
    except Exception as error:  # some attacks fail after they have run
        assert marker.exists() or "weights_only" in str(error), (name, error)
    if not marker.exists():  # torch's own storage loader is itself unrestricted or restricted, by version
        assert "nested" in name or "inside a tensor" in name


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "getattr"),
        ("builtins", "__import__"), ("subprocess", "Popen"), ("importlib", "import_module"),
        ("operator", "attrgetter"), ("functools", "partial"), ("pickle", "loads"), ("torch", "load"),
        ("torch", "Tensor"), ("torch.serialization", "load"), ("numpy", "load"), ("numpy", "dtype.__reduce__"),
        ("numpy", "ndarray.tofile"), ("numpy", "memmap"), ("numpy", "matrix"), ("torch.storage", "UntypedStorage"),
        ("torch._utils", "_rebuild_wrapper_subclass"), ("torch._tensor", "_rebuild_from_type_v2"),
        ("collections", "defaultdict"), ("copyreg", "_reconstructor"), ("builtins", "bytearray"),
        ("types", "FunctionType"), ("blip3o_fast.data.safe_pickle", "safe_loads"),
        ("blip3o_fast.data.pickle_doors", "Door"), ("numpy", ""), ("", ""),
    ],
)  # fmt: skip
def test_globals_are_refused_by_name_before_anything_else(module: str, name: str) -> None:
    wanted = f"it asks for '{module}.{name}'"
    for data in (program(stack_global(module, name)), b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"."):
        with pytest.raises(UnsafePickleError) as caught:
            safe_loads(data)
        assert wanted in str(caught.value)


def test_no_module_is_imported_for_a_pickle() -> None:
    assert "antigravity" not in sys.modules and "this" not in sys.modules
    for module in ("this", "antigravity"):
        with pytest.raises(UnsafePickleError, match=f"'{module}.d'"):
            safe_loads(program(stack_global(module, "d")))
        assert module not in sys.modules


def refused(data: bytes, match: str) -> None:
    with pytest.raises(UnsafePickleError, match=match):
        safe_loads(data)


DTYPE = stack_global("numpy", "dtype")
F4 = DTYPE + short("f4") + b"\x89\x88\x87R"
ARRAY = (
    stack_global("numpy._core.multiarray", "_reconstruct") + stack_global("numpy", "ndarray") + b"K\x00\x85C\x01b\x87R"
)
FROMBUFFER = stack_global("numpy._core.numeric", "_frombuffer")


def test_opcodes_that_make_or_fetch_objects_are_refused() -> None:
    refused(program(DTYPE, b")\x81"), "opcode NEWOBJ")
    refused(program(DTYPE, b")}\x92"), "opcode NEWOBJ_EX")
    refused(b"(inumpy\ndtype\n.", "opcode INST")
    refused(program(b"(", DTYPE, b"o"), "opcode OBJ")
    refused(program(b"\x97"), "opcode NEXT_BUFFER")
    refused(program(b"K\x01Q"), "opcode BINPERSID")
    refused(program(b"Pname\n"), "opcode PERSID")
    refused(program(b"\x8f"), "opcode EMPTY_SET")
    refused(program(b"\xf0"), "opcode 0xf0")
    copyreg.add_extension("os", "system", 77)
    try:
        refused(program(b"\x82" + bytes([77])), "opcode EXT1")
    finally:
        copyreg.remove_extension("os", "system", 77)


def test_only_doors_are_called_and_only_with_what_fits() -> None:
    refused(program(short("abc"), b")R"), "it calls a str")
    refused(program(b"})R"), "it calls a dict")
    refused(program(stack_global("numpy", "ndarray"), b")R"), "it calls a 'numpy.ndarray'")
    refused(program(ARRAY, b")R"), "it calls a ArrayStub")
    refused(program(DTYPE, b")R"), "'numpy.dtype' with arguments that do not fit")
    refused(program(DTYPE, b"]R"), "it calls a 'numpy.dtype'")
    encode = stack_global("_codecs", "encode")
    for encoding in ("rot13", "utf-7", "idna", "unicode_escape"):
        refused(program(encode, short("a"), short(encoding), b"\x86R"), "latin1")
    refused(program(stack_global("builtins", "bytes"), b"J\xff\xff\xff\x7f\x85R"), "bytes")
    refused(program(stack_global("collections", "OrderedDict"), b"]\x85R"), "OrderedDict")
    assert safe_loads(program(encode, short("abc"), short("latin1"), b"\x86R0N")) is None


def test_nothing_but_a_stand_in_gets_a_state() -> None:
    poison = b"}" + short("run") + DTYPE + b"s"
    refused(program(DTYPE, poison, b"b"), "sets the state of a 'numpy.dtype'")
    refused(program(DTYPE, b"N", poison, b"\x86b"), "sets the state of a 'numpy.dtype'")
    refused(program(b"]", poison, b"b"), "sets the state of a list")
    tensor = pickle.dumps(torch.ones(2), 4)[:-1]
    refused(tensor + poison + b"b.", "sets the state of a TensorStub")
    # APPEND and SETITEM call methods of what is on the stack; a stand-in has none
    for opcode in (b"K\x01a", b"(K\x01e", b"K\x00K\x01s", b"(K\x00K\x01u"):
        with pytest.raises(ValueError, match="not a whole pickle"):
            safe_loads(program(ARRAY, opcode))
        with pytest.raises(ValueError, match="not a whole pickle"):
            safe_loads(tensor + opcode + b".")


def test_array_states() -> None:
    state = b"(K\x03" + short("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    good = program(ARRAY, b"(K\x01K\x02\x85", F4, state, b"\x89C\x08" + bytes(8), b"tb")
    assert np.array_equal(safe_loads(good), np.zeros(2, np.float32))
    for code in ("O", "O8", "object", "V4", "c8", "M8", "m8", "f16", "i4,O", "|O8", "float32", "", "U0", "U99999999"):
        refused(program(DTYPE, short(code), b"\x89\x88\x87R"), "numpy dtype")
    fields = b"(K\x03" + short("|") + b"N(" + short("a") + b"t}K\x08K\x01K\x00tb"
    refused(program(DTYPE, short("f4"), b"\x89\x88\x87R", fields), "fields or a subarray")
    refused(program(F4, b"(K\x03", short("O"), b"NNNtb"), "numpy dtype with the state")
    refused(program(F4, b"Nb"), "numpy dtype with the state")
    refused(program(ARRAY, b"(K\x01K\x02\x85", F4, b"\x89]tb"), "made of a list instead of bytes")
    refused(program(ARRAY, b"(K\x01K\x02\x85", short("O8"), b"\x89C\x08" + bytes(8), b"tb"), "of dtype str")
    refused(program(ARRAY, b"(K\x01K\x02\x85", DTYPE, b"\x89C\x08" + bytes(8), b"tb"), "of dtype 'numpy.dtype'")
    refused(program(ARRAY, b"(K\x01K\x03\x85", F4, b"\x89C\x08" + bytes(8), b"tb"), "over 8 bytes")
    refused(program(ARRAY, b"(K\x01J\xff\xff\xff\xff\x85", F4, b"\x89C\x08" + bytes(8), b"tb"), "over 8 bytes")
    refused(program(ARRAY, b"Nb"), "unknown kind of state")
    refused(program(ARRAY), "it holds a ArrayStub")
    refused(program(FROMBUFFER, b"(C\x04" + bytes(4), F4, b"K\x01\x85", short("Z"), b"tR"), "in the order 'Z'")
    refused(program(FROMBUFFER, b"(K\x04", F4, b"K\x01\x85", short("C"), b"tR"), "made of a int")
    reconstruct = stack_global("numpy._core.multiarray", "_reconstruct")
    refused(program(reconstruct, b"]K\x00\x85C\x01b\x87R"), "array of the class list")
    refused(program(reconstruct, DTYPE, b"K\x00\x85C\x01b\x87R"), "array of the class 'numpy.dtype'")


def test_tensors_stay_inside_their_storage() -> None:
    storage = torch.arange(6.0)._typed_storage()

    def tensor(offset, size, stride) -> bytes:
        return pickle.dumps(Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {}))

    assert torch.equal(safe_loads(tensor(1, (2, 2), (3, 1))), torch.tensor([[1.0, 2.0], [4.0, 5.0]]))
    refused(tensor(0, (7,), (1,)), "over 6 elements")
    refused(tensor(5, (2,), (1,)), "reaches element 6 of 6")
    refused(tensor(0, (2,), (6,)), "reaches element 6 of 6")
    refused(tensor(-1, (2,), (1,)), "over 6 elements")
    refused(tensor(3, (2,), (-1,)), "over 6 elements")
    refused(tensor(0, (1 << 40,), (0,)), "over 6 elements")
    refused(tensor(0, (2,), (1, 1)), "over 6 elements")
    refused(tensor(0.0, (2,), (1,)), "over 6 elements")
    refused(pickle.dumps(Call(torch._utils._rebuild_tensor_v2, b"abc", 0, (2,), (1,), False, {})), "over a bytes")
    refused(pickle.dumps(Call(torch._utils._rebuild_parameter, [1], False, {})), "parameter over a list")
    refused(pickle.dumps(storage), "it holds a TensorStub")
    held = io.BytesIO()
    torch.save({"a": torch.ones(2)}, held, _use_new_zipfile_serialization=False)
    refused(pickle.dumps(Call(torch.storage._load_from_bytes, held.getvalue())), "torch storage that holds a dict")
    refused(pickle.dumps(Call(torch.storage._load_from_bytes, b"junk")), "not in torch's own format")


def test_other_values_are_refused_by_name() -> None:
    refused(pickle.dumps({"a": b"bytes"}), "it holds a bytes")
    refused(pickle.dumps({(1, 2): 3}), "dict key of the type tuple")
    refused(pickle.dumps({"a": {1, 2}}, 2), "set")
    refused(pickle.dumps(1j), "'builtins.complex'")
    refused(pickle.dumps(np.ones(2, np.complex64)), "numpy dtype 'c8'")
    refused(pickle.dumps(np.datetime64("2020-01-01")), "numpy dtype 'M8'")
    refused(pickle.dumps(np.zeros(1, [("a", "f4")])), "numpy dtype 'V4'")
    refused(pickle.dumps(pathlib.PurePosixPath("a")), "pathlib")
    refused(program(DTYPE), "it holds a 'numpy.dtype'")
    cyclic: list = []
    cyclic.append(cyclic)
    refused(pickle.dumps(cyclic), "list contains itself")
    refused(program(b"]" * 500, b"a" * 499), "nests deeper than 100")


@pytest.mark.parametrize("opcode", [b"\x8e", b"\x8d", b"\x96", b"\x95"])
def test_announced_lengths_do_not_allocate(opcode: bytes) -> None:
    for length in (1 << 20, 1 << 40, (1 << 64) - 1):
        with pytest.raises(ValueError, match="announced|maxsize|maximum"):
            safe_loads(b"\x80\x05" + opcode + struct.pack("<Q", length) + b"abc.")
    with pytest.raises(ValueError, match="not a whole pickle"):
        safe_loads(b"\x80\x04Nr\xff\xff\xff\x7f0j\xff\xff\xff\x7e.")  # a memo index must not size a table


def test_memory_under_an_array_is_not_resized() -> None:
    memory = b"\x96" + (8).to_bytes(8, "little") + bytes(8) + b"\x94"  # a bytearray, remembered as number 0
    array = b"".join((FROMBUFFER, b"(h\x00", F4, b"K\x02\x85", short("C"), b"tR"))
    assert safe_loads(program(memory, array)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="BufferError"):
        safe_loads(program(memory, array, b"h\x00K\x05a"))  # appends to it


def test_environment_cannot_lift_the_restriction(tmp_path: pathlib.Path) -> None:
    marker = tmp_path / "marker"
    path = tmp_path / "evil.pkl"
    path.write_bytes(attacks(str(marker))["nested, as the storage"])
    code = f"from blip3o_fast.data.safe_pickle import safe_load; safe_load({str(path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0 and "UnsafePickleError" in done.stderr
    assert not marker.exists()


AUDIT = """
import pickle, sys, torch
sys.path.insert(0, sys.argv[1])
import importlib.util
spec = importlib.util.spec_from_file_location("tests_of_safe_pickle", sys.argv[2])
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
programs = [*tests.attacks(sys.argv[3]).values(), *tests.SOUND]
seen, watching = [], False

def hook(event, arguments):
    if watching and event != "builtins.id":
        seen.append((event, repr(arguments)[:100]))

def read_all():
    for data in programs:
        try:
            tests.safe_loads(data)
        except ValueError:
            pass

read_all()  # numpy and torch import parts of themselves on first use
sys.addaudithook(hook)
watching = True
read_all()
watching = False
print(len(programs), seen)
"""


def test_the_interpreter_sees_no_import_no_file_no_process(tmp_path: pathlib.Path) -> None:
    arguments = [sys.executable, "-c", AUDIT, str(tmp_path), __file__, str(tmp_path / "marker")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    count, _, seen = done.stdout.strip().partition(" ")
    assert int(count) > 25 and seen == "[]"
    assert not (tmp_path / "marker").exists()


SOUND = [
    pickle.dumps({"a": np.arange(4.0), "t": torch.arange(3.0), "k": ["x", 1, 2.5, None]}, protocol)
    for protocol in (2, 3, 4, 5)
]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, on a bent storage
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SOUND), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_bent_pickles_give_data_or_a_value_error(data: bytes, changes: list[tuple[int, int]]) -> None:
    bent = bytearray(data)
    for position, byte in changes:
        bent[position % len(bent)] = byte
    try:
        safe_loads(bytes(bent))
    except ValueError:
        pass


def mutated(data: bytes, other: bytes, random: np.random.Generator) -> bytes:
    """One to four changes: a byte, a bit, a cut, a stretch twice, a stretch of another pickle, one more opcode."""
    bent = bytearray(data)
    for _ in range(random.integers(1, 5)):
        at = int(random.integers(0, len(bent) + 1))
        length = int(random.integers(1, 40))
        match int(random.integers(0, 7)):
            case 0:
                bent[at : at + 1] = random.bytes(1)
            case 1:
                bent[at : at + 1] = bytes(byte ^ (1 << int(random.integers(0, 8))) for byte in bent[at : at + 1])
            case 2:
                del bent[at : at + length]
            case 3:
                bent[at:at] = bent[at : at + length]
            case 4:
                start = int(random.integers(0, len(other)))
                bent[at:at] = other[start : start + length]
            case 5:
                bent[at:at] = OPCODES[int(random.integers(0, len(OPCODES)))]
            case _:
                del bent[at:]
    return bytes(bent)


OPCODES = [value for name in pickle.__all__ if isinstance(value := getattr(pickle, name), bytes)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch, on bent storages
def test_fuzz(tmp_path: pathlib.Path) -> None:
    """100,000 mutations of sound and of hostile pickles: data or a ValueError, and nothing runs."""
    marker = tmp_path / "marker"
    hostile = list(attacks(str(marker)).values())
    random, counts = np.random.default_rng(0), collections.Counter[str]()
    for _ in range(100_000):
        pool = SOUND if random.random() < 0.5 else hostile
        data = pool[int(random.integers(0, len(pool)))]
        try:
            safe_loads(mutated(data, hostile[int(random.integers(0, len(hostile)))], random))
            counts["read as data"] += 1
        except UnsafePickleError:
            counts["refused"] += 1
        except ValueError:
            counts["not a whole pickle"] += 1
    print(f"{counts.total()} mutations: {dict(counts)}; ran: {int(marker.exists())}")
    assert counts.total() == 100_000 and not marker.exists() and min(counts.values()) > 500
