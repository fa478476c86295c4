"""The hot loops: one pass over the routed experts of a layer.

The idea. For every routed expert of a token, the kernel keeps a *history word*: bit by bit, whether the same expert
was also chosen 1, 2, … F tokens earlier. One table lookup a routed expert yields that word, and everything else is
arithmetic on whole words, several tokens at a time:

* lag overlaps: summing the k words of a token bit by bit gives the number of shared experts at every lag at once;
* windows: an expert is counted once in a window, at its first occurrence there. Whether it occurred within the
  previous j tokens is the OR of the first j history bits, so every window length comes from the same words
  (the working-set identity of Denning and Schwartz, CACM 15(3), 1972).

The sums over the k words are kept bit-sliced (plane p holds bit p of the sum) so that they never leave the word
layout. The cost is therefore nearly independent of the number of lags, of window lengths, and of N.

Inside a word of F bits the bit ``F - d`` stands for lag d; F is 16 or 32. Lags beyond F are covered by further
blocks of F lags each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, types  # type: ignore[attr-defined] # its stubs leave some out
from numba.extending import intrinsic

_U0 = np.uint64(0)
_U1 = np.uint64(1)
_EVEN = np.uint64(0x5555555555555555)
_PAIR = np.uint64(0x3333333333333333)
_NIBBLE = np.uint64(0x0F0F0F0F0F0F0F0F)
_BYTE = np.uint64(0x0101010101010101)
_ROW = 264
"""Words between two rows of scratch: one number for all, so that the compiler knows that rows do not overlap; rows
are whole cache lines, and the same place in two of them does not fall into the same set of the cache."""


def _as_pointer(typing_context: Any, address: Any) -> Any:
    """Return an address, a uint64, as a pointer; what lies there must outlive its use."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.uint64), codegen


_pointer: Any = intrinsic(_as_pointer)


@njit(cache=True, nogil=True)
def _gather(columns: Any, start: int, n: int, ids: Any) -> None:
    """Copy one run out of the rank columns, see :func:`scan`, into the first n columns of ``ids[k, tokens]``."""
    for r in range(columns.shape[0]):
        column = carray(_pointer(columns[r] + np.uint64(start * ids.itemsize)), (n,), ids.dtype)
        for t in range(np.uint64(n)):
            ids[r, t] = column[t]


def word_bits(max_lag: int, max_window: int) -> int:
    """Return F, the lags that one history word covers: 16 where that is enough, else 32."""
    return 16 if max(max_lag, max_window - 1) <= 16 else 32


_R1, _R2, _R3 = np.uint64(_ROW), np.uint64(2 * _ROW), np.uint64(3 * _ROW)


@njit(cache=True, nogil=True)
def _chunk(bits: int) -> int:
    """Return the tokens of a chunk: whole epochs (see _history), at most 255 packed words (see _add_bit_counts)."""
    epoch, per_word = 64 - bits, 64 // bits
    return 255 * per_word // epoch * epoch


@njit(cache=True, nogil=True)
def _popcount(x: Any) -> Any:
    """Return the number of set bits of a uint64, in the form that LLVM turns into its instruction for it."""
    x -= (x >> _U1) & _EVEN
    x = (x & _PAIR) + ((x >> np.uint64(2)) & _PAIR)
    x = (x + (x >> np.uint64(4))) & _NIBBLE
    return np.int64((x * _BYTE) >> np.uint64(56))


