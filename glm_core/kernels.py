"""Products with a large weight, written for LLVM and compiled for this processor when first needed.

A step of a chat reads every weight once and computes little with it, so its time is that of reading memory, unless the
product itself is slow. torch's INT4 kernel takes twice that time, oneDNN's product of one row in bf16 a half more; and to
expand codes for a long prompt costs more than the prompt. Each of these kernels is near one of the two limits. fp32, bf16
and INT8 with dynamic activations are read in the layout of oneDNN, which goes on to serve many rows; the others have a layout
of their own, so nothing is kept twice. Beside them: RMSNorm, the codes of weights, and the 8-bit codes of activations and what is
made of their sums, for which torch takes several passes.

A weight stands in tiles of 64 rows. Of each, step by step along the columns, there are 4 bytes of each row: a column in
fp32, two in bf16, four in 8 bits, or four with 4 bits, the codes of rows r and r + 32 in a byte. A tile's rows are the lanes of
four registers, and four bytes of x are multiplied with all.

Codes are multiplied as whole numbers with x in 16 bits: of each group of columns in a row, x is rounded to a multiple of
1/32639 of its largest number there, and its high and low byte are multiplied one after the other. That is finer than
bf16, and takes 7 instructions for 128 codes of INT4, where expanding them to bf16 takes 12. With dynamic activations, x
has 8 bits for a whole row.

They need AVX-512 with bf16 and VNNI (Zen 4, Sapphire Rapids, and later), Linux, torch's OpenMP (its threads compute here
as well) and the package llvmlite; elsewhere `kernels()` is None and torch computes as always.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

# Of products, by how the weight is stored and, where activations have 8 bits, too, by that.
Kind = Literal["int4", "int4 groups", "int8", "int8 dynamic", "bf16", "fp32"]

TILE = 64  # rows of a weight that are computed together
LANES = 16  # of a register
VECTORS = TILE // LANES
AHEAD = 4096  # bytes of the weight that are asked for early: what the processor does by itself ends with each page
# Rows of x that the 32 registers have room for; with more a product is computed in parts.
AT_ONCE: dict[Kind, int] = {"int4": 3, "int4 groups": 3, "int8": 3, "int8 dynamic": 6, "bf16": 6, "fp32": 6}
FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512bf16", "avx512vnni")
FLOAT: dict[Kind, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}  # in which x is, too
QUANTIZED_FROM = (torch.bfloat16, torch.float16, torch.float32)
MOST_ROWS = 8  # up to which every thread codes x for itself
LEAST_BYTES = 1 << 18  # of a weight; of a smaller one, threads take longer to start than to multiply
ALONE = 1 << 15  # numbers up to which one thread normalizes them sooner than it could wake another
ZERO, ZERO_4 = 128, 8  # the unsigned 8-bit code of 0, and that of 4 bits
HALF_ABOVE = ZERO + 0.5  # then cut off: rounded to the nearest
SMALLEST = torch.finfo(torch.float32).tiny * ZERO  # a row of zeros stays zeros
LARGEST_16 = 127 * 256 + 127  # whose high byte and low byte, as signed numbers, both fit
SMALLEST_16 = torch.finfo(torch.float32).tiny * (1 << 16)
STACK_BYTES = 512 << 10  # that a call may take for its codes of x; a thread of OpenMP has some MB

FLOATS, WORDS = f"<{LANES} x float>", f"<{LANES} x i32>"
PAIRS, BYTES = f"<{2 * LANES} x bfloat>", f"<{4 * LANES} x i8>"


class _Missing(Exception):
    """What the kernels need and this machine does not have; never an error, since torch has its own."""


class _Code:
    """The text of a function in LLVM's language. What changes is a variable in memory; LLVM makes registers of them."""

    def __init__(self) -> None:
        self.entry: list[str] = []  # where LLVM looks for such variables
        self.lines: list[str] = []
        self._count = 0

    def name(self) -> str:
        self._count += 1
        return f"v{self._count}"

    def do(self, text: str) -> None:
        self.lines.append(f"  {text}")

    def let(self, text: str) -> str:
        """The value of an instruction."""
        name = f"%{self.name()}"
        self.do(f"{name} = {text}")
        return name

    def variable(self, kind: str, value: str) -> str:
        """The address of a variable, set to a value here."""
        place = f"%{self.name()}"
        self.entry.append(f"  {place} = alloca {kind}, align 64")
        self.do(f"store {kind} {value}, ptr {place}, align 64")
        return place

    @contextlib.contextmanager
    def loop(self, start: str, stop: str, step: int = 1) -> Iterator[str]:
        """From `start` to below `stop`, i64; not even once where nothing is between."""
        name = self.name()
        place = self.variable("i64", start)
        self.do(f"br label %{name}")
        self.lines.append(f"{name}:")
        index = self.let(f"load i64, ptr {place}")
        goes_on = self.let(f"icmp ult i64 {index}, {stop}")
        self.do(f"br i1 {goes_on}, label %{name}.in, label %{name}.end")
        self.lines.append(f"{name}.in:")
        yield index
        after = self.let(f"add i64 {index}, {step}")
        self.do(f"store i64 {after}, ptr {place}")
        self.do(f"br label %{name}")
        self.lines.append(f"{name}.end:")

    def at(self, place: str, kind: str, index: str) -> str:
        """The address of an element."""
        return self.let(f"getelementptr {kind}, ptr {place}, i64 {index}")

    def load(self, kind: str, place: str) -> str:
        return self.let(f"load {kind}, ptr {place}, align 1")

    def add(self, a: str, b: object) -> str:
        return self.let(f"add i64 {a}, {b}")

    def times(self, a: str, b: object) -> str:
        return self.let(f"mul i64 {a}, {b}")

    def call(self, kind: str, name: str, *arguments: str) -> str:
        return self.let(f"call {kind} @{name}({', '.join(arguments)})")

    def spread(self, kind: str, value: str) -> str:
        """A vector of one number in all its lanes."""
        vector = f"<{LANES} x {kind}>"
        one = self.let(f"insertelement {vector} poison, {kind} {value}, i32 0")
        return self.let(f"shufflevector {vector} {one}, {vector} poison, {WORDS} zeroinitializer")


def _same(kind: str, value: object, count: int) -> str:
    return "<" + ", ".join([f"{kind} {value}"] * count) + ">"


def _lanes(numbers: Sequence[int]) -> str:
    return "<" + ", ".join(f"i32 {number}" for number in numbers) + ">"


def _float(number: float) -> str:
    """As LLVM wants it: the bits of the double that is the same number."""
    return f"0x{struct.unpack('<Q', struct.pack('<d', number))[0]:016X}"


