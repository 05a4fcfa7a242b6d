"""A pickle machine that can only build dictionaries of tensor descriptions.

It executes the opcodes that `torch.save` writes for a dictionary of tensors, on strings, numbers,
tuples and `View`s. No global of a file is ever imported or called, so a file cannot run code.
"""

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple

from moddistill.errors import UserError

# Storage classes of PyTorch, and the names of their dtypes in safetensors.
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "Float8_e4m3fnStorage": "F8_E4M3",
    "Float8_e5m2Storage": "F8_E5M2",
}
_MOST_AXES = 8
_LARGEST = 2**40  # elements of an axis, a stride or a start


class UnsupportedError(UserError):
    """A well-formed file with content that is not supported."""


class Storage(NamedTuple):
    """The bytes that tensors are views of: a dtype, and the name of an entry of the archive."""

    kind: str
    key: str


class View(NamedTuple):
    """A tensor: its first element in the storage, its shape and strides in elements."""

    storage: Storage
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Name(NamedTuple):
    """A global that a pickle names, by module and name."""

    module: str
    name: str


_MARK = object()
_TENSOR = _Name("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Name("torch._utils", "_rebuild_parameter")
_ORDERED = _Name("collections", "OrderedDict")
_KNOWN = {_TENSOR, _PARAMETER, _ORDERED, *(_Name("torch", name) for name in STORAGES)}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "MARK": lambda: _MARK,
}
_VALUES = ("BINUNICODE", "SHORT_BINSTRING", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(data: bytes, origin: str) -> Any:
    """Returns the value that a pickle describes.

    Raises:
      UnsupportedError: for an opcode, a global or an argument that no dictionary of tensors has.
    """
    machine = _PickleMachine(origin)
    try:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name == "STOP":
                return machine.pop()
            machine.step(operation.name, argument)
    except (IndexError, KeyError, ValueError) as error:
        # An empty stack, an unknown memo entry, or bytes that `genops` cannot parse.
        if isinstance(error, UnsupportedError):
            raise
        raise _unsupported(origin, f"a broken pickle ({error!r:.200})") from None
    raise _unsupported(origin, "a pickle without an end")


def _unsupported(origin: str, value: str) -> UnsupportedError:
    expected = "what torch.save writes for a flat dictionary of tensors"
    return UnsupportedError(f"{origin}: expected {expected}, got {value}")


class _PickleMachine:
    """The stack and the memo of a pickle, as in the standard library's `pickle`."""

    def __init__(self, origin: str):
        self.origin = origin
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Executes one opcode."""
        # The opcodes of protocol 2 that torch writes. All others are errors, among them those that
        # import or instantiate in other ways: STACK_GLOBAL, INST, OBJ and NEWOBJ.
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _VALUES:
            self.stack.append(argument)
        elif name in _TUPLES:
            self.stack.append(tuple([self.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name == "TUPLE":
            self.stack.append(tuple(self.pop_mark()))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "GLOBAL":
            self.stack.append(self.check_global(_Name(*argument.split(" ", 1))))
        elif name == "BINPERSID":  # torch stores the bytes of a tensor outside of the pickle
            self.stack.append(self.storage(self.pop()))
        elif name == "REDUCE":
            arguments, function = self.pop(), self.pop()
            self.stack.append(self.call(function, arguments))
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop_mark() if name == "SETITEMS" else [self.pop(), self.pop()][::-1]
            self.set_items(self.stack[-1], items)
        elif name in ("APPEND", "APPENDS"):
            items = self.pop_mark() if name == "APPENDS" else [self.pop()]
            self.extend(self.stack[-1], items)
        elif name == "BUILD":
            self.pop()  # attributes of an OrderedDict, such as `_metadata` of a module
            # Without items, this only checks that the target is a dictionary.
            self.set_items(self.stack[-1], [])
        elif name != "PROTO":
            raise _unsupported(self.origin, f"a pickle with opcode {name}")

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        """Returns the items above the last mark, and removes both."""
        items = []
        while (item := self.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def check_global(self, name: _Name) -> _Name:
        """Returns a global by its name only, if a dictionary of tensors needs it."""
        if name not in _KNOWN:
            called = f"{name.module:.80}.{name.name:.80}"
            raise _unsupported(self.origin, f"a pickle that would run {called}")
        return name

    def storage(self, reference: Any) -> Storage:
        """Returns the storage of a persistent id `("storage", class, key, device, size)`."""
        if isinstance(reference, tuple) and len(reference) >= 3:
            _, kind, key, *_ = reference
            if isinstance(kind, _Name) and kind.name in STORAGES and isinstance(key, str):
                return Storage(kind.name, key)
        raise _unsupported(self.origin, "a storage of unknown type")

    def call(self, function: Any, arguments: Any) -> Any:
        """Returns the result of one of the three functions that `torch.save` refers to."""
        # Functions are only names: none is called, and their results are constructed here.
        if function == _ORDERED and arguments == ():
            return {}
        if isinstance(arguments, tuple):
            if function == _PARAMETER and arguments and isinstance(arguments[0], View):
                return arguments[0]
            if function == _TENSOR and len(arguments) >= 4:
                return self.view(*arguments[:4])
        raise _unsupported(self.origin, "a pickle that calls another function")

    def view(self, storage: Any, start: Any, shape: Any, stride: Any) -> View:
        """Checks the arguments of `_rebuild_tensor_v2`."""
        for numbers in ((start,), shape, stride):
            if (
                not isinstance(numbers, tuple)
                or len(numbers) > _MOST_AXES
                # `type`, since bool is a subclass of int.
                or any(type(x) is not int or not 0 <= x <= _LARGEST for x in numbers)
            ):
                raise _unsupported(self.origin, f"start, shape or stride {numbers!r:.80}")
        if not isinstance(storage, Storage) or len(shape) != len(stride):
            raise _unsupported(self.origin, "a tensor without a storage")
        return View(storage, start, shape, stride)

    def extend(self, target: Any, items: list[Any]) -> None:
        if not isinstance(target, list):
            raise _unsupported(self.origin, "nested or other values")
        target += items

    def set_items(self, target: Any, items: list[Any]) -> None:
        names, values = items[::2], items[1::2]
        is_valid = isinstance(target, dict) and len(names) == len(values)
        if not is_valid or not all(isinstance(name, str) for name in names):
            raise _unsupported(self.origin, "nested or other values")
        target |= dict(zip(names, values, strict=True))
