"""A machine for the pickles inside other formats, which imports nothing, calls nothing and grows with the file only.

It knows the opcodes that Python's own pickler writes for containers, numbers and strings (protocols 2 to 5). A
global is looked up in a table that the caller gives; there is no other way from a pickle to code. Objects are
counted, nesting and integers are limited, and keys of mappings are scalars, so that neither size nor depth of what
comes out can exceed what the bytes pay for.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tracekit.errors import SourceError

_FREE_OBJECTS = 1 << 20
_BYTES_PER_OBJECT = 2
"""Python's pickler needs four bytes and more for a container that is not empty and its entry in the memo."""
_DEEPEST = 2000
"""More nested marks than Python's own (recursive) pickler can write."""
_LONGEST_INT = 16
_SCALARS = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, slots=True)
class Name:
    """What a global of a pickle stands for."""

    text: str
    call: Callable[..., Any] | None = None
    """Makes the value, from the arguments in the pickle; None for a name that is never called."""


class Buildable:
    """A value that a pickle completes with a state after it was made."""

    def build(self, state: Any) -> None:
        """Take the state; raise `ValueError` or `TypeError` where it is not of the kind expected."""
        raise NotImplementedError


def load(
    data: bytes,
    where: str,
    names: Mapping[tuple[str, str], Name],
    persistent: Callable[[Any], Any],
) -> Any:
    """Return what a pickle holds: lists, tuples, dicts, sets, scalars, and what ``names`` makes.

    Parameters
    ----------
    data
        The whole pickle.
    where
        For messages.
    names
        The globals that may occur, by module and name.
    persistent
        Makes a value of a persistent id.

    Raises
    ------
    SourceError
        If the pickle is damaged, holds anything else than data, or claims more than its bytes can hold.
    """
    machine = _Machine(data, where, names, persistent)
    try:
        return machine.run()
    except SourceError:
        raise
    except (IndexError, KeyError, struct.error) as error:
        raise SourceError(
            f"is damaged or truncated at byte {machine.pos} of its pickle ({type(error).__name__})",
            where=where,
            remedy="Copy it again from where it was made",
        ) from error
    except (TypeError, ValueError, AttributeError, OverflowError, UnicodeDecodeError) as error:
        raise SourceError(
            f"holds at byte {machine.pos} of its pickle what no pickler writes ({str(error)[:200]})", where=where
        ) from error


def scalar_set(values: Iterable[Any]) -> set[Any]:
    """Return a set of numbers and strings; anything else raises `TypeError`, because hashing it may go deep."""
    found = list(values)
    if not all(isinstance(value, _SCALARS) for value in found):
        raise TypeError("a set of containers")
    return set(found)