DECLARED = f"""
declare {FLOATS} @llvm.x86.avx512bf16.dpbf16ps.512({FLOATS}, {PAIRS}, {PAIRS})
declare <{LANES} x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512({FLOATS})
declare {WORDS} @llvm.x86.avx512.vpdpbusd.512({WORDS}, {BYTES}, {BYTES})
declare {FLOATS} @llvm.fma.v{LANES}f32({FLOATS}, {FLOATS}, {FLOATS})
declare {FLOATS} @llvm.rint.v{LANES}f32({FLOATS})
declare {FLOATS} @llvm.fabs.v{LANES}f32({FLOATS})
declare {FLOATS} @llvm.maximum.v{LANES}f32({FLOATS}, {FLOATS})
declare float @llvm.sqrt.f32(float)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare float @llvm.vector.reduce.fadd.v{LANES}f32(float, {FLOATS})
declare {WORDS} @llvm.smax.v{LANES}i32({WORDS}, {WORDS})
declare {WORDS} @llvm.smin.v{LANES}i32({WORDS}, {WORDS})
declare i32 @llvm.vector.reduce.add.v{LANES}i32({WORDS})
declare float @llvm.vector.reduce.fmaximum.v{LANES}f32({FLOATS})
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
"""


class _Kernel(_Code):
    """The function `kernel` of one argument, the address of its fields, 8 bytes each, that all threads enter."""

    fields: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()  # the others are addresses

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.bf16, self.half = dtype == torch.bfloat16, dtype == torch.float16
        self.kind_of_x = "bfloat" if self.bf16 else "half" if self.half else "float"
        self.given: dict[str, str] = {}

    def text(self) -> str:
        """A module with it."""
        for place, name in enumerate(self.fields):
            kind = "i64" if name in self.numbers else "ptr"
            self.given[name] = self.load(kind, self.at("%given", "i64", str(place)))
        self.body()
        self.do("ret void")
        body = "\n".join((*self.entry, *self.lines))
        wide = '"prefer-vector-width"="512" "min-legal-vector-width"="512"'
        return f"{DECLARED}\ndefine void @kernel(ptr noalias %given) {wide} {{\n{body}\n}}\n"

    def body(self) -> None:
        raise NotImplementedError

    def share(self, count: str) -> tuple[str, str]:
        """This thread's first and last of so many, the last one not included."""
        names = ("omp_get_thread_num", "omp_get_num_threads")
        me, threads = (self.let(f"zext i32 {self.call('i32', name)} to i64") for name in names)
        first = self.let(f"udiv i64 {self.times(count, me)}, {threads}")
        return first, self.let(f"udiv i64 {self.times(count, self.add(me, 1))}, {threads}")

    def floats(self, place: str) -> str:
        """16 numbers in the dtype of x as fp32."""
        if self.half:
            return self.let(f"fpext <{LANES} x half> {self.load(f'<{LANES} x half>', place)} to {FLOATS}")
        if not self.bf16:
            return self.load(FLOATS, place)
        words = self.let(f"zext <{LANES} x i16> {self.load(f'<{LANES} x i16>', place)} to {WORDS}")
        words = self.let(f"shl {WORDS} {words}, {_same('i32', 16, LANES)}")
        return self.let(f"bitcast {WORDS} {words} to {FLOATS}")

    def put(self, floats: str, place: str) -> None:
        """Write 16 numbers in the dtype of x."""
        if not self.bf16:
            self.do(f"store {FLOATS} {floats}, ptr {place}, align 1")
            return
        short = f"<{LANES} x bfloat>"
        rounded = self.call(short, "llvm.x86.avx512bf16.cvtneps2bf16.512", f"{FLOATS} {floats}")
        self.do(f"store {short} {rounded}, ptr {place}, align 1")

    def fma(self, a: str, b: str, c: str) -> str:
        return self.call(FLOATS, f"llvm.fma.v{LANES}f32", f"{FLOATS} {a}", f"{FLOATS} {b}", f"{FLOATS} {c}")

    def sum(self, lanes: str) -> str:
        """The sum of 16 numbers, in pairs."""
        added = f"@llvm.vector.reduce.fadd.v{LANES}f32(float 0.0, {FLOATS} {lanes})"
        return self.let(f"call reassoc float {added}")

    def largest(self, x: str, columns: str, least: float) -> str:
        """The largest absolute of some numbers, or `least` where that is more; NaN where one is."""
        most = self.variable(FLOATS, "zeroinitializer")
        with self.loop("0", columns, LANES) as column:
            number = self.floats(self.at(x, self.kind_of_x, column))
            size = self.call(FLOATS, f"llvm.fabs.v{LANES}f32", f"{FLOATS} {number}")
            both = f"{FLOATS} {self.load(FLOATS, most)}", f"{FLOATS} {size}"
            self.do(f"store {FLOATS} {self.call(FLOATS, f'llvm.maximum.v{LANES}f32', *both)}, ptr {most}")
        lanes = f"{FLOATS} {self.load(FLOATS, most)}"
        found = self.call("float", f"llvm.vector.reduce.fmaximum.v{LANES}f32", lanes)
        small = self.let(f"fcmp olt float {found}, {_float(least)}")
        return self.let(f"select i1 {small}, float {_float(least)}, float {found}")

    def encode(self, x: str, codes: str, columns: str) -> str:
        """Write a row's codes around ZERO, as `linear.DynamicLinear` makes them; what one is worth, a float."""
        largest = self.largest(x, columns, SMALLEST)
        factor = self.spread("float", self.let(f"fdiv float {_float(127)}, {largest}"))
        with self.loop("0", columns, LANES) as column:
            number = self.floats(self.at(x, self.kind_of_x, column))
            number = self.let(f"fmul {FLOATS} {number}, {factor}")
            number = self.let(f"fadd {FLOATS} {number}, {_same('float', _float(HALF_ABOVE), LANES)}")
            code = self.let(f"fptosi {FLOATS} {number} to {WORDS}")
            code = self.let(f"trunc {WORDS} {code} to <{LANES} x i8>")
            self.do(f"store <{LANES} x i8> {code}, ptr {self.at(codes, 'i8', column)}, align 1")
        return self.let(f"fdiv float {largest}, {_float(127)}")

    def encode_16(self, group: str, plus: str) -> None:
        """Codes in 16 bits of a group of x, in two bytes, what one is worth, and their sum times `plus` (i32)."""
        columns = self.given["group"]
        first = self.times(group, columns)
        x = self.at(self.given["x"], self.kind_of_x, first)
        largest = self.largest(x, columns, SMALLEST_16)
        factor = self.spread("float", self.let(f"fdiv float {_float(LARGEST_16)}, {largest}"))
        total = self.variable(WORDS, "zeroinitializer")
        with self.loop("0", columns, LANES) as column:
            number = self.let(f"fmul {FLOATS} {self.floats(self.at(x, self.kind_of_x, column))}, {factor}")
            number = self.call(FLOATS, f"llvm.rint.v{LANES}f32", f"{FLOATS} {number}")
            whole = self.let(f"fptosi {FLOATS} {number} to {WORDS}")
            added = self.let(f"add {WORDS} {self.load(WORDS, total)}, {whole}")
            self.do(f"store {WORDS} {added}, ptr {total}")
            above = self.let(f"add {WORDS} {whole}, {_same('i32', 128, LANES)}")
            above = self.let(f"ashr {WORDS} {above}, {_same('i32', 8, LANES)}")
            place = self.add(first, column)
            for numbers, name in ((above, "codes"), (whole, "low")):
                code = self.let(f"trunc {WORDS} {numbers} to <{LANES} x i8>")
                self.do(f"store <{LANES} x i8> {code}, ptr {self.at(self.given[name], 'i8', place)}, align 1")
        worth = self.let(f"fdiv float {largest}, {_float(LARGEST_16)}")
        self.do(f"store float {worth}, ptr {self.at(self.given['worth'], 'float', group)}")
        lanes = f"{WORDS} {self.load(WORDS, total)}"
        added = self.call("i32", f"llvm.vector.reduce.add.v{LANES}i32", lanes)
        start = self.let(f"mul i32 {added}, {plus}")
        self.do(f"store i32 {start}, ptr {self.at(self.given['start'], 'i32', group)}")


