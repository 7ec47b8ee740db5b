"""The small stack machine that a pickle is a program for: it knows only the instructions that weights are made of."""

import codecs
import pickletools
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from resbackbone.weights.admitted import (
    ADMITTED,
    Array,
    Global,
    Namespace,
    NumpyDtype,
    Refused,
    Storage,
    StorageType,
    add,
    array_of,
    kind_of,
    lengths,
    put,
    shown,
)

EXPANSION = 8  # what a file describes may be this many times its size: tied weights, several names for one state
SLACK = 1_000_000  # and this much more, so that small files may be wordy: bytes, containers or instructions

INSTRUCTIONS = {op.code.encode("latin1"): op for op in pickletools.opcodes}  # the library decodes their arguments


class Source:
    """A file that refuses to be asked for more than it has left, before anything is allocated for it."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.left = file, size, size

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.left:
            raise Refused(f"cut off or damaged: it should go on for {count} bytes, and {self.left} are left")
        self.left -= count
        return self.file.read(count)

    def readline(self) -> bytes:
        line = self.file.readline()
        self.left -= len(line)
        return line


class Machine:
    """Runs one pickle of `source`. `storage` describes the tensor data that a key outside of the pickle refers to."""

    def __init__(self, source: Source, storage: Callable[..., Storage] | None = None):
        self.source, self.storage = source, storage
        self.stack: list = []
        self.marked: list[list] = []  # the stacks below each mark
        self.memo: dict[int, object] = {}
        self.unpacked = 0

    def run(self) -> object:
        source: Any = self.source  # read and readline are all that pickletools asks of a file
        argument: Any
        for _ in range(SLACK + self.source.size // 16):
            code = self.source.read(1)
            op = INSTRUCTIONS.get(code)
            if op is None:
                raise Refused(f"a damaged file, or not a weight file: byte {code!r} is no instruction of a pickle")
            if op.name == "STOP":
                return self.stack.pop()
            if op.name == "STRING":  # Python 2's bytes, where pickletools would have ASCII
                line = pickletools.read_stringnl(source, decode=False)
                argument = codecs.escape_decode(line)[0].decode("latin1")
            else:
                argument = op.arg.reader(source) if op.arg else None
            self._step(op.name, argument)
        raise Refused("it has more instructions than weights of its size need")

    def _step(self, name: str, argument) -> None:
        stack = self.stack
        match name:
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE":
                stack.append(argument)
            case "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                if argument >= 2**32:  # larger ints can all have one hash, and a dict of them takes forever
                    raise Refused(f"a memo index of {argument.bit_length()} bits")
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "MARK":
                self.marked.append(stack)
                self.stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(name[-1]))]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                items = self._pop_marked()
                self.stack.append(tuple(items))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                items = self._pop_marked()
                self.stack.append(items)
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if name == "APPEND" else self._pop_marked()
                self._top(list).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "DICT" | "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._pop_marked()
                if name == "DICT":
                    self.stack.append({})
                target = self._top(dict)
                for key, value in zip(items[::2], items[1::2], strict=True):
                    put(target, key, value)
            case "EMPTY_SET":
                stack.append(set())
            case "ADDITEMS":
                items = self._pop_marked()
                add(self._top(set), items)
            case "GLOBAL":
                stack.append(_look_up(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_look_up(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments, called = stack.pop(), stack.pop()
                stack.append(self._call(called, arguments))
            case "BUILD":
                state = stack.pop()
                self._set_state(stack[-1], state)
            case "BINPERSID":
                stack.append(self._find_storage(stack.pop()))
            case "PROTO" | "FRAME":  # what is known from the instructions themselves
                pass
            case _:  # extension codes, INST, OBJ and others that only hostile files have; or data outside of the file
                raise Refused(f"a pickle instruction, {name}, that no weight file needs")

    def _pop_marked(self) -> list:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def _top(self, kind: type):
        if type(self.stack[-1]) is not kind:
            raise Refused(f"it fills {kind_of(self.stack[-1])} as if it were a {kind.__name__}")
        return self.stack[-1]

    def _call(self, called: Any, arguments: Any) -> object:
        if type(called) is not Global or called.make is None:
            raise Refused(f"it would call {kind_of(called)}, which no weight file needs")
        if type(arguments) is not tuple:
            raise Refused(f"it calls {called.name} with {kind_of(arguments)}")
        made = called.make(*arguments)
        self._count(made)
        return made

    def _set_state(self, target: Any, state: Any) -> None:
        if type(target) is NumpyDtype and type(state) is tuple and len(state) >= 5 and state[1] in ("<", ">", "|", "="):
            if any(part is not None for part in state[2:5]):
                raise Refused("an array of records, and weights are plain arrays")
            target.swapped = state[1] in ("<", ">") and (state[1] == "<") != (sys.byteorder == "little")
        elif type(target) is Array and type(state) is tuple and len(state) == 5:
            _, shape, dtype, fortran, data = state
            vars(target).update(vars(array_of(data, dtype, shape, fortran)))
            self._count(target)
        elif type(target) is Namespace and type(state) is dict:
            self._count(state)
            for key, value in state.items():
                put(target.fields, key, value)
        elif type(target) is not dict:  # an OrderedDict's attributes, as state dicts have them, are left out
            raise Refused(f"it would set attributes of {kind_of(target)}, which no weight file needs")

    def _find_storage(self, key: Any) -> Storage:
        if self.storage is None or type(key) is not tuple or len(key) not in (5, 6) or key[0] != "storage":
            raise Refused("it refers to data outside of it that is no tensor's")
        _, kind, name, _device_there, count, *view = key
        if type(kind) is not StorageType:
            raise Refused(f"tensor data of type {kind_of(kind)}")
        return self.storage(name, kind.dtype, *lengths([count], "storage size"), *view)

    def _count(self, made: Any) -> None:
        """Calls are short and can copy much: all they make is held against the size of the file."""
        if type(made) in (Array, bytes, bytearray):
            self.unpacked += len((made.data or b"") if type(made) is Array else made)
        elif type(made) in (dict, set):
            self.unpacked += 64 * len(made)
        if self.unpacked > EXPANSION * self.source.size + SLACK:
            raise Refused("it unpacks to many times its size, which no weight file needs")


def _look_up(module: Any, name: Any) -> object:
    if type(module) is not str or type(name) is not str:
        raise Refused("it refers to a name that is no string")
    if (module, name) not in ADMITTED:
        what = shown(f"{module}.{name}")
        raise Refused(f"it would run {what}: only tensors and plain containers are read; save the state_dict() alone")
    return ADMITTED[module, name]