@njit(cache=True, nogil=True)
def _history(ids: Any, begin: int, end: int, delay: int, bits: int, words: Any, table: Any, counts: Any) -> None:
    """Write the history word of every routed expert of tokens ``begin .. end - 1``.

    Parameters
    ----------
    ids
        Routed experts of the run, ``[k, tokens]``.
    delay
        Lags ``delay + 1 .. delay + bits`` are recorded.
    words
        Output, a row of ``_ROW`` uint64 per rank seen as uint16 or uint32, as ``bits`` says.
    table
        For each block of ``bits`` lags the uses per expert ``[N]`` uint64, in epochs of ``64 - bits`` tokens: the low
        ``bits`` bits are the tokens before the epoch, the others the epoch itself. ``begin`` must be a multiple of the
        epoch.
    counts
        ``[N]`` int64: the first block of lags adds the uses of each expert in the epochs that are over.
    """
    epoch = np.uint64(64 - bits)
    past = np.uint64(bits)
    row = np.uint64(_ROW) * (np.uint64(64) // past)
    k = np.uint64(ids.shape[0])
    n_experts = np.uint64(counts.shape[0])
    base = np.uint64(delay) // past * n_experts
    lag = np.uint64(delay)
    t = np.uint64(begin)
    stop = np.uint64(end)
    while t < stop:
        if t == _U0:
            pass  # the table is empty
        elif lag == _U0:
            for e in range(n_experts):
                uses = table[base + e]
                counts[e] += _popcount(uses >> past)
                table[base + e] = uses >> epoch
        else:
            for e in range(n_experts):
                table[base + e] >>= epoch
        # First the uses of the whole epoch, then the words, rank by rank: a token's uses and words in turn would take
        # longer. Uses after a token lie beyond the bits of its word.
        steps = min(epoch, stop - t)
        if lag == _U0:
            for step in range(steps):
                mark = _U1 << (past + step)
                for r in range(k):
                    table[base + np.uint64(ids[r, t + step])] |= mark
        else:
            for step in range(steps):
                mark = _U1 << (past + step)
                if t + step >= lag:
                    for r in range(k):
                        table[base + np.uint64(ids[r, t + step - lag])] |= mark
        column = t - np.uint64(begin)
        for r in range(k):
            at = r * row + column
            for step in range(steps):
                words[at + step] = table[base + np.uint64(ids[r, t + step])] >> step
        t += epoch


@njit(cache=True, nogil=True)
def _sum_planes(words: Any, k: int, n_words: int, n_planes: int, planes: Any, carry: Any) -> None:
    """Add the k words of each token bit by bit; row p of ``planes`` receives bit p of the sums.

    There are at least four rows of planes, and a multiple of four rows of words: those beyond k are 0.
    """
    n = np.uint64(n_words)
    for p in range(max(4, n_planes)):
        row = np.uint64(p) * _R1
        for i in range(n):
            planes[row + i] = _U0
    for r in range(0, k, 4):
        row = np.uint64(r) * _R1
        for i in range(n):  # four rows and the sum so far: full adders, then the carry moves up
            at = row + i
            a, b, c, d = words[at], words[at + _R1], words[at + _R2], words[at + _R3]
            p0, p1, p2, p3 = planes[i], planes[i + _R1], planes[i + _R2], planes[i + _R3]
            ab = a ^ b
            abc, two = ab ^ c, (a & b) | (ab & c)
            abcd, too = abc ^ d, (abc & d) | ((abc ^ d) & p0)
            twos = two ^ too
            four = (two & too) | (twos & p1)
            eight = p2 & four
            planes[i] = abcd ^ p0
            planes[i + _R1] = twos ^ p1
            planes[i + _R2] = p2 ^ four
            planes[i + _R3] = p3 ^ eight
            carry[i] = p3 & eight
        for p in range(4, n_planes):
            row = np.uint64(p) * _R1
            for i in range(n):
                plane = planes[row + i]
                planes[row + i] = plane ^ carry[i]
                carry[i] &= plane


@njit(cache=True, nogil=True)
def _add_bit_counts(words: Any, first: int, n_words: int, bits: int, weight: int, counts: Any) -> None:
    """Add, for each of the ``bits`` bit positions, how many of the packed fields have it set.

    ``counts[d - 1]`` grows by ``weight`` times the number of fields with bit ``bits - d`` set. There are at most 255
    words, so that the byte-wide partial sums cannot overflow.
    """
    s1, s2, s4 = _U1, np.uint64(2), np.uint64(4)
    a0, a1, a2, a3, a4, a5, a6, a7 = _U0, _U0, _U0, _U0, _U0, _U0, _U0, _U0
    third = np.uint64(n_words // 3)
    start = np.uint64(first)
    for i in range(start, start + third):
        x, y, z = words[i], words[i + third], words[i + third + third]
        even = (x & _EVEN) + (y & _EVEN) + (z & _EVEN)
        odd = ((x >> s1) & _EVEN) + ((y >> s1) & _EVEN) + ((z >> s1) & _EVEN)
        e0, e2, o1, o3 = even & _PAIR, (even >> s2) & _PAIR, odd & _PAIR, (odd >> s2) & _PAIR
        a0 += e0 & _NIBBLE
        a4 += (e0 >> s4) & _NIBBLE
        a1 += o1 & _NIBBLE
        a5 += (o1 >> s4) & _NIBBLE
        a2 += e2 & _NIBBLE
        a6 += (e2 >> s4) & _NIBBLE
        a3 += o3 & _NIBBLE
        a7 += (o3 >> s4) & _NIBBLE
    for i in range(start + third + third + third, start + np.uint64(n_words)):
        x = words[i]
        a0 += x & _BYTE
        a1 += (x >> s1) & _BYTE
        a2 += (x >> s2) & _BYTE
        a3 += (x >> np.uint64(3)) & _BYTE
        a4 += (x >> s4) & _BYTE
        a5 += (x >> np.uint64(5)) & _BYTE
        a6 += (x >> np.uint64(6)) & _BYTE
        a7 += (x >> np.uint64(7)) & _BYTE
    # Byte b of a0 counts bit b * 8, of a1 bit b * 8 + 1, …; the fields of a word are added up by a multiplication.
    ones = _U0
    for field in range(0, 64, bits):
        ones |= _U1 << np.uint64(field)
    lane, top = ones * np.uint64(255), np.uint64(64 - bits)
    for byte in range(bits // 8):
        shift, at = np.uint64(8 * byte), np.uint64(bits - 8 * byte)
        for a in (a0, a1, a2, a3, a4, a5, a6, a7):
            at -= _U1
            counts[at] += weight * np.int64((((a >> shift) & lane) * ones) >> top)


@njit(cache=True, nogil=True)
def _field_mask(bits: int, field: int) -> Any:
    """Return a uint64 that holds ``field`` in each of its fields of ``bits`` bits."""
    mask = _U0
    for at in range(0, 64, bits):
        mask |= np.uint64(field) << np.uint64(at)
    return mask


@njit(cache=True, nogil=True)
def _smear(words: Any, k: int, n_words: int, bits: int, lags: int) -> None:
    """Turn history words into "used within the last d tokens" words for d up to ``lags``, in place."""
    s1, s2, s4 = _U1, np.uint64(2), np.uint64(4)
    m1 = _field_mask(bits, (1 << (bits - 1)) - 1)
    m2 = _field_mask(bits, (1 << (bits - 2)) - 1)
    m4 = _field_mask(bits, (1 << (bits - 4)) - 1)
    n = np.uint64(n_words)
    for r in range(k):
        row = np.uint64(r) * _R1
        for i in range(row, row + n):
            x = words[i]
            x |= (x >> s1) & m1
            x |= (x >> s2) & m2
            words[i] = x | ((x >> s4) & m4)
    shift = 8
    while shift < min(bits, lags):
        s, mask = np.uint64(shift), _field_mask(bits, (1 << (bits - shift)) - 1)
        for r in range(k):
            row = np.uint64(r) * _R1
            for i in range(row, row + n):
                words[i] |= (words[i] >> s) & mask
        shift *= 2


@njit(cache=True, nogil=True)
def _field_sum(planes: Any, n_planes: int, field: int, bit: int, bits: int) -> Any:
    """Return the sum over ranks of one bit of one token, read from the planes."""
    at = field * bits
    word, shift = np.uint64(at >> 6), np.uint64((at & 63) + bit)
    total, p = _U0, _U0
    while p < np.uint64(n_planes):
        total |= ((planes[word] >> shift) & _U1) << p
        word += _R1
        p += _U1
    return np.int64(total)


@njit(cache=True, nogil=True)
def _flip(value: int, bit: int) -> Any:
    """Return what a plane is XORed with, so that it is set where its bit is that of ``value``."""
    return _U0 if (value >> bit) & 1 else ~_U0


@njit(cache=True, nogil=True)
def _add_overlaps(
    planes: Any, n_planes: int, n_words: int, bits: int, delay: int, carry: Any, lags: Any, overlap_counts: Any
) -> None:
    """Add the pairs of one chunk and block of lags that share exactly v experts, for each v.

    ``planes`` hold the sums of the history words. ``overlap_counts[d - 1, v - 1]`` grows for lags
    d = ``delay + 1 .. delay + bits``.
    """
    max_lag, k = overlap_counts.shape
    n = np.uint64(n_words)
    for v in range(1, k + 1):
        f0, f1, f2, f3 = _flip(v, 0), _flip(v, 1), _flip(v, 2), _flip(v, 3)
        found = _U0
        for i in range(n):
            x = (planes[i] ^ f0) & (planes[i + _R1] ^ f1) & (planes[i + _R2] ^ f2) & (planes[i + _R3] ^ f3)
            carry[i] = x
            found |= x
        for p in range(4, n_planes):
            row, flip, found = np.uint64(p) * _R1, _flip(v, p), _U0
            for i in range(n):
                carry[i] &= planes[row + i] ^ flip
                found |= carry[i]
        if found != _U0:
            lags[:] = 0
            _add_bit_counts(carry, 0, n_words, bits, 1, lags)
            for d in range(min(bits, max_lag - delay)):
                overlap_counts[delay + d, v - 1] += lags[d]


@njit(cache=True, nogil=True)
def _add_recent_uses(
    planes: Any,
    n_planes: int,
    n_words: int,
    bits: int,
    delay: int,
    begin: int,
    end: int,
    n: int,
    lags: Any,
    used: Any,
    head: Any,
    tail: Any,
) -> None:
    """Add, for sliding windows, the experts of a chunk's tokens that were used within the previous j tokens.

    ``used[j]`` grows by all of them, ``tail[j, m]`` is set to those of the run's m-th token from the end, for
    j = ``delay`` + 1 .. ``delay + bits``; ``head[t]`` to all earlier uses of the run's token t. ``planes`` hold the
    sums of the smeared words.
    """
    max_window = head.shape[0]
    lags[:] = 0
    for p in range(n_planes):
        _add_bit_counts(planes, p * _ROW, n_words, bits, 1 << p, lags)
    for t in range(max(begin, delay + 1), min(end, max_window - 1, delay + bits + 1)):
        head[t] = _field_sum(planes, n_planes, t - begin, bits + delay - t, bits)
    for j in range(delay + 1, min(delay + bits, max_window - 1) + 1):
        used[j] += lags[j - delay - 1]
        for m in range(max(0, n - end), min(n - begin, max_window - 1 - j)):
            tail[j, m] = _field_sum(planes, n_planes, n - 1 - m - begin, bits + delay - j, bits)


@njit(cache=True, nogil=True)
def _subtract_repeats(
    planes: Any, n_planes: int, bits: int, delay: int, begin: int, end: int, n: int, union_sum: Any
) -> None:
    """Subtract, for windows that do not overlap, the experts used earlier in their window.

    The token at t is number t mod T of its window, so these are its experts used within the previous t mod T tokens.
    """
    for window in range(2, union_sum.shape[0] + 1):
        covered = (n // window) * window
        for t in range(begin, min(end, covered)):
            j = t % window
            if delay < j <= delay + bits:
                union_sum[window - 1] -= _field_sum(planes, n_planes, t - begin, bits + delay - j, bits)


@njit(cache=True, nogil=True)
def _carry_uses(words: Any, k: int, n: int, seen: Any) -> None:
    """Fill the words of experts that an earlier block of lags has seen already, and note those that this one sees."""
    for r in range(k):
        for t in range(n):
            at = r * 2 * _ROW + t  # these are uint32 words
            if seen[r, t]:
                words[at] = 0xFFFFFFFF
            else:
                seen[r, t] = words[at] != 0


@njit(cache=True, nogil=True)
def _rank0_history(ids: Any, begin: int, end: int, delay: int, bits: int, lags: int, words: Any) -> None:
    """Write history words as :func:`_history` does, of the rank-0 experts among themselves, for ``lags`` lags."""
    first = np.uint64(begin)
    for i in range(np.uint64(end - begin)):
        words[i] = 0
    for d in range(1, lags + 1):
        mark, lag = 1 << (bits - d), np.uint64(delay + d)
        for i in range(np.uint64(max(0, delay + d - begin)), np.uint64(max(0, end - begin))):
            words[i] |= mark if ids[0, first + i] == ids[0, first + i - lag] else 0


@njit(cache=True, nogil=True)
def _finish_windows(k: int, n: int, overlapping: bool, used: Any, head: Any, tail: Any, union_sum: Any) -> None:
    """Turn the uses that were counted into unions: what every token brings, less what its window has already.

    A window's token number j does not count the experts that were used within the previous j tokens. Over all sliding
    windows, it runs through the run's tokens from j on, without the last T - 1 - j.
    """
    max_window = min(union_sum.shape[0], n)
    for window in range(1, max_window + 1):
        union_sum[window - 1] += k * window * (n - window + 1 if overlapping else n // window)
    if not overlapping:
        return
    before = 0  # uses before token j's reach: tokens 1 .. j - 1 have no more than j - 1 tokens before them
    for j in range(1, max_window):
        repeats = used[j] - before
        before += head[j]
        for window in range(j + 1, max_window + 1):
            union_sum[window - 1] -= repeats
            repeats -= tail[j, window - 1 - j]


class Scratch(NamedTuple):
    """What the kernel works in: for a chunk of tokens its history words, and what becomes of them."""

    words: Any
    """uint64: a row of ``_ROW`` per rank, and rows of zeros up to a multiple of four."""
    words16: Any
    """The same memory, seen as uint16: a row per rank, a word per token."""
    words32: Any
    """The same, seen as uint32."""
    planes: Any
    """uint64: the sums of the words over the ranks, a row of ``_ROW`` per bit; sums are below 2 ** 16."""
    carry: Any
    """uint64 ``[_ROW]``."""
    table: Any
    """uint64 ``[blocks of lags * N]``: the uses of each expert in the last tokens, see :func:`_history`."""
    seen: Any
    """bool ``[k, chunk]``: experts that an earlier block of lags has seen."""
    lags: Any
    """int64 ``[bits]``."""


class Sums(NamedTuple):
    """What the runs of one unit add up to, all int64."""

    unions: Any
    """``[T]``: unique experts, summed over windows."""
    overlaps: Any
    """``[D, k]``: pairs at lag d that share exactly v + 1 experts."""
    rank0: Any
    """``[D]``: pairs at lag d whose rank-0 expert is the same; or empty."""
    counts: Any
    """``[N]``: uses of each expert."""
    used: Any
    """``[T]``: of one run, the experts of its tokens that were used within the previous j tokens."""
    head: Any
    """``[T]``: of one run's first tokens, the experts that were used before in it."""
    tail: Any
    """``[T, T]``: of one run's last tokens, the experts that were used within the previous j tokens."""


@njit(cache=True, nogil=True)
def _scan_chunk(
    ids: Any, n: int, begin: int, end: int, delay: int, bits: int, overlapping: bool, s: Any, sums: Any
) -> None:
    """Add the tokens ``begin .. end - 1`` of one run, at the lags ``delay + 1 .. delay + bits``."""
    k, n_planes = ids.shape[0], 1
    while (1 << n_planes) <= k:
        n_planes += 1
    max_window, max_lag = sums.unions.shape[0], sums.overlaps.shape[0]
    n_words = ((end - begin) * bits + 63) // 64
    for r in range(k):
        s.words[r * _ROW + n_words - 1] = _U0  # what lies after the last token
    if bits == 16:
        _history(ids, begin, end, delay, bits, s.words16, s.table, sums.counts)
    else:
        _history(ids, begin, end, delay, bits, s.words32, s.table, sums.counts)
    if max_lag > delay:
        _sum_planes(s.words, k, n_words, n_planes, s.planes, s.carry)
        _add_overlaps(s.planes, n_planes, n_words, bits, delay, s.carry, s.lags, sums.overlaps)
    if max_window - 1 > delay:
        if max_window - 1 > bits:
            _carry_uses(s.words32, k, end - begin, s.seen)
        _smear(s.words, k, n_words, bits, max_window - 1 - delay)
        _sum_planes(s.words, k, n_words, n_planes, s.planes, s.carry)
        if overlapping:
            _add_recent_uses(
                s.planes, n_planes, n_words, bits, delay, begin, end, n, s.lags, sums.used, sums.head, sums.tail
            )
        else:
            _subtract_repeats(s.planes, n_planes, bits, delay, begin, end, n, sums.unions)
    if sums.rank0.shape[0] > delay:
        n_lags = min(bits, max_lag - delay)
        s.words[n_words - 1] = _U0
        if bits == 16:
            _rank0_history(ids, begin, end, delay, bits, n_lags, s.words16)
        else:
            _rank0_history(ids, begin, end, delay, bits, n_lags, s.words32)
        s.lags[:] = 0
        _add_bit_counts(s.words, 0, n_words, bits, 1, s.lags)
        for d in range(n_lags):
            sums.rank0[delay + d] += s.lags[d]


@njit(cache=True, nogil=True)
def _scan_run(ids: Any, n: int, bits: int, overlapping: bool, s: Any, sums: Any) -> None:
    """Add one run, the first n columns of ``ids[k, tokens]``."""
    k, reach = ids.shape[0], max(sums.overlaps.shape[0], sums.unions.shape[0] - 1)
    s.table[:] = _U0
    sums.used[:] = 0
    chunk = _chunk(bits)
    for begin in range(0, n, chunk):
        s.seen[:] = False
        for delay in range(0, reach, bits):
            _scan_chunk(ids, n, begin, min(n, begin + chunk), delay, bits, overlapping, s, sums)
    if reach:  # the uses of the last epoch are still in the table
        for e in range(sums.counts.shape[0]):
            sums.counts[e] += _popcount(s.table[e] >> np.uint64(bits))
    else:
        for r in range(k):
            for t in range(n):
                sums.counts[ids[r, t]] += 1
    _finish_windows(k, n, overlapping, sums.used, sums.head, sums.tail, sums.unions)


@njit(cache=True, nogil=True)
def _scan_run_experts(
    ids: Any, n: int, overlapping: bool, cell: Any, layer: Any, expert_windows: Any, last: Any, gaps: Any
) -> None:
    """Count the windows of one run as :func:`scan_experts` does.

    With t the token, g the distance to the expert's previous use (t + 1 at its first), an occurrence adds
    max(0, min(g, T) - max(0, t - (n - T))) windows. For all but the run's last tokens that is min(g, T): there
    ``gaps[g - 1]`` grows by one, the last row standing for all larger distances, which does for every T.
    """
    longest = expert_windows.shape[2]
    max_window = min(longest, n)
    middle = n - longest + 1 if overlapping and n >= longest else 0
    last[:] = -1
    for t in range(middle):
        for r in range(ids.shape[0]):
            e = np.uint64(ids[r, t])
            gaps[min(t - last[e], longest) - 1, e] += 1
            last[e] = t
    for t in range(middle, n):
        for r in range(ids.shape[0]):
            e = np.uint64(ids[r, t])
            gap = t - last[e]
            last[e] = t
            if overlapping:
                for w in range(1, max_window + 1):
                    added = min(gap, w) - max(0, t - (n - w))
                    if added > 0:
                        expert_windows[cell, layer, w - 1, e] += added
            else:
                for w in range(1, max_window + 1):
                    if t % w < gap and t < (n // w) * w:
                        expert_windows[cell, layer, w - 1, e] += 1


@njit(cache=True, nogil=True)
def scan_experts(
    columns: Any,
    first_run: int,
    end_run: int,
    run_start: Any,
    run_length: Any,
    overlapping: bool,
    cell: Any,
    layer: Any,
    expert_windows: Any,
    ids: Any,
    last: Any,
    gaps: Any,
) -> None:
    """Add, per expert and window length, the windows of one unit that contain the expert.

    Parameters
    ----------
    columns, run_start, run_length, overlapping
        As :func:`scan` takes them.
    first_run, end_run
        First run of the unit and one past its last.
    expert_windows
        ``[cells, L, T, N]`` int64.
    ids
        Scratch: ``[k, tokens]`` of the columns' dtype, for the longest run.
    last, gaps
        Scratch, ``[N]`` and ``[T, N]`` int64.
    """
    gaps[:] = 0
    for run in range(first_run, end_run):
        n = run_length[run]
        _gather(columns, run_start[run], n, ids)
        _scan_run_experts(ids, n, overlapping, cell, layer, expert_windows, last, gaps)
    # An occurrence at distance g adds min(g, T) windows: one for each distance up to T that g reaches.
    longest = gaps.shape[0]
    for g in range(longest - 2, -1, -1):
        for e in range(gaps.shape[1]):
            gaps[g, e] += gaps[g + 1, e]
    for w in range(longest):
        if w:
            for e in range(gaps.shape[1]):
                gaps[w, e] += gaps[w - 1, e]
        for e in range(gaps.shape[1]):
            expert_windows[cell, layer, w, e] += gaps[w, e]


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _rarefy(left: float, inverse: Any, step: int, used: Any, absent: Any) -> float:
    """Return the expected unique experts in ``step + 1`` of a request's n tokens, taken at random.

    That is sum_e 1 - C(n - c_e, T) / C(n, T) (Hurlbert, Ecology 52(4), 1971). Called for step 0, 1, … in turn:
    ``absent`` keeps the probability that none of the tokens so far chose the expert, ``used`` is c_e, and there are
    ``left`` = n - step tokens to draw from, ``inverse[step]`` = 1 / ``left``.
    """
    total = 0.0
    for e in range(used.shape[0]):
        absent[e] *= (left - used[e]) * inverse[step]  # stays 0 once no token without the expert is left
        total += absent[e]
    return float(used.shape[0] - total)


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _coincidence(tokens: float, used: Any) -> float:
    """Return the number of experts that two different tokens of a request share on average."""
    same = 0.0
    for e in range(used.shape[0]):
        same += used[e] * (used[e] - 1.0)
    return float(same / (tokens * max(1.0, tokens - 1.0)))


@njit(cache=True, nogil=True)
def scan(
    columns: Any,
    ids: Any,
    units: Any,
    unit_runs: Any,
    run_start: Any,
    run_length: Any,
    bits: int,
    overlapping: bool,
    n_windows: Any,
    union_sum: Any,
    request_union_sum: Any,
    n_pairs: Any,
    overlap_counts: Any,
    rank0_repeats: Any,
    request_overlap_sum: Any,
    counts: Any,
    label_windows: Any,
    expert_windows: Any,
    request_expert_windows: Any,
) -> None:
    """Add the units of one block of routing rows to the state.

    A *unit* is one request, one layer, one phase: what a within-request shuffle permutes. It consists of one or more
    runs of consecutive positions; windows and pairs stay inside a run.

    Parameters
    ----------
    columns
        ``[k]`` uint64: addresses of the rank columns, whose rows are uint8 or uint16. A run at a time is copied from
        there, so that the columns of a part need not be copied as a whole.
    ids
        Scratch for it: ``[k, tokens]`` of the columns' dtype, for the longest run.
    units
        ``[U, 3]`` int64: layer index, cell and count cell of each unit (the rows of the state it adds to).
    unit_runs
        ``[U, 2]`` int64: first run of each unit and one past its last.
    run_start, run_length
        ``[R]`` int64: first column of each run and its tokens.
    bits
        F, see :func:`word_bits`.
    overlapping
        Sliding windows (every start), or starts 0, T, 2T, … with the tail dropped.
    n_windows, union_sum, request_union_sum
        State ``[cells, L, T]``: windows, the sum of their unique experts, and its expectation under a shuffle.
    n_pairs, rank0_repeats, request_overlap_sum
        State ``[cells, L, D]``: pairs, pairs with the same rank-0 expert (or of length 0), and the shared experts
        that a shuffle would give.
    overlap_counts
        State ``[cells, L, D, k]``: pairs that share exactly v + 1 experts.
    counts, label_windows
        State ``[count cells, L, N]``: tokens that chose each expert; ``[count cells, L, T]``: windows.
    expert_windows, request_expert_windows
        State ``[cells, L, T, N]``, or of length 0 where it is not wanted: windows that contain each expert, and the
        expected number under a shuffle.
    """
    # A unit is summed up in scratch of its own and added to the state at its end. The loops below make no views of
    # the arrays that threads share: each would count its references in one place, and the cores would wait for it.
    k, num_experts = columns.shape[0], counts.shape[2]
    max_window, max_lag = union_sum.shape[2], n_pairs.shape[2]
    per_expert = expert_windows.shape[0] > 0
    blocks = (max(max_lag, max_window - 1) + bits - 1) // bits
    words = np.zeros((k + 3) // 4 * 4 * _ROW, np.uint64)
    s = Scratch(
        words,
        words.view(np.uint16),
        words.view(np.uint32),
        np.zeros(16 * _ROW, np.uint64),
        np.zeros(_ROW, np.uint64),
        np.zeros(max(1, blocks) * num_experts, np.uint64),
        np.zeros((k, _chunk(bits)) if max_window - 1 > bits else (1, 1), np.bool_),
        np.zeros(bits, np.int64),
    )
    sums = Sums(
        np.zeros(max_window, np.int64),
        np.zeros((max_lag, k), np.int64),
        np.zeros(rank0_repeats.shape[2], np.int64),
        np.zeros(num_experts, np.int64),
        np.zeros(max_window, np.int64),
        np.zeros(max_window, np.int64),
        np.zeros((max_window, max_window), np.int64),
    )
    last = np.zeros(num_experts, np.int64)
    gaps = np.zeros((max_window if per_expert else 1, num_experts), np.int64)
    chosen, absent = np.zeros(num_experts), np.zeros(num_experts)
    inverse = np.zeros(max_window)
    unit_windows = np.zeros(max_window, np.int64)
    unit_pairs = np.zeros(max_lag, np.int64)
    for u in range(units.shape[0]):
        layer, cell, count_cell = np.uint64(units[u, 0]), np.uint64(units[u, 1]), np.uint64(units[u, 2])
        unit_windows[:] = 0
        unit_pairs[:] = 0
        sums.unions[:] = 0
        sums.overlaps[:] = 0
        sums.rank0[:] = 0
        sums.counts[:] = 0
        tokens = 0
        for run in range(unit_runs[u, 0], unit_runs[u, 1]):
            start, n = run_start[run], run_length[run]
            tokens += n
            for i in range(min(max_window, n)):
                unit_windows[i] += n - i if overlapping else n // (i + 1)
            for i in range(min(max_lag, n - 1)):
                unit_pairs[i] += n - 1 - i
            _gather(columns, start, n, ids)
            _scan_run(ids, n, bits, overlapping, s, sums)
        if per_expert:
            scan_experts(
                columns,
                unit_runs[u, 0],
                unit_runs[u, 1],
                run_start,
                run_length,
                overlapping,
                cell,
                layer,
                expert_windows,
                ids,
                last,
                gaps,
            )
        for e in range(num_experts):
            counts[count_cell, layer, e] += sums.counts[e]
            chosen[e] = np.int32(sums.counts[e])  # 64-bit integers have no fast conversion
            absent[e] = 1.0
        for i in range(min(max_window, tokens)):
            inverse[i] = 1.0 / (tokens - i)
        for i in range(min(max_window, tokens)):
            windows = unit_windows[i]
            n_windows[cell, layer, i] += windows
            label_windows[count_cell, layer, i] += windows
            union_sum[cell, layer, i] += sums.unions[i]
            request_union_sum[cell, layer, i] += windows * _rarefy(float(tokens - i), inverse, i, chosen, absent)
            if per_expert:
                for e in range(num_experts):
                    request_expert_windows[cell, layer, i, e] += windows * (1.0 - absent[e])
        coincident = _coincidence(float(tokens), chosen) / k
        for i in range(max_lag):
            n_pairs[cell, layer, i] += unit_pairs[i]
            request_overlap_sum[cell, layer, i] += unit_pairs[i] * coincident
            for v in range(k):
                overlap_counts[cell, layer, i, v] += sums.overlaps[i, v]
        for i in range(sums.rank0.shape[0]):
            rank0_repeats[cell, layer, i] += sums.rank0[i]


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def expected_unique(counts: Any, tokens: Any, max_window: int) -> Any:
    """Return sum_e 1 - (1 - c_e / n)^T for T = 1 .. max_window.

    Parameters
    ----------
    counts
        ``[M, N]`` int64: tokens that chose each expert, for M pools.
    tokens
        ``[M]`` float64: tokens n of each pool.

    Returns
    -------
    ``[M, max_window]`` float64, NaN for an empty pool.
    """
    out = np.zeros((counts.shape[0], max_window))
    base = np.zeros(counts.shape[1])
    absent = np.zeros(counts.shape[1])
    for m in range(counts.shape[0]):
        if tokens[m] <= 0:
            out[m] = np.nan
            continue
        for e in range(counts.shape[1]):
            base[e] = max(0.0, 1.0 - counts[m, e] / tokens[m])
            absent[e] = 1.0
        for i in range(max_window):
            total = 0.0
            for e in range(counts.shape[1]):
                absent[e] *= base[e]
                total += 1.0 - absent[e]
            out[m, i] = total
    return out


def compiled() -> bool:
    """Return whether a compiled version of the kernels is at hand, in this process or in the on-disk cache."""
    return bool(scan.signatures) or any(Path(scan.stats.cache_path or "").glob("kernels.scan-*.nbc"))