class _Encode(_Kernel):
    """Codes of many rows in 8 bits, and what one is worth in each."""

    fields = ("x", "codes", "worth", "rows", "columns")
    numbers = ("rows", "columns")

    def body(self) -> None:
        first, last = self.share(self.given["rows"])
        with self.loop(first, last) as row:
            place = self.times(row, self.given["columns"])
            x = self.at(self.given["x"], self.kind_of_x, place)
            worth = self.encode(x, self.at(self.given["codes"], "i8", place), self.given["columns"])
            self.do(f"store float {worth}, ptr {self.at(self.given['worth'], 'float', row)}")


class _Encode16(_Kernel):
    """Codes of many groups in 16 bits."""

    fields = ("x", "codes", "low", "worth", "start", "groups", "group", "plus")
    numbers = ("groups", "group", "plus")

    def body(self) -> None:
        plus = self.let(f"trunc i64 {self.given['plus']} to i32")
        first, last = self.share(self.given["groups"])
        with self.loop(first, last) as group:
            self.encode_16(group, plus)


class _Scale(_Kernel):
    """Sums of many rows (fp32) times what a code was worth in each, plus a bias, in the dtype of x."""

    fields = ("sums", "worth", "bias", "out", "rows", "columns")
    numbers = ("rows", "columns")

    def body(self) -> None:
        first, last = self.share(self.given["rows"])
        with self.loop(first, last) as row:
            worth = self.spread("float", self.load("float", self.at(self.given["worth"], "float", row)))
            begin = self.times(row, self.given["columns"])
            with self.loop("0", self.given["columns"], LANES) as column:
                place = self.add(begin, column)
                sums = self.load(FLOATS, self.at(self.given["sums"], "float", place))
                sums = self.let(f"fmul {FLOATS} {sums}, {worth}")
                bias = self.floats(self.at(self.given["bias"], self.kind_of_x, column))
                sums = self.let(f"fadd {FLOATS} {sums}, {bias}")
                self.put(sums, self.at(self.given["out"], self.kind_of_x, place))


class _Norm(_Kernel):
    """RMSNorm of rows, in fp32 and rounded once; x, the weight and the result have one dtype."""

    fields = ("x", "weight", "out", "rows", "columns", "eps")
    numbers = ("rows", "columns", "eps")  # eps: the bits of an fp32

    def body(self) -> None:
        first, last = self.share(self.given["rows"])
        columns = self.given["columns"]
        bits = self.let(f"trunc i64 {self.given['eps']} to i32")
        eps = self.let(f"bitcast i32 {bits} to float")
        count = self.let(f"uitofp i64 {columns} to float")
        with self.loop(first, last) as row:
            begin = self.times(row, columns)
            x = self.at(self.given["x"], self.kind_of_x, begin)
            out = self.at(self.given["out"], self.kind_of_x, begin)
            total = self.variable(FLOATS, "zeroinitializer")
            with self.loop("0", columns, LANES) as column:
                number = self.floats(self.at(x, self.kind_of_x, column))
                more = self.fma(number, number, self.load(FLOATS, total))
                self.do(f"store {FLOATS} {more}, ptr {total}")
            mean = self.let(f"fdiv float {self.sum(self.load(FLOATS, total))}, {count}")
            root = self.call("float", "llvm.sqrt.f32", f"float {self.let(f'fadd float {mean}, {eps}')}")
            factor = self.spread("float", self.let(f"fdiv float {_float(1)}, {root}"))
            with self.loop("0", columns, LANES) as column:
                number = self.floats(self.at(x, self.kind_of_x, column))
                number = self.let(f"fmul {FLOATS} {number}, {factor}")
                weight = self.floats(self.at(self.given["weight"], self.kind_of_x, column))
                self.put(self.let(f"fmul {FLOATS} {number}, {weight}"), self.at(out, self.kind_of_x, column))


class _Quantize(_Kernel):
    """Codes and scales of a weight's rows, in the released layout and rounded as there: see `quantize_weight`."""

    fields = ("x", "codes", "scale", "rows", "columns")
    numbers = ("rows", "columns")
    bits = 8

    def body(self) -> None:
        half, columns = f"<{LANES} x half>", self.given["columns"]
        largest = (1 << self.bits - 1) - 1

        def rounded(numbers: str) -> str:
            """To fp16 and back."""
            return self.let(f"fpext {half} {self.let(f'fptrunc {FLOATS} {numbers} to {half}')} to {FLOATS}")

        first, last = self.share(self.given["rows"])
        with self.loop(first, last) as row:
            x = self.at(self.given["x"], self.kind_of_x, self.times(row, columns))
            most = self.spread("float", self.largest(x, columns, 0.0))
            size = self.let(f"fdiv {FLOATS} {rounded(most)}, {_same('float', _float(largest), LANES)}")
            size = rounded(size)
            scale = self.let(f"extractelement {FLOATS} {size}, i32 0")
            scale = self.let(f"fptrunc float {scale} to half")
            self.do(f"store half {scale}, ptr {self.at(self.given['scale'], 'half', row)}")
            none = self.let(f"fcmp oeq {FLOATS} {size}, zeroinitializer")
            ones = _same("float", _float(1), LANES)
            divisor = self.let(f"select <{LANES} x i1> {none}, {FLOATS} {ones}, {FLOATS} {size}")
            codes = self.let(f"udiv i64 {columns}, {8 // self.bits}")
            codes = self.at(self.given["codes"], "i8", self.times(row, codes))
            with self.loop("0", columns, LANES) as column:
                number = rounded(self.floats(self.at(x, self.kind_of_x, column)))
                number = rounded(self.let(f"fdiv {FLOATS} {number}, {divisor}"))
                number = self.call(FLOATS, f"llvm.rint.v{LANES}f32", f"{FLOATS} {number}")
                code = self.let(f"fptosi {FLOATS} {number} to {WORDS}")
                for name, bound in (("smax", -largest), ("smin", largest)):
                    both = f"{WORDS} {code}", f"{WORDS} {_same('i32', bound, LANES)}"
                    code = self.call(WORDS, f"llvm.{name}.v{LANES}i32", *both)
                self._store(code, codes, column)

    def _store(self, code: str, codes: str, column: str) -> None:
        code = self.let(f"trunc {WORDS} {code} to <{LANES} x i8>")
        self.do(f"store <{LANES} x i8> {code}, ptr {self.at(codes, 'i8', column)}, align 1")


