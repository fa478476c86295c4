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
from typing import Any

import numpy as np
from numba import njit

_U0 = np.uint64(0)
_U1 = np.uint64(1)
_EVEN = np.uint64(0x5555555555555555)
_PAIR = np.uint64(0x3333333333333333)
_NIBBLE = np.uint64(0x0F0F0F0F0F0F0F0F)
_BYTE = np.uint64(0x0101010101010101)


def word_bits(max_lag: int, max_window: int) -> int:
    """Return F, the lags that one history word covers: 16 where that is enough, else 32."""
    return 16 if max(max_lag, max_window - 1) <= 16 else 32


@njit(cache=True, nogil=True)
def _popcount(x: Any) -> Any:
    """Return the number of set bits of a uint64, in the form that LLVM turns into its instruction for it."""
    x -= (x >> _U1) & _EVEN
    x = (x & _PAIR) + ((x >> np.uint64(2)) & _PAIR)
    x = (x + (x >> np.uint64(4))) & _NIBBLE
    return np.int64((x * _BYTE) >> np.uint64(56))


@njit(cache=True, nogil=True)
def _history(
    ids: Any, start: int, begin: int, end: int, delay: int, bits: int, words: Any, table: Any, counts: Any
) -> None:
    """Write the history word of every routed expert of tokens ``begin .. end - 1``.

    Parameters
    ----------
    ids
        Routed experts ``[k, rows]``; token t of the run is column ``start + t``.
    delay
        Lags ``delay + 1 .. delay + bits`` are recorded.
    words
        Output ``[k, >= end - begin]``, uint16 or uint32 as ``bits`` says; every one of these is written.
    table
        Uses per expert ``[N]`` uint64, in epochs of ``64 - bits`` tokens: the low ``bits`` bits are the tokens before
        the epoch, the others the epoch itself. ``begin`` must be a multiple of the epoch.
    counts
        ``[N]`` int64: grows by the uses of each expert in the epochs that are over; or empty.
    """
    epoch = np.uint64(64 - bits)
    past = np.uint64(bits)
    k = np.uint64(ids.shape[0])
    first = np.uint64(start)
    lag = np.uint64(delay)
    t = np.uint64(begin)
    stop = np.uint64(end)
    while t < stop:
        for i in range(counts.shape[0]):
            counts[i] += _popcount(table[i] >> past)
        for i in range(table.shape[0]):
            table[i] >>= epoch
        for step in range(min(epoch, stop - t)):
            mark = _U1 << (past + step)
            now = t + step
            column = now - np.uint64(begin)
            if lag == _U0 and k == _U1:  # one rank: a loop over ranks would cost more than its body
                e = np.uint64(ids[0, first + now])
                used = table[e]
                words[0, column] = used >> step
                table[e] = used | mark
            elif lag == _U0:
                for r in range(k):
                    e = np.uint64(ids[r, first + now])
                    used = table[e]
                    words[r, column] = used >> step
                    table[e] = used | mark
            else:
                for r in range(k):
                    words[r, column] = table[np.uint64(ids[r, first + now])] >> step
                if now >= lag:
                    for r in range(k):
                        table[np.uint64(ids[r, first + now - lag])] |= mark
        t += epoch


@njit(cache=True, nogil=True)
def _pack_history(
    ids: Any, start: int, begin: int, end: int, delay: int, bits: int, packed: Any, table: Any, counts: Any
) -> None:
    """Write the history words into ``packed[k, W]`` uint64, with zeros after the last token."""
    packed[:, packed.shape[1] - 1] = _U0
    if bits == 16:
        _history(ids, start, begin, end, delay, bits, packed.view(np.uint16), table, counts)
    else:
        _history(ids, start, begin, end, delay, bits, packed.view(np.uint32), table, counts)