class _Machine:
    """The stack, the memo and the position in the bytes."""

    def __init__(
        self,
        data: bytes,
        where: str,
        names: Mapping[tuple[str, str], Name],
        persistent: Callable[[Any], Any],
    ) -> None:
        self.data, self.where, self.pos = data, where, 0
        self._names, self._persistent = names, persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._left = _FREE_OBJECTS + len(data) // _BYTES_PER_OBJECT

    def run(self) -> Any:
        """Work through the opcodes up to STOP."""
        data, stack, memo = self.data, self._stack, self._memo
        push, cold = stack.append, _COLD
        while True:
            pos = self.pos
            op = data[pos]
            # The first ones are nearly all of a list of token ids or of log probabilities.
            if op == 0x4B:  # BININT1
                push(data[pos + 1])
                self.pos = pos + 2
            elif op == 0x4D:  # BININT2
                push(data[pos + 1] | data[pos + 2] << 8)
                self.pos = pos + 3
            elif op == 0x4A:  # BININT
                push(_INT.unpack_from(data, pos + 1)[0])
                self.pos = pos + 5
            elif op == 0x47:  # BINFLOAT
                push(_FLOAT.unpack_from(data, pos + 1)[0])
                self.pos = pos + 9
            elif op == 0x68:  # BINGET
                push(memo[data[pos + 1]])
                self.pos = pos + 2
            elif op == 0x6A:  # LONG_BINGET
                push(memo[_UINT.unpack_from(data, pos + 1)[0]])
                self.pos = pos + 5
            elif op == 0x2E:  # STOP
                if len(stack) != 1 or self._marks:
                    raise ValueError("it ends with something left over")
                return stack[0]
            else:
                self.pos = pos + 1
                step = cold.get(op)
                if step is None:
                    raise SourceError(
                        f"uses the pickle opcode 0x{op:02x} at byte {pos}, which containers and tensors do not need",
                        where=self.where,
                        expected="a file that torch.save wrote",
                    )
                step(self)

    # Bytes

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if not 0 <= count <= len(self.data) - self.pos:
            raise IndexError
        self.pos += count
        return self.data[self.pos - count : self.pos]

    def number(self, size: int) -> int:
        """Return the next unsigned little-endian number."""
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        """Return the text up to the next line feed."""
        end = self.data.index(b"\n", self.pos)
        text = self.data[self.pos : end].decode("utf-8")
        self.pos = end + 1
        return text

    # Stack

    def push(self, value: Any) -> None:
        """Put a value that costs next to nothing on the stack."""
        self._stack.append(value)

    def push_object(self, value: Any) -> None:
        """Put a new object on the stack, if the bytes pay for it."""
        self._pay()
        self._stack.append(value)

    def _pay(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise SourceError(
                f"its pickle of {len(self.data)} bytes asks for more objects than such a file can hold",
                where=self.where,
                expected="a file that torch.save wrote",
            )

    def pop(self) -> Any:
        """Take the top of the stack, which a mark protects."""
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise IndexError
        return self._stack.pop()

    def top(self) -> Any:
        """Return the top of the stack."""
        return self._stack[-1]

    def mark(self) -> None:
        """Remember where a run of items begins."""
        if len(self._marks) >= _DEEPEST:
            raise SourceError(
                f"nests its values deeper than {_DEEPEST} levels", where=self.where, expected="plain containers"
            )
        self._pay()
        self._marks.append(len(self._stack))

    def items(self) -> list[Any]:
        """Take everything above the last mark."""
        begin = self._marks.pop()
        found = self._stack[begin:]
        del self._stack[begin:]
        return found

    def memoize(self, index: int | None = None) -> None:
        """Keep the top of the stack under a number."""
        index = len(self._memo) if index is None else index
        if index not in self._memo:
            self._pay()
        self._memo[index] = self.top()

    # Meaning

    def extend(self, values: list[Any]) -> None:
        """Append to the list on top."""
        target = self.top()
        if type(target) is not list:
            raise TypeError(f"items for a {type(target).__name__}")
        target.extend(values)

    def update(self, pairs: list[Any]) -> None:
        """Set items of the dict on top."""
        target = self.top()
        if type(target) is not dict or len(pairs) % 2:
            raise TypeError(f"{len(pairs)} keys and values for a {type(target).__name__}")
        for key in pairs[::2]:
            if not isinstance(key, _SCALARS):
                raise TypeError(f"a {type(key).__name__} as key")
        target.update(zip(pairs[::2], pairs[1::2], strict=True))

    def name(self, module: object, name: object) -> None:
        """Push what a global stands for, or refuse it; nothing is ever imported."""
        known = self._names.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if known is None:
            raise SourceError(
                f"its pickle refers to {str(module)[:100]!r}.{str(name)[:100]!r}; tracekit imports and calls nothing "
                "that a file names",
                where=self.where,
                expected="tensors, numpy arrays, numbers, strings and containers of them",
                remedy="Save the routing alone: torch.save({'routed_experts': ids}, path) or numpy.savez",
            )
        self.push(known)

    def reduce(self) -> None:
        """Make a value of a name and its arguments."""
        arguments, name = self.pop(), self.pop()
        if not isinstance(name, Name) or type(arguments) is not tuple:
            raise TypeError(f"a call of a {type(name).__name__}")
        if name.call is None:
            raise TypeError(f"a call of {name.text}")
        self.push_object(name.call(*arguments))

    def build(self) -> None:
        """Complete the value below the top with the state on top."""
        state, value = self.pop(), self.top()
        if isinstance(value, Buildable):
            value.build(state)
        elif type(value) is not dict:  # torch adds attributes to the OrderedDict of a state dict
            raise TypeError(f"a state for a {type(value).__name__}")

    def persistent(self) -> None:
        """Make a value of a persistent id."""
        self.push_object(self._persistent(self.pop()))

    def integer(self, size: int) -> None:
        """Push a long integer."""
        if size > _LONGEST_INT:
            raise ValueError(f"an integer of {size} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        """Make a tuple of the topmost values."""
        values = [self.pop() for _ in range(count)]
        self.push_object(tuple(reversed(values)))

    def add(self, values: list[Any]) -> None:
        """Add to the set on top."""
        target = self.top()
        if type(target) is not set:
            raise TypeError(f"set items for a {type(target).__name__}")
        target.update(scalar_set(values))


_INT, _UINT, _FLOAT = struct.Struct("<i"), struct.Struct("<I"), struct.Struct(">d")


def _text(size: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(size)).decode("utf-8", "surrogatepass"))


def _bytes(size: int) -> Callable[[_Machine], None]:
    return lambda m: m.push(m.take(m.number(size)))


def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    m.name(module, name)


def _frame(m: _Machine) -> None:
    m.take(8)


def _protocol(m: _Machine) -> None:
    version = m.number(1)
    if not 2 <= version <= 5:
        raise ValueError(f"protocol {version}")


_COLD: Final[dict[int, Callable[[_Machine], None]]] = {
    0x80: _protocol,
    0x95: _frame,
    0x28: _Machine.mark,
    0x4E: lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    0x8A: lambda m: m.integer(m.number(1)),
    0x8B: lambda m: m.integer(m.number(4)),
    0x58: _text(4),
    0x8C: _text(1),
    0x8D: _text(8),
    0x43: _bytes(1),
    0x42: _bytes(4),
    0x8E: _bytes(8),
    0x96: _bytes(8),
    0x5D: lambda m: m.push_object([]),
    0x7D: lambda m: m.push_object({}),
    0x29: lambda m: m.push(()),
    0x8F: lambda m: m.push_object(set()),
    0x74: lambda m: m.push_object(tuple(m.items())),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    0x61: lambda m: m.extend([m.pop()]),
    0x65: lambda m: m.extend(m.items()),
    0x73: lambda m: m.update([m.pop(), m.pop()][::-1]),
    0x75: lambda m: m.update(m.items()),
    0x90: lambda m: m.add(m.items()),
    0x91: lambda m: m.push_object(frozenset(scalar_set(m.items()))),
    0x71: lambda m: m.memoize(m.number(1)),
    0x72: lambda m: m.memoize(m.number(4)),
    0x94: _Machine.memoize,
    0x63: lambda m: m.name(m.line(), m.line()),
    0x93: _stack_global,
    0x52: _Machine.reduce,
    0x81: _Machine.reduce,
    0x62: _Machine.build,
    0x51: _Machine.persistent,
}
"""The less frequent opcodes: framing, scalars, text, containers, memo, names."""