class _Quantize4(_Quantize):
    """To 4 bits: of two neighbouring columns the even one is the high half of a byte."""

    bits = 4

    def _store(self, code: str, codes: str, column: str) -> None:
        short = f"<{LANES // 2} x i32>"
        two = [
            self.let(
                f"shufflevector {WORDS} {code}, {WORDS} poison, {short} {_lanes(range(first, LANES, 2))}"
            )
            for first in (0, 1)
        ]
        high = self.let(f"shl {short} {two[0]}, {_same('i32', 4, LANES // 2)}")
        low = self.let(f"and {short} {two[1]}, {_same('i32', 15, LANES // 2)}")
        bytes_ = f"<{LANES // 2} x i8>"
        both = self.let(f"trunc {short} {self.let(f'or {short} {high}, {low}')} to {bytes_}")
        place = self.let(f"lshr i64 {column}, 1")
        self.do(f"store {bytes_} {both}, ptr {self.at(codes, 'i8', place)}, align 1")


class _Tiles(_Kernel):
    """Codes of a weight from the released layout into tiles: see `codes_in_tiles`."""

    fields = ("stored", "out", "tiles", "columns")
    numbers = ("tiles", "columns")
    bits = 8

    def body(self) -> None:
        per_row = self.let(f"udiv i64 {self.given['columns']}, {8 // self.bits}")
        tile_bytes = self.times(per_row, TILE)
        first, last = self.share(self.given["tiles"])
        with self.loop(first, last) as tile:
            begin = self.times(tile, tile_bytes)
            stored, out = (self.at(self.given[name], "i8", begin) for name in ("stored", "out"))
            with self.loop("0", self.given["columns"], 4 * LANES) as column:
                place = self.let(f"udiv i64 {column}, {8 // self.bits}")
                self._square(
                    self.at(stored, "i8", place), self.at(out, "i8", self.times(place, TILE)), per_row
                )

    def _square(self, stored: str, out: str, per_row: str) -> None:
        """The next 16 steps of all rows of a tile, 16 rows at a time."""
        rows = TILE * self.bits // 8  # that have bytes of their own in a tile
        for start in range(0, rows, LANES):
            words = [self._words(stored, start + row, per_row) for row in range(LANES)]
            for step, word in enumerate(self._transposed(words)):
                place = self.at(out, "i32", str(step * rows + start))
                self.do(f"store {WORDS} {word}, ptr {place}, align 1")

    def _words(self, stored: str, row: int, per_row: str) -> str:
        """The four bytes of a row in each of 16 steps."""
        words = self.load(WORDS, self.at(stored, "i8", self.times(per_row, row)))
        return self.let(f"xor {WORDS} {words}, {_same('i32', ZERO * 0x01010101, LANES)}")

    def _transposed(self, words: list[str]) -> list[str]:
        """Lane i of register j as lane j of register i: corners of ever larger squares change places."""
        words = list(words)
        for size in (1, 2, 4, 8):
            for row in (row for row in range(LANES) if not row & size):
                two = f"{WORDS} {words[row]}, {WORDS} {words[row + size]}"
                for which, lanes in (
                    (row, [LANES + (lane ^ size) if lane & size else lane for lane in range(LANES)]),
                    (row + size, [LANES + lane if lane & size else lane ^ size for lane in range(LANES)]),
                ):
                    words[which] = self.let(f"shufflevector {two}, {WORDS} {_lanes(lanes)}")
        return words