@njit(cache=True, nogil=True)
def _sum_planes(packed: Any, planes: Any, carry: Any) -> None:
    """Add the k words of each token bit by bit; ``planes[p]`` receives bit p of the sums.

    ``packed`` is ``[k, W]`` uint64, ``planes`` ``[P, W]`` with ``2 ** P > k``, ``carry`` scratch ``[W]``.
    """
    k = packed.shape[0]
    ones = planes[0]
    n_words = carry.shape[0]
    planes[:] = 0
    for r in range(0, k, 2):
        x = packed[r]
        if r + 1 < k:
            y = packed[r + 1]
            for i in range(n_words):
                a = ones[i] ^ x[i]
                carry[i] = (ones[i] & x[i]) | (a & y[i])
                ones[i] = a ^ y[i]
        else:
            for i in range(n_words):
                carry[i] = ones[i] & x[i]
                ones[i] ^= x[i]
        for p in range(1, planes.shape[0]):
            plane = planes[p]
            for i in range(n_words):
                a = plane[i]
                plane[i] = a ^ carry[i]
                carry[i] &= a


@njit(cache=True, nogil=True)
def _add_bit_counts(words: Any, bits: int, weight: int, counts: Any) -> None:
    """Add, for each of the ``bits`` bit positions, how many of the packed fields have it set.

    ``counts[d - 1]`` grows by ``weight`` times the number of fields with bit ``bits - d`` set. There are at most 255
    words, so that the byte-wide partial sums cannot overflow.
    """
    s1, s2, s4 = _U1, np.uint64(2), np.uint64(4)
    a0, a1, a2, a3, a4, a5, a6, a7 = _U0, _U0, _U0, _U0, _U0, _U0, _U0, _U0
    n_words = words.shape[0]
    third = n_words // 3
    for i in range(third):
        x, y, z = words[i], words[third + i], words[2 * third + i]
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
    for i in range(3 * third, n_words):
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
        shift, first = np.uint64(8 * byte), bits - 1 - 8 * byte
        for bit, a in enumerate((a0, a1, a2, a3, a4, a5, a6, a7)):
            counts[first - bit] += weight * np.int64((((a >> shift) & lane) * ones) >> top)


@njit(cache=True, nogil=True)
def _smear(packed: Any, bits: int, lags: int) -> None:
    """Turn history words into "used within the last d tokens" words for d up to ``lags``, in place."""
    shift = 1
    while shift < min(bits, lags):
        keep = _U0
        field = (_U1 << np.uint64(bits - shift)) - _U1
        for f in range(0, 64, bits):
            keep |= field << np.uint64(f)
        s = np.uint64(shift)
        for r in range(packed.shape[0]):
            row = packed[r]
            for i in range(packed.shape[1]):
                row[i] |= (row[i] >> s) & keep
        shift *= 2


@njit(cache=True, nogil=True)
def _field_sum(planes: Any, field: int, bit: int, bits: int) -> Any:
    """Return the sum over ranks of one bit of one token, read from the planes."""
    at = field * bits
    word, shift = at >> 6, np.uint64((at & 63) + bit)
    total = np.int64(0)
    for p in range(planes.shape[0]):
        total += np.int64((planes[p, word] >> shift) & _U1) << p
    return total


@njit(cache=True, nogil=True)
def _add_overlaps(packed: Any, bits: int, planes: Any, carry: Any, lags: Any, overlap_counts: Any) -> None:
    """Add the pairs of one chunk and block of lags that share exactly v experts, for each v.

    ``overlap_counts[d, v - 1]`` is the state from the block's first lag on; lags beyond it are ignored.
    """
    _sum_planes(packed, planes, carry)
    n_words = carry.shape[0]
    for v in range(1, packed.shape[0] + 1):
        for i in range(n_words):
            carry[i] = ~_U0
        for p in range(planes.shape[0]):
            flip = _U0 if (v >> p) & 1 else ~_U0
            plane = planes[p]
            for i in range(n_words):
                carry[i] &= plane[i] ^ flip
        found = _U0
        for i in range(n_words):
            found |= carry[i]
        if found != _U0:
            lags[:] = 0
            _add_bit_counts(carry, bits, 1, lags)
            for d in range(min(bits, overlap_counts.shape[0])):
                overlap_counts[d, v - 1] += lags[d]