class _Tiles4(_Tiles):
    """Of 4 bits: a byte has the codes of one column in two rows instead of those of one row in two columns."""

    bits = 4

    def _words(self, stored: str, row: int, per_row: str) -> str:
        count = 2 * LANES
        kind = f"<{count} x i8>"
        plus, four = _same("i8", ZERO_4 << 4 | ZERO_4, count), _same("i8", 4, count)
        one, other = (
            self.let(
                f"xor {kind} {self.load(kind, self.at(stored, 'i8', self.times(per_row, place)))}, {plus}"
            )
            for place in (row, row + TILE // 2)
        )
        upper = self.let(f"and {kind} {other}, {_same('i8', 0xF0, count)}")
        even = self.let(f"or {kind} {self.let(f'lshr {kind} {one}, {four}')}, {upper}")
        lower = self.let(f"and {kind} {one}, {_same('i8', 0x0F, count)}")
        odd = self.let(f"or {kind} {self.let(f'shl {kind} {other}, {four}')}, {lower}")
        lanes = [lane + count * which for lane in range(count) for which in (0, 1)]
        both = self.let(f"shufflevector {kind} {even}, {kind} {odd}, <{2 * count} x i32> {_lanes(lanes)}")
        return self.let(f"bitcast {BYTES} {both} to {WORDS}")


class _Product(_Kernel):
    """Some rows of x times a weight; x, the bias and the result have one dtype.

    rows   so many, whose codes each thread makes for itself; 0: any number of parts of AT_ONCE rows, already coded
    """

    fields = (
        "x", "weight", "scale", "sums", "bias", "out", "tiles", "columns", "group", "parts",
        "codes", "low", "worth", "start",
    )  # fmt: skip
    numbers = ("tiles", "columns", "group", "parts")
    per_step: int  # columns
    step_bytes = TILE * 4

    def __init__(self, kind: Kind, rows: int, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.kind, self.rows, self.at_once = kind, rows, AT_ONCE[kind]

    def body(self) -> None:
        tiles = self.given["tiles"]
        self.weight_rows = self.times(tiles, TILE)
        first, last = self.share(tiles)
        if self.rows:
            self.prepare()
        with self.loop(first, last) as tile:
            tile_bytes = self.times(self.given["columns"], self.step_bytes // self.per_step)
            weight = self.at(self.given["weight"], "i8", self.times(tile, tile_bytes))
            row = self.times(tile, TILE)
            lanes = [self.add(row, vector * LANES) for vector in range(VECTORS)]
            # A second part finds the tile in the cache.
            if self.rows:
                parts = -(-self.rows // self.at_once)
                bounds = [self.rows * part // parts for part in range(parts + 1)]
                for rows in itertools.starmap(range, itertools.pairwise(bounds)):
                    self.tile(weight, lanes, list(map(str, rows)))
            else:
                with self.loop("0", self.given["parts"]) as part:
                    begin = self.times(part, self.at_once)
                    self.tile(weight, lanes, [self.add(begin, row) for row in range(self.at_once)])

    def prepare(self) -> None:
        """What every thread makes of x for itself: that takes less time than waiting for the others."""

    def tile(self, weight: str, lanes: list[str], rows: list[str]) -> None:
        """Some rows of x times a tile, whose rows of the weight begin at `lanes`, in fours of vectors."""
        raise NotImplementedError

    def space(self, name: str, kind: str, count: str) -> None:
        """Room on the stack for a field."""
        self.given[name] = self.let(f"alloca {kind}, i64 {count}, align 64")

    def x_at(self, row: str, column: str) -> str:
        return self.add(self.times(self.given["columns"], row), column)

    def steps(self, weight: str, start: str, stop: str) -> Iterator[tuple[str, str]]:
        """The first column and the address of each step; two in a round of the loop."""
        with self.loop(start, stop, 2 * self.per_step) as begin:
            for step in range(2):
                column = self.add(begin, step * self.per_step)
                place = self.at(weight, "i8", self.times(column, self.step_bytes // self.per_step))
                for line in range(AHEAD, AHEAD + self.step_bytes, 64):
                    self.prefetch(self.at(place, "i8", str(line)))
                yield column, place

    def prefetch(self, place: str) -> None:
        self.do(f"call void @llvm.prefetch.p0(ptr {place}, i32 0, i32 3, i32 1)")

    def four_bytes(self, place: str, kind: str) -> str:
        """Those at an address in all lanes."""
        return self.let(f"bitcast {WORDS} {self.spread('i32', self.load('i32', place))} to {kind}")

    def dot(self, sums: str, a: str, b: str) -> None:
        """Add products of bytes, unsigned ones and signed ones, to whole numbers in memory."""
        given = f"{WORDS} {self.load(WORDS, sums)}", f"{BYTES} {a}", f"{BYTES} {b}"
        self.do(f"store {WORDS} {self.call(WORDS, 'llvm.x86.avx512.vpdpbusd.512', *given)}, ptr {sums}")

    def finish(self, row: str, lanes: str, sums: str) -> None:
        """Add the bias to 16 sums and write them."""
        bias = self.floats(self.at(self.given["bias"], self.kind_of_x, lanes))
        place = self.add(self.times(self.weight_rows, row), lanes)
        self.put(self.let(f"fadd {FLOATS} {sums}, {bias}"), self.at(self.given["out"], self.kind_of_x, place))


class _Float(_Product):
    """A weight in bf16."""

    per_step, vector = 2, PAIRS

    def tile(self, weight: str, lanes: list[str], rows: list[str]) -> None:
        sums = {(row, v): self.variable(FLOATS, "zeroinitializer") for v in range(VECTORS) for row in rows}
        for column, place in self.steps(weight, "0", self.given["columns"]):
            numbers = [
                self.load(self.vector, self.at(place, "i8", str(64 * vector))) for vector in range(VECTORS)
            ]
            for row in rows:
                x = self.at(self.given["x"], self.kind_of_x, self.x_at(row, column))
                x = self.four_bytes(x, self.vector)
                for vector, number in enumerate(numbers):
                    at = sums[row, vector]
                    self.do(f"store {FLOATS} {self.more(self.load(FLOATS, at), number, x)}, ptr {at}")
        for (row, vector), at in sums.items():
            self.finish(row, lanes[vector], self.load(FLOATS, at))

    def more(self, sums: str, number: str, x: str) -> str:
        """Sums with the products of one step."""
        given = f"{FLOATS} {sums}", f"{PAIRS} {number}", f"{PAIRS} {x}"
        return self.call(FLOATS, "llvm.x86.avx512bf16.dpbf16ps.512", *given)


class _Single(_Float):
    """A weight in fp32."""

    per_step, vector = 1, FLOATS

    def more(self, sums: str, number: str, x: str) -> str:
        return self.fma(number, x, sums)


class _Dynamic(_Product):
    """A weight in 8 bits, and x made so."""

    per_step = 4

    def prepare(self) -> None:
        columns = self.given["columns"]
        self.space("codes", "i8", self.times(columns, self.rows))
        self.space("worth", "float", str(self.rows))
        with self.loop("0", str(self.rows)) as row:
            place = self.x_at(row, "0")
            x = self.at(self.given["x"], self.kind_of_x, place)
            worth = self.encode(x, self.at(self.given["codes"], "i8", place), columns)
            self.do(f"store float {worth}, ptr {self.at(self.given['worth'], 'float', row)}")

    def tile(self, weight: str, lanes: list[str], rows: list[str]) -> None:
        start = [self.load(WORDS, self.at(self.given["sums"], "i32", lane)) for lane in lanes]
        sums = {(row, v): self.variable(WORDS, start[v]) for v in range(VECTORS) for row in rows}
        for column, place in self.steps(weight, "0", self.given["columns"]):
            numbers = [self.load(BYTES, self.at(place, "i8", str(64 * vector))) for vector in range(VECTORS)]
            for row in rows:
                x = self.four_bytes(self.at(self.given["codes"], "i8", self.x_at(row, column)), BYTES)
                for vector, number in enumerate(numbers):
                    self.dot(sums[row, vector], x, number)
        for (row, vector), at in sums.items():
            scale = self.load(FLOATS, self.at(self.given["scale"], "float", lanes[vector]))
            number = self.let(f"sitofp {WORDS} {self.load(WORDS, at)} to {FLOATS}")
            number = self.let(f"fmul {FLOATS} {number}, {scale}")
            worth = self.spread("float", self.load("float", self.at(self.given["worth"], "float", row)))
            number = self.let(f"fmul {FLOATS} {number}, {worth}")
            self.finish(row, lanes[vector], number)


class _Codes(_Product):
    """A weight in 8 or 4 bits; x in 16, group by group of columns. In "int4 groups" the weight has these groups, too."""

    per_step = 4

    def __init__(self, kind: Kind, rows: int, dtype: torch.dtype) -> None:
        super().__init__(kind, rows, dtype)
        self.step_bytes = TILE * 4 if kind == "int8" else TILE * 2
        self.plus = PLUS[kind]

    def body(self) -> None:
        self.groups = self.let(f"udiv i64 {self.given['columns']}, {self.given['group']}")
        super().body()

    def prepare(self) -> None:
        count = self.times(self.given["columns"], self.rows)
        groups = self.times(self.groups, self.rows)
        for name, kind, many in (("codes", "i8", count), ("low", "i8", count), ("worth", "float", groups),
                                 ("start", "i32", groups)):  # fmt: skip
            self.space(name, kind, many)
        with self.loop("0", groups) as group:
            self.encode_16(group, str(-self.plus))

    def tile(self, weight: str, lanes: list[str], rows: list[str]) -> None:
        places = [(row, vector) for vector in range(VECTORS) for row in rows]
        sums = {at: self.variable(FLOATS, "zeroinitializer") for at in places}
        with self.loop("0", self.groups) as group:
            if self.kind == "int4 groups":
                ahead = self.times(self.add(group, 4), self.weight_rows)
                for lane in lanes:
                    self.prefetch(self.at(self.given["scale"], "i32", self.add(ahead, lane)))
            begin = self.times(group, self.given["group"])
            of_x = {row: self.add(self.times(self.groups, row), group) for row in rows}
            start = {
                row: self.spread("i32", self.load("i32", self.at(self.given["start"], "i32", of_x[row])))
                for row in rows
            }
            low = {(row, v): self.variable(WORDS, start[row]) for row, v in places}
            high = {at: self.variable(WORDS, "zeroinitializer") for at in places}
            for column, place in self.steps(weight, begin, self.add(begin, self.given["group"])):
                numbers = self._numbers(place)
                for row in rows:
                    here = self.x_at(row, column)
                    for name, parts in (("codes", high), ("low", low)):
                        x = self.four_bytes(self.at(self.given[name], "i8", here), BYTES)
                        for vector, number in enumerate(numbers):
                            self.dot(parts[row, vector], number, x)
            for row in rows:
                worth = self.spread(
                    "float", self.load("float", self.at(self.given["worth"], "float", of_x[row]))
                )
                for vector in range(VECTORS):
                    at = row, vector
                    whole = self.let(f"shl {WORDS} {self.load(WORDS, high[at])}, {_same('i32', 8, LANES)}")
                    whole = self.let(f"add {WORDS} {whole}, {self.load(WORDS, low[at])}")
                    number = self.let(f"sitofp {WORDS} {whole} to {FLOATS}")
                    self._add(sums[at], number, worth, start[row], group, lanes[vector])
        for row, vector in places:
            number = self.load(FLOATS, sums[row, vector])
            if self.kind != "int4 groups":
                scale = self.load(FLOATS, self.at(self.given["scale"], "float", lanes[vector]))
                number = self.let(f"fmul {FLOATS} {number}, {scale}")
            self.finish(row, lanes[vector], number)

    def _numbers(self, place: str) -> list[str]:
        """The codes of a step and what is added to them, for each 16 rows a register."""
        if self.kind == "int8":
            return [self.load(BYTES, self.at(place, "i8", str(64 * vector))) for vector in range(VECTORS)]
        stored = [self.load(BYTES, self.at(place, "i8", str(64 * half))) for half in range(2)]
        nibble = _same("i8", 15, 4 * LANES)
        high = [self.let(f"lshr {BYTES} {one}, {_same('i8', 4, 4 * LANES)}") for one in stored]
        return [self.let(f"and {BYTES} {one}, {nibble}") for one in stored] + high

    def _add(self, sums: str, number: str, worth: str, start: str, group: str, lanes: str) -> None:
        """Add a group's sum of 16 rows to what is in memory; `start` is -plus times the sum of x there."""
        before = self.load(FLOATS, sums)
        if self.kind == "int4 groups":
            place = self.add(self.times(group, self.weight_rows), lanes)
            pair = self.load(WORDS, self.at(self.given["scale"], "i32", place))
            scale = self.let(f"shl {WORDS} {pair}, {_same('i32', 16, LANES)}")
            zero = self.let(f"and {WORDS} {pair}, {_same('i32', -65536, LANES)}")
            scale, zero = (self.let(f"bitcast {WORDS} {bits} to {FLOATS}") for bits in (scale, zero))
            total = self.let(f"sitofp {WORDS} {start} to {FLOATS}")
            total = self.let(f"fmul {FLOATS} {total}, {_same('float', _float(-1 / self.plus), LANES)}")
            number = self.let(f"fmul {FLOATS} {number}, {scale}")
            number = self.fma(zero, total, number)
        self.do(f"store {FLOATS} {self.fma(number, worth, before)}, ptr {sums}")


PLUS: dict[Kind, int] = {"int4": ZERO_4, "int4 groups": ZERO_4, "int8": ZERO}
PRODUCTS: dict[Kind, type[_Product]] = {
    "int4": _Codes, "int4 groups": _Codes, "int8": _Codes, "int8 dynamic": _Dynamic, "bf16": _Float,
    "fp32": _Single,
}  # fmt: skip
OTHERS: dict[str, type[_Kernel]] = {
    "quantize 8": _Quantize,
    "quantize 4": _Quantize4,
    "tiles 8": _Tiles,
    "tiles 4": _Tiles4,
    "encode": _Encode,
    "encode 16": _Encode16,
    "scale": _Scale,
    "norm": _Norm,
}


class Kernels:
    """The kernels of this processor, each compiled at its first call."""

    def __init__(self) -> None:
        """_Missing where there can be none, with the reason."""
        self.processor, self._llvm = _llvm()
        self._parallel = _openmp()
        self._machine = _machine(self._llvm)
        self._engines: list[Any] = []  # own the machine code
        self._made: dict[tuple[str, int, torch.dtype], int] = {}
        self._right: dict[int, bool] = {}  # by bits: whether `tiles` was tried and is
        self._lock = threading.Lock()

    def __call__(
        self,
        kind: Kind,
        x: Tensor,
        weight: int,
        rows: int,
        scale: Tensor | None,
        sums: Tensor | None,
        bias: Tensor | None,
        group: int = 1,
    ) -> Tensor:
        """(n, in) -> (n, out) in the dtype of x; FLOAT only up to MOST_ROWS. Nothing is checked here: see `serve`.

        weight  address of the weight's tiles: FLOAT and "int8 dynamic" `in_tiles`, the others `codes_in_tiles`
        rows    of the weight, out
        scale   "int4 groups": bf16 (groups, out, 2), scale and zero point; FLOAT: none; others: fp32 (out,)
        group   columns, a multiple of 32, that x is rounded in; in "int4 groups" also those of the weight
        sums    "int8 dynamic": int32 (out,), the sums of the codes of each row times -ZERO
        bias    (out,)
        """
        n, columns = x.shape
        x = x.contiguous()
        bias = _zeros(rows, x.dtype) if bias is None else bias.to(x.dtype)
        coded: tuple[Tensor, ...] = ()
        count = parts = 0
        if n <= MOST_ROWS:
            count = n
            out = x.new_empty(n, rows)
        else:
            parts = -(-n // AT_ONCE[kind])
            padded = parts * AT_ONCE[kind]  # what stands in rows behind the last one is computed and left out
            out = x.new_empty(padded, rows)
            coded = (
                self.encode(x, padded) if kind == "int8 dynamic" else self._encode_16(kind, x, group, padded)
            )
        self._run(
            self._made.get((kind, count, x.dtype)) or self._make(kind, count, x.dtype),
            x.data_ptr(), weight, 0 if scale is None else scale.data_ptr(), 0 if sums is None else sums.data_ptr(),
            bias.data_ptr(), out.data_ptr(), rows // TILE, columns, group, parts, *self._fields(kind, coded),
        )  # fmt: skip
        return out[:n]

    @staticmethod
    def _fields(kind: Kind, coded: tuple[Tensor, ...]) -> list[int]:
        """Addresses of codes, low bytes, worths and starts."""
        found = [one.data_ptr() for one in coded] or [0] * 4
        return found if len(found) == 4 else [found[0], 0, found[1], 0]

    def _encode_16(self, kind: Kind, x: Tensor, group: int, rows: int) -> tuple[Tensor, ...]:
        n, columns = x.shape
        groups = columns // group
        codes = x.new_empty(rows, columns, dtype=torch.int8)
        worth = x.new_empty(rows, groups, dtype=torch.float32)
        given = (codes, torch.empty_like(codes), worth, torch.empty_like(worth, dtype=torch.int32))
        made = self._made.get(("encode 16", 0, x.dtype)) or self._make("encode 16", 0, x.dtype)
        minus = -PLUS[kind] % (1 << 64)
        self._run(made, x.data_ptr(), *(one.data_ptr() for one in given), n * groups, group, minus)
        return given

    def encode(self, x: Tensor, rows: int = 0) -> tuple[Tensor, Tensor]:
        """Codes around ZERO of (n, in), uint8, and what one is worth in each row, fp32 (n, 1); in a multiple of 16.

        rows   of what is returned, where that is more than n; those behind the last one are not set
        """
        n, columns = x.shape
        x = x.contiguous()
        codes = x.new_empty(max(n, rows), columns, dtype=torch.uint8)
        worth = x.new_empty(max(n, rows), 1, dtype=torch.float32)
        made = self._made.get(("encode", 0, x.dtype)) or self._make("encode", 0, x.dtype)
        self._run(made, x.data_ptr(), codes.data_ptr(), worth.data_ptr(), n, columns)
        return codes, worth

    def scale(self, sums: Tensor, worth: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Contiguous out = sums * worth + bias, for sums (n, out) and worth (n, 1) in fp32 and a bias (out,)."""
        n, columns = sums.shape
        bias = _zeros(columns, out.dtype) if bias is None else bias.to(out.dtype)
        made = self._made.get(("scale", 0, out.dtype)) or self._make("scale", 0, out.dtype)
        self._run(made, sums.data_ptr(), worth.data_ptr(), bias.data_ptr(), out.data_ptr(), n, columns)

    def quantize(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """As `quantization.quantize_weight`, of a weight in bf16, fp16 or fp32 with a multiple of 16 columns."""
        weight = weight.detach().contiguous()
        rows, columns = weight.shape
        codes = weight.new_empty(rows, columns * bits // 8, dtype=torch.int8)
        scale = weight.new_empty(rows, dtype=torch.float16)
        name = f"quantize {bits}"
        made = self._made.get((name, 0, weight.dtype)) or self._make(name, 0, weight.dtype)
        self._run(made, weight.data_ptr(), codes.data_ptr(), scale.data_ptr(), rows, columns)
        return codes, scale

    def tiles(self, stored: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
        """As `codes_in_tiles`; into a contiguous tensor if one is given."""
        stored = stored.contiguous()
        out = torch.empty_like(stored, dtype=torch.uint8) if out is None else out
        if (stored.shape[1] * 8 // bits) % (4 * LANES) or not self._turns(bits):
            return out.copy_(codes_in_tiles(stored, bits))
        self._turn(stored, bits, out)
        return out

    def _turn(self, stored: Tensor, bits: int, out: Tensor) -> None:
        name = f"tiles {bits}"
        made = self._made.get((name, 0, stored.dtype)) or self._make(name, 0, stored.dtype)
        columns = stored.shape[1] * 8 // bits
        self._run(made, stored.data_ptr(), out.data_ptr(), stored.shape[0] // TILE, columns)

    def _turns(self, bits: int) -> bool:
        """Whether codes get where torch puts them, with a second tile and a second square. Tried at the first codes:
        most models have none, and LLVM takes 0.2 s for it."""
        if bits not in self._right:
            stored = torch.arange(2 * TILE * 128).mul(7919).view(2 * TILE, 128).to(torch.int8)
            out = torch.empty_like(stored, dtype=torch.uint8)
            try:
                self._turn(stored, bits, out)
                self._right[bits] = torch.equal(out, codes_in_tiles(stored, bits))
            except Exception:  # of a library in another version than the one that was tried
                self._right[bits] = False
        return self._right[bits]

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm (Zhang and Sennrich 2019) of (..., columns), a multiple of 16; the weight has the dtype of x."""
        x = x.contiguous()
        columns = x.shape[-1]
        out = torch.empty_like(x)
        bits = struct.unpack("<I", struct.pack("<f", eps))[0]
        made = self._made.get(("norm", 0, x.dtype)) or self._make("norm", 0, x.dtype)
        rows = x.numel() // columns
        threads = 1 if x.numel() <= ALONE else 0
        self._run(made, x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, columns, bits, threads=threads)
        return out

    def make(self, kind: Kind, dtype: torch.dtype) -> None:
        """Compile those of a kind for every number of rows now, so that no answer waits: 0.3 to 0.9 s."""
        for rows in range(kind in FLOAT, MOST_ROWS + 1):
            self._make(kind, rows, dtype)
        if kind not in FLOAT:
            for name in ("encode", "scale") if kind == "int8 dynamic" else ("encode 16",):
                self._make(name, 0, dtype)

    def _run(self, made: int, *given: int, threads: int = 0) -> None:
        fields = (ctypes.c_uint64 * len(given))(*given)
        self._parallel(made, ctypes.addressof(fields), threads or torch.get_num_threads(), 0)

    def _make(self, name: str, rows: int, dtype: torch.dtype) -> int:
        with self._lock:
            if (name, rows, dtype) not in self._made:
                llvm = self._llvm
                if name in OTHERS:
                    kernel = OTHERS[name](dtype)
                else:
                    kernel = PRODUCTS[cast(Kind, name)](cast(Kind, name), rows, dtype)
                module = llvm.parse_assembly(kernel.text())
                module.verify()
                builder = llvm.create_pass_builder(self._machine, llvm.create_pipeline_tuning_options(3))
                builder.getModulePassManager().run(module, builder)
                # An engine frees the machine that it was given, so each has its own.
                engine = llvm.create_mcjit_compiler(module, _machine(llvm))
                engine.finalize_object()
                self._engines.append(engine)
                self._made[name, rows, dtype] = engine.get_function_address("kernel")
        return self._made[name, rows, dtype]


def serve(kind: Kind, rows: int, columns: int) -> bool:
    """Whether the kernels compute with a weight of this size here, and are worth it."""
    bits = 8 * FLOAT[kind].itemsize if kind in FLOAT else 8 if kind.startswith("int8") else 4
    if rows * columns * bits // 8 < LEAST_BYTES or rows % TILE or columns % (2 * LANES):
        return False
    return columns * MOST_ROWS <= STACK_BYTES and kernels() is not None


def kernels() -> Kernels | None:
    """This processor's kernels; None where there are none, or where one computes wrong (`state` says why)."""
    return _tried()[0]


def state() -> str:
    """One line about them, for `doctor`."""
    found, why = _tried()
    return f"compiled for {found.processor}" if found else f"torch's ({why})"


_trying = threading.Lock()
_all: list[Kernels] = []  # never freed: nobody knows when the last thread has left the machine code
_found: list[tuple[Kernels | None, str]] = []  # one, once it was tried


def _tried() -> tuple[Kernels | None, str]:
    if not _found:
        with _trying:  # threads that load models at once try them once
            if not _found:
                _found.append(_try())
    return _found[0]


def _try() -> tuple[Kernels | None, str]:
    if os.environ.get("GLM_KERNELS", "") == "torch":
        return None, "GLM_KERNELS=torch"
    try:
        found = Kernels()
        _all.append(found)
        wrong: list[str] = [kind for kind in AT_ONCE if not _computes(found, kind)]
        if not _normalizes(found):
            wrong.append("norm")
        if not _quantizes(found):
            wrong.append("codes")
    except _Missing as error:
        return None, str(error)
    except Exception as error:  # of a library in another version than the one that was tried
        return None, f"{type(error).__name__}: {str(error)[:100]}"
    return (None, f"wrong products of {', '.join(wrong)}") if wrong else (found, "")


def _computes(found: Kernels, kind: Kind) -> bool:
    """Whether a product of small whole numbers is exact, with a second part of rows and of columns."""
    count, columns, group = AT_ONCE[kind] + 1, 64, 32
    codes = (torch.arange(TILE * 2 * columns) * 7919 % 15 - 7).view(2 * TILE, columns)
    x = torch.arange(count * columns).mul(104729).remainder(3).sub(1).view(count, columns)
    x[:, 0] = 127  # the scale of activations in 8 bits is 1
    bias = torch.arange(2 * TILE) % 5
    expected = x @ codes.t() + bias
    scale = sums = None
    dtype = FLOAT.get(kind, torch.bfloat16)
    if kind in FLOAT:
        weight = in_tiles(codes.to(dtype))
    elif kind == "int8 dynamic":
        weight, scale = in_tiles(codes.to(torch.int8)), torch.ones(2 * TILE)
        sums = codes.sum(-1, dtype=torch.int32) * -ZERO
    else:
        stored, scale = codes.to(torch.int8), torch.ones(2 * TILE)
        if kind == "int8":
            weight = codes_in_tiles(stored, 8)
        else:
            weight = codes_in_tiles(stored[:, 0::2] << 4 | stored[:, 1::2] & 15, 4)
        if kind == "int4 groups":
            pairs = torch.tensor([[[2.0, 3.0]], [[0.5, -1.0]]]).expand(2, 2 * TILE, 2)
            scale = pairs.bfloat16().contiguous()
            numbers = codes.view(-1, 2, group) * pairs[:, 0, 0, None] + pairs[:, 0, 1, None]
            expected = x.float() @ numbers.view(-1, columns).t() + bias
    given = x.to(dtype)
    out = found(kind, given, weight.data_ptr(), 2 * TILE, scale, sums, bias.to(dtype), group)
    if kind == "int8 dynamic":
        coded, worth = found.encode(given)
        again = torch.empty_like(out)
        found.scale((coded.float() - ZERO) @ codes.t().float(), worth, bias.bfloat16(), again)
        return torch.equal(out, expected.bfloat16()) and torch.equal(again, out)
    return torch.equal(out, expected.to(dtype))


def _normalizes(found: Kernels) -> bool:
    """Whether rows whose squares have the mean 4 are halved and weighted, in both dtypes."""
    x, weight = torch.full((3, 48), 2.0), torch.arange(48.0)
    x[:, ::2] = -2
    return all(
        torch.equal(found.norm(x.to(dtype), weight.to(dtype), 0.0), (x / 2 * weight).to(dtype))
        for dtype in (torch.bfloat16, torch.float32)
    )


def _quantizes(found: Kernels) -> bool:
    """Whether whole numbers are their own codes, halves go to the even one, and a row of zeros gets the scale 0."""
    weight = torch.arange(4 * 32).remainder(15).sub(7).view(4, 32) / torch.tensor([[1], [1], [2], [4]])
    weight[0, :4] = torch.tensor([7.0, 2.5, 3.5, -2.5])
    weight[1] = 0
    weight[2:, 0] = torch.tensor([3.5, 1.75])
    expected = weight * torch.tensor([[1], [1], [2], [4]])
    expected[0, 1:4] = torch.tensor([2.0, 4.0, -2.0])
    scale = torch.tensor([1, 0, 0.5, 0.25]).half()
    for dtype in QUANTIZED_FROM:
        codes, found_scale = found.quantize(weight.to(dtype), 4)
        high, low = codes >> 4, (codes << 4) >> 4
        right = torch.equal(torch.stack((high, low), -1).flatten(1).float(), expected)
        if not right or not torch.equal(found_scale, scale):
            return False
    return True


def in_tiles(weight: Tensor) -> Tensor:
    """(out, in) as oneDNN keeps it for these kernels: by tile and step, each row's four bytes side by side."""
    four = weight.contiguous().view(torch.int32)
    return four.view(-1, TILE, four.shape[1]).transpose(1, 2).contiguous().view(weight.dtype)


def codes_in_tiles(stored: Tensor, bits: int) -> Tensor:
    """Codes in the released layout plus 128 or 8: uint8 of that shape, whose rows and columns mean nothing.

    By tile and step of four columns, each row has four bytes; with 4 bits rows 0 to 31, row 32 further in their high
    halves.
    """
    if bits == 8:
        return (in_tiles(stored).view(torch.uint8) ^ ZERO).view(stored.shape)
    plus = stored.view(torch.uint8) ^ (
        ZERO_4 << 4 | ZERO_4
    )  # adds 8 to both codes of a byte, in two's complement
    low, high = plus.view(-1, 2, TILE // 2, stored.shape[1]).unbind(1)
    even, odd = (low >> 4) | (high & 0xF0), (low & 0x0F) | (high << 4)
    four = torch.stack((even, odd), -1).flatten(2).view(torch.int32)
    return four.transpose(1, 2).contiguous().view(torch.uint8).view(stored.shape)


def codes_of_tiles(stored: Tensor, bits: int, out: Tensor) -> None:
    """The inverse of `codes_in_tiles`, for whole tiles and into (in, out) of any dtype."""
    steps, tiles = out.shape[0] // 4, out.shape[1] // TILE
    if bits == 8:
        four = stored.view(tiles, steps, TILE, 4).permute(1, 3, 0, 2)  # (steps, 4, tiles, rows of a tile)
        out.view(steps, 4, tiles, TILE).copy_((four ^ ZERO).view(torch.int8))
        return
    four = stored.view(tiles, steps, TILE // 2, 4).permute(1, 3, 0, 2)
    filled = out.view(steps, 4, tiles, 2, TILE // 2)
    filled[:, :, :, 0] = (four & 15).view(torch.int8) - ZERO_4
    filled[:, :, :, 1] = (four >> 4).view(torch.int8) - ZERO_4


@lru_cache(maxsize=64)
def _zeros(count: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=dtype)


def _llvm() -> tuple[str, Any]:
    """The processor's name, and LLVM for it."""
    try:
        import llvmlite.binding as llvm
    except ImportError as error:
        raise _Missing("llvmlite is not installed") from error
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    missing = [name for name in FEATURES if not features.get(name)]
    if missing:
        raise _Missing(f"the processor lacks {', '.join(missing)}")
    return llvm.get_host_cpu_name(), llvm


def _machine(llvm: Any) -> Any:
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features, opt=3)


def _openmp() -> Callable[[int, int, int, int], None]:
    """GCC's parallel region of the OpenMP that torch has loaded, so that its threads are used and no others are made."""
    if sys.platform != "linux":
        raise _Missing(f"torch's OpenMP is another one on {sys.platform}")
    import llvmlite.binding as llvm

    with open("/proc/self/maps", encoding="utf-8") as maps:
        paths = {found[0] for line in maps if (found := re.search(r"/.*libgomp.*", line))}
    site = str(Path(torch.__file__).resolve().parent.parent)  # other packages bring one of their own
    own = [path for path in paths if path.startswith((f"{site}/torch/", f"{site}/torch.libs/"))] or list(
        paths
    )
    if len(own) != 1:
        raise _Missing(f"{len(own)} libraries of OpenMP could be torch's")
    library = ctypes.CDLL(own[0])
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    parallel = library.GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel  # type: ignore[no-any-return]