@njit(cache=True, nogil=True)
def _add_recent_uses(
    planes: Any,
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

    ``used[j]`` grows by all of them, ``head[j]`` by those of the run's first j tokens, and ``tail[j, m]`` is set to
    those of its m-th token from the end; j = ``delay`` + 1 .. ``delay + bits``. ``planes`` hold the smeared words.
    """
    max_window = head.shape[0]
    lags[:] = 0
    for p in range(planes.shape[0]):
        _add_bit_counts(planes[p], bits, 1 << p, lags)
    for d in range(min(bits, max_window - 1 - delay)):
        j = delay + d + 1
        used[j] += lags[d]
        for t in range(begin, min(end, j)):
            head[j] += _field_sum(planes, t - begin, bits - 1 - d, bits)
        for m in range(max(0, n - end), min(n - begin, max_window - 1 - j)):
            tail[j, m] = _field_sum(planes, n - 1 - m - begin, bits - 1 - d, bits)


@njit(cache=True, nogil=True)
def _subtract_repeats(
    planes: Any, bits: int, delay: int, begin: int, end: int, n: int, max_window: int, union_sum: Any
) -> None:
    """Subtract, for windows that do not overlap, the experts used earlier in their window.

    The token at t is number t mod T of its window, so these are its experts used within the previous t mod T tokens.
    """
    for window in range(2, max_window + 1):
        covered = (n // window) * window
        for t in range(begin, min(end, covered)):
            j = t % window
            if delay < j <= delay + bits:
                union_sum[window - 1] -= _field_sum(planes, t - begin, bits + delay - j, bits)


@njit(cache=True, nogil=True)
def _scan_run(
    ids: Any,
    start: int,
    n: int,
    bits: int,
    overlapping: bool,
    union_sum: Any,
    overlap_counts: Any,
    rank0_repeats: Any,
    counts: Any,
    word_scratch: Any,
    plane_scratch: Any,
    carry_scratch: Any,
    tables: Any,
    seen: Any,
    lags: Any,
    used: Any,
    head: Any,
    tail: Any,
) -> None:
    """Add one run's window unions and lag overlaps.

    Parameters
    ----------
    ids, start, n
        The run: columns ``start .. start + n - 1`` of ``ids[k, rows]``.
    union_sum
        ``[T]`` int64: grows by the sum over windows of length T of their unique experts.
    overlap_counts
        ``[D, k]`` int64: ``[d - 1, v - 1]`` grows by the pairs at lag d that share exactly v experts.
    rank0_repeats
        ``[D]`` int64: pairs at lag d whose rank-0 expert is the same; or empty.
    counts
        ``[N]`` int64: grows by the uses of each expert.
    word_scratch, plane_scratch, carry_scratch, tables, seen, lags, used, head, tail
        Scratch: for a chunk of tokens the history words (``k * W`` uint64), their sum (``P * W``) and one row (``W``).
    """
    k = ids.shape[0]
    max_window = union_sum.shape[0]
    max_lag = overlap_counts.shape[0]
    chunk = carry_scratch.shape[0] * (64 // bits)
    n_planes = plane_scratch.shape[0] // carry_scratch.shape[0]
    tables[:] = 0
    no_counts = counts[:0]
    used[:] = 0  # these three stay 0 unless windows overlap
    head[:] = 0
    tail[:] = 0
    for begin in range(0, n, chunk):
        end = min(n, begin + chunk)
        # Rows that lie close together: a chunk is short of its scratch, and gaps would fill the cache.
        n_words = ((end - begin) * bits + 63) // 64
        packed = word_scratch[: k * n_words].reshape(k, n_words)
        planes = plane_scratch[: n_planes * n_words].reshape(n_planes, n_words)
        carry = carry_scratch[:n_words]
        seen[:] = False
        for block in range(tables.shape[1]):
            delay = block * bits
            _pack_history(
                ids, start, begin, end, delay, bits, packed, tables[0, block], counts if block == 0 else no_counts
            )
            if max_lag > delay:
                _add_overlaps(packed, bits, planes, carry, lags, overlap_counts[delay:])
            if max_window - 1 > delay:
                if max_window - 1 > bits:
                    _carry_uses(packed.view(np.uint32), end - begin, seen)
                _smear(packed, bits, max_window - 1 - delay)
                _sum_planes(packed, planes, carry)
                if overlapping:
                    _add_recent_uses(planes, bits, delay, begin, end, n, lags, used, head, tail)
                else:
                    _subtract_repeats(planes, bits, delay, begin, end, n, max_window, union_sum)
            if rank0_repeats.shape[0] > delay:
                _pack_history(ids[:1], start, begin, end, delay, bits, packed, tables[1, block], no_counts)
                lags[:] = 0
                _add_bit_counts(packed[0], bits, 1, lags)
                for d in range(min(bits, max_lag - delay)):
                    rank0_repeats[delay + d] += lags[d]
    _finish_counts(ids, start, n, bits, tables, counts)
    _finish_windows(k, n, overlapping, used, head, tail, union_sum)


@njit(cache=True, nogil=True)
def _finish_counts(ids: Any, start: int, n: int, bits: int, tables: Any, counts: Any) -> None:
    """Add the uses of each expert that are still in the tables, or all of the run's where there are no tables."""
    if tables.shape[1]:
        for e in range(counts.shape[0]):
            counts[e] += _popcount(tables[0, 0, e] >> np.uint64(bits))
        return
    for r in range(ids.shape[0]):
        column = ids[r, start : start + n]
        for t in range(n):
            counts[column[t]] += 1


@njit(cache=True, nogil=True)
def _finish_windows(k: int, n: int, overlapping: bool, used: Any, head: Any, tail: Any, union_sum: Any) -> None:
    """Turn the uses that were counted into unions: what every token brings, less what its window has already.

    A window's token number j does not count the experts that were used within the previous j tokens. Over all sliding
    windows, it runs through the run's tokens from j on, without the last T - 1 - j.
    """
    max_window = min(union_sum.shape[0], n)
    for window in range(1, max_window + 1):
        union_sum[window - 1] += k * window * (n - window + 1 if overlapping else n // window)
    for j in range(1, max_window):
        repeats = used[j] - head[j]
        for window in range(j + 1, max_window + 1):
            union_sum[window - 1] -= repeats
            repeats -= tail[j, window - 1 - j]


@njit(cache=True, nogil=True)
def _carry_uses(words: Any, n: int, seen: Any) -> None:
    """Fill the words of experts that an earlier block of lags has seen already, and note those that this one sees."""
    for r in range(words.shape[0]):
        for t in range(n):
            if seen[r, t]:
                words[r, t] = 0xFFFFFFFF
            else:
                seen[r, t] = words[r, t] != 0


@njit(cache=True, nogil=True)
def _scan_experts(ids: Any, start: int, n: int, overlapping: bool, expert_windows: Any, last: Any) -> None:
    """Add, per expert and window length, the windows of one run that contain the expert.

    ``expert_windows`` is ``[T, N]`` int64, ``last`` scratch ``[N]`` int64. With t the token, g the distance to the
    expert's previous use (t + 1 at its first), an occurrence adds max(0, min(g, T) - max(0, t - (n - T))) windows.
    """
    max_window = min(expert_windows.shape[0], n)
    last[:] = -1
    for t in range(n):
        for r in range(ids.shape[0]):
            e = np.uint64(ids[r, start + t])
            gap = t - last[e]
            last[e] = t
            if overlapping:
                for w in range(1, max_window + 1):
                    added = min(gap, w) - max(0, t - (n - w))
                    if added > 0:
                        expert_windows[w - 1, e] += added
            else:
                for w in range(1, max_window + 1):
                    if t % w < gap and t < (n // w) * w:
                        expert_windows[w - 1, e] += 1


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _rarefy(counts: Any, n: int, windows: Any, used: Any, absent: Any, expected_sum: Any, expert_expected: Any) -> None:
    """Add the expectation of a within-request shuffle, weighted by the request's windows.

    ``expected_sum[T - 1] += windows[T - 1] * sum_e(1 - C(n - c_e, T) / C(n, T))``; the same per expert goes to
    ``expert_expected[T, N]`` unless that is empty. ``used`` and ``absent`` are scratch ``[N]`` float64.
    """
    for e in range(counts.shape[0]):
        used[e] = np.int32(counts[e])  # 64-bit integers have no fast conversion
        absent[e] = 1.0
    for i in range(min(windows.shape[0], n)):
        left = float(n - i)
        inverse = 1.0 / left
        total = 0.0
        for e in range(counts.shape[0]):
            absent[e] *= (left - used[e]) * inverse  # stays 0 once no token without the expert is left
            total += absent[e]
        expected_sum[i] += windows[i] * (counts.shape[0] - total)
        if expert_expected.shape[0]:
            for e in range(counts.shape[0]):
                expert_expected[i, e] += windows[i] * (1.0 - absent[e])


@njit(cache=True, nogil=True)
def scan(
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
    ids
        Routed experts ``[k, rows]``, uint8 or uint16.
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
    k = ids.shape[0]
    max_window = union_sum.shape[2]
    max_lag = n_pairs.shape[2]
    num_experts = counts.shape[2]
    per_expert = expert_windows.shape[0] > 0
    reach = max(max_lag, max_window - 1)
    blocks = (reach + bits - 1) // bits
    # A chunk of tokens is a whole number of epochs (see _history) and at most 255 packed words (see _add_bit_counts).
    epoch, per_word = 64 - bits, 64 // bits
    chunk = 255 * per_word // epoch * epoch
    width = chunk // per_word
    words = np.zeros(k * width, np.uint64)
    n_planes = 1
    while (1 << n_planes) <= k:
        n_planes += 1
    planes = np.zeros(n_planes * width, np.uint64)
    carry = np.zeros(width, np.uint64)
    tables = np.zeros((2, blocks, num_experts), np.uint64)
    seen = np.zeros((k, chunk), np.bool_) if max_window - 1 > bits else np.zeros((1, 1), np.bool_)
    last = np.zeros(num_experts, np.int64)
    unit_counts = np.zeros(num_experts, np.int64)
    unit_windows = np.zeros(max_window, np.int64)
    used = np.zeros(num_experts, np.float64)
    absent = np.zeros(num_experts, np.float64)
    no_experts = np.zeros((0, 0), np.float64)
    lags = np.zeros(bits, np.int64)
    reused = np.zeros(max_window, np.int64)
    head = np.zeros(max_window, np.int64)
    tail = np.zeros((max_window, max_window), np.int64)
    for u in range(units.shape[0]):
        layer, cell, count_cell = units[u]
        unit_counts[:] = 0
        unit_windows[:] = 0
        tokens = 0
        pairs = n_pairs[cell, layer]
        for run in range(unit_runs[u, 0], unit_runs[u, 1]):
            start, n = run_start[run], run_length[run]
            tokens += n
            for window in range(1, min(max_window, n) + 1):
                unit_windows[window - 1] += n - window + 1 if overlapping else n // window
            _scan_run(
                ids,
                start,
                n,
                bits,
                overlapping,
                union_sum[cell, layer],
                overlap_counts[cell, layer],
                rank0_repeats[cell, layer],
                unit_counts,
                words,
                planes,
                carry,
                tables,
                seen,
                lags,
                reused,
                head,
                tail,
            )
            if per_expert:
                _scan_experts(ids, start, n, overlapping, expert_windows[cell, layer], last)
        for e in range(num_experts):
            counts[count_cell, layer, e] += unit_counts[e]
        for i in range(max_window):
            n_windows[cell, layer, i] += unit_windows[i]
            label_windows[count_cell, layer, i] += unit_windows[i]
        _rarefy(
            unit_counts,
            tokens,
            unit_windows,
            used,
            absent,
            request_union_sum[cell, layer],
            request_expert_windows[cell, layer] if per_expert else no_experts,
        )
        if max_lag > 0:
            same = 0
            for e in range(num_experts):
                same += unit_counts[e] * (unit_counts[e] - 1)
            coincident = same / (float(tokens) * float(max(1, tokens - 1)) * k)
            for run in range(unit_runs[u, 0], unit_runs[u, 1]):
                for d in range(1, min(max_lag, run_length[run] - 1) + 1):
                    found = run_length[run] - d
                    pairs[d - 1] += found
                    request_overlap_sum[cell, layer, d - 1] += found * coincident


@njit(cache=True, nogil=True)
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
