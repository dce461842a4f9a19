"""Eight-wide float32 operations for numba kernels, written as LLVM vector code.

LLVM turns them into AVX on x86-64 and NEON on aarch64. numba's own loops over short rows miss the
registers and were 4-6 times slower here (tools/bench.py has the figures).
All offsets count floats; arrays are flat, C-contiguous float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_F = ir.FloatType()
_I = ir.IntType(64)
_I32 = ir.IntType(32)
_LANES = 8
_FAST = ("contract", "nsz", "arcp", "reassoc", "nnan", "ninf")


def _pointer(context: Any, builder: Any, array_type: Any, array: Any) -> Any:
    return context.make_array(array_type)(context, builder, array).data


def _load(builder: Any, pointer: Any, offset: Any, lanes: int) -> Any:
    place = builder.gep(pointer, [offset], source_etype=_F)
    return builder.load(
        builder.bitcast(place, ir.VectorType(_F, lanes).as_pointer()),
        align=4,
    )


def _store(builder: Any, pointer: Any, offset: Any, vector: Any) -> None:
    place = builder.gep(pointer, [offset], source_etype=_F)
    builder.store(vector, builder.bitcast(place, vector.type.as_pointer()), align=4)


def _splat(builder: Any, scalar: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(first, undefined, zeros)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(builder.fmul(a, b, flags=_FAST), c, flags=_FAST)


def make_matvec(width: int) -> Callable[..., Any]:
    """`f(out, oo, init, io, W, wo, x, xo, n)`: out[oo:][:width] = init[io:] + x[xo:][:n] @ W.

    W holds n rows of `width` floats from `wo`; `width` is a multiple of 8.
    """
    vectors = width // _LANES

    @intrinsic
    def matvec(typing, out, oo, init, io, W, wo, x, xo, n):
        ip = types.intp
        signature = types.void(out, ip, init, ip, W, ip, x, ip, ip)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            out, oo, init, io, weights, wo, x, xo, n = args
            p_out, p_init, p_w, p_x = (
                _pointer(context, builder, sig.args[i], a)
                for i, a in ((0, out), (2, init), (4, weights), (6, x))
            )

            def const(value: int) -> Any:
                return ir.Constant(_I, value)

            start = [
                _load(builder, p_init, builder.add(io, const(_LANES * v)), _LANES)
                for v in range(vectors)
            ]
            before = builder.block
            head, body, end = (builder.append_basic_block(name) for name in ("h", "b", "e"))
            builder.branch(head)
            builder.position_at_end(head)
            k = builder.phi(_I)
            k.add_incoming(const(0), before)
            sums = [builder.phi(ir.VectorType(_F, _LANES)) for _ in range(vectors)]
            for phi, value in zip(sums, start, strict=True):
                phi.add_incoming(value, before)
            builder.cbranch(builder.icmp_signed("<", k, n), body, end)
            builder.position_at_end(body)
            x_k = builder.load(builder.gep(p_x, [builder.add(xo, k)], source_etype=_F), align=4)
            x_k = _splat(builder, x_k, _LANES)
            row = builder.add(wo, builder.mul(k, const(width)))
            for v, phi in enumerate(sums):
                w_k = _load(builder, p_w, builder.add(row, const(_LANES * v)), _LANES)
                phi.add_incoming(_fma(builder, x_k, w_k, phi), body)
            k.add_incoming(builder.add(k, const(1)), body)
            builder.branch(head)
            builder.position_at_end(end)
            for v, phi in enumerate(sums):
                _store(builder, p_out, builder.add(oo, const(_LANES * v)), phi)
            return context.get_dummy_value()

        return signature, codegen

    return matvec


def make_outer(width: int) -> Callable[..., Any]:
    """`f(G, go, x, xo, d, do, n)`: G[go:] += outer(x[xo:][:n], d[do:][:width])."""
    vectors = width // _LANES

    @intrinsic
    def outer(typing, G, go, x, xo, d, do, n):
        ip = types.intp
        signature = types.void(G, ip, x, ip, d, ip, ip)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            grad, go, x, xo, d, do, n = args
            p_g, p_x, p_d = (
                _pointer(context, builder, sig.args[i], a) for i, a in ((0, grad), (2, x), (4, d))
            )
            steps = [ir.Constant(_I, _LANES * v) for v in range(vectors)]
            d_v = [_load(builder, p_d, builder.add(do, step), _LANES) for step in steps]
            with cgutils.for_range(builder, n) as loop:
                place = builder.gep(p_x, [builder.add(xo, loop.index)], source_etype=_F)
                x_k = _splat(builder, builder.load(place, align=4), _LANES)
                row = builder.add(go, builder.mul(loop.index, ir.Constant(_I, width)))
                for step, d_k in zip(steps, d_v, strict=True):
                    at = builder.add(row, step)
                    _store(builder, p_g, at, _fma(builder, x_k, d_k, _load(builder, p_g, at, 8)))
            return context.get_dummy_value()

        return signature, codegen

    return outer


def make_gather(channels: int) -> Callable[..., Any]:
    """`f(x, xo, table, b, b2, w00, w10, w01, w11)`: bilinear mean of four texels into x[xo:].

    The texels lie at b, b + channels, b2, b2 + channels.
    """

    @intrinsic
    def gather(typing, x, xo, table, b, b2, w00, w10, w01, w11):
        ip, f = types.intp, types.float32
        signature = types.void(x, ip, table, ip, ip, f, f, f, f)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            x, xo, table, b, b2, *weights = args
            p_x = _pointer(context, builder, sig.args[0], x)
            p_t = _pointer(context, builder, sig.args[2], table)
            one = ir.Constant(_I, channels)
            places = (b, builder.add(b, one), b2, builder.add(b2, one))
            total = None
            for weight, place in zip(weights, places, strict=True):
                texel = _load(builder, p_t, place, channels)
                w = _splat(builder, weight, channels)
                if total is None:
                    total = builder.fmul(w, texel, flags=_FAST)
                else:
                    total = _fma(builder, w, texel, total)
            _store(builder, p_x, xo, total)
            return context.get_dummy_value()

        return signature, codegen

    return gather


def make_scatter(channels: int) -> Callable[..., Any]:
    """`f(grad, b, b2, x, xo, w00, w10, w01, w11)`: the transpose of `make_gather`'s operation."""

    @intrinsic
    def scatter(typing, grad, b, b2, x, xo, w00, w10, w01, w11):
        ip, f = types.intp, types.float32
        signature = types.void(grad, ip, ip, x, ip, f, f, f, f)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            grad, b, b2, x, xo, *weights = args
            p_g = _pointer(context, builder, sig.args[0], grad)
            d = _load(builder, _pointer(context, builder, sig.args[3], x), xo, channels)
            one = ir.Constant(_I, channels)
            places = (b, builder.add(b, one), b2, builder.add(b2, one))
            for weight, place in zip(weights, places, strict=True):
                old = _load(builder, p_g, place, channels)
                new = _fma(builder, _splat(builder, weight, channels), d, old)
                _store(builder, p_g, place, new)
            return context.get_dummy_value()

        return signature, codegen

    return scatter


def make_layer(width: int, rows: int) -> Callable[..., Any]:
    """`f(out, b, bo, W, wo, x, n, floor)`: out = max(b[bo:] + x @ W, floor) of `rows` samples.

    W holds n rows of `width` floats from `wo`; x (rows, n) and out (rows, width) start at 0. Sums
    of 4 samples by 16 columns, or 8 by 8, stay in registers, where they share every load.
    """
    columns = min(width, 2 * _LANES)
    together = 8 * _LANES // columns

    @intrinsic
    def layer(typing, out, b, bo, W, wo, x, n, floor):
        ip = types.intp
        signature = types.void(out, b, ip, W, ip, x, ip, types.float32)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            out, b, bo, weights, wo, x, n, floor = args
            p_out, p_b, p_w, p_x = (
                _pointer(context, builder, sig.args[i], a)
                for i, a in ((0, out), (1, b), (3, weights), (5, x))
            )
            least = _splat(builder, floor, _LANES)
            for r, first in itertools.product(range(0, rows, together), range(0, width, columns)):
                starts = range(first, first + columns, _LANES)
                bias = [_load(builder, p_b, builder.add(bo, _int(c)), _LANES) for c in starts]
                head, body, end = (builder.append_basic_block(name) for name in ("h", "b", "e"))
                before = builder.branch(head).parent
                builder.position_at_end(head)
                k = _phi(builder, before, _int(0))
                sums = [[_phi(builder, before, v) for v in bias] for _ in range(together)]
                builder.cbranch(builder.icmp_signed("<", k, n), body, end)
                builder.position_at_end(body)
                at = builder.add(wo, builder.mul(k, _int(width)))
                w_k = [_load(builder, p_w, builder.add(at, _int(c)), _LANES) for c in starts]
                for i, row in enumerate(sums):
                    place = builder.add(builder.mul(n, _int(r + i)), k)
                    x_k = builder.load(builder.gep(p_x, [place], source_etype=_F), align=4)
                    x_k = _splat(builder, x_k, _LANES)
                    for phi, w in zip(row, w_k, strict=True):
                        phi.add_incoming(_fma(builder, x_k, w, phi), body)
                k.add_incoming(builder.add(k, _int(1)), body)
                builder.branch(head)
                builder.position_at_end(end)
                for i, row in enumerate(sums):
                    for c, phi in zip(starts, row, strict=True):
                        value = _larger(builder, phi, least)
                        _store(builder, p_out, _int((r + i) * width + c), value)
            return context.get_dummy_value()

        return signature, codegen

    return layer


def make_lookup(channels: int, stride: int) -> Callable[..., Any]:
    """`f(x, xo, table, first, nu, nv, uv, a, b)`: bilinear values of a plane at eight points.

    The plane is (nv, nu, channels) at table[first:], its corner nodes lie at 0 and 1; the points'
    coordinates are uv[a:][:8] and uv[b:][:8], held to its inside. Point k's values go to
    x[xo + k * stride:].
    """

    @intrinsic
    def lookup(typing, x, xo, table, first, nu, nv, uv, a, b):
        ip = types.intp
        signature = types.void(x, ip, table, ip, ip, ip, uv, ip, ip)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            x, xo, table, first, nu, nv, uv, a, b = args
            p_x, p_t, p_uv = (
                _pointer(context, builder, sig.args[i], v) for i, v in ((0, x), (2, table), (6, uv))
            )
            iu, au = _place(builder, _load(builder, p_uv, a, _LANES), nu)
            iv, av = _place(builder, _load(builder, p_uv, b, _LANES), nv)
            row = _splat(builder, builder.trunc(nu, _I32), _LANES)
            cell = builder.add(builder.mul(iv, row), iu)
            w11 = builder.fmul(au, av)
            w10, w01 = builder.fsub(au, w11), builder.fsub(av, w11)
            w00 = builder.fsub(builder.fsub(_full(1), au), w01)
            below = builder.mul(nu, _int(channels))
            for k in range(_LANES):
                at = builder.sext(builder.extract_element(cell, ir.Constant(_I32, k)), _I)
                at = builder.add(first, builder.mul(at, _int(channels)))
                # A texel and its right neighbour are one load; each half has its own weight.
                pick = [k] * channels + [_LANES + k] * channels
                mask = ir.Constant(ir.VectorType(_I32, 2 * channels), pick)
                low = _load(builder, p_t, at, 2 * channels)
                high = _load(builder, p_t, builder.add(at, below), 2 * channels)
                both = builder.fmul(low, builder.shuffle_vector(w00, w10, mask), flags=_FAST)
                both = _fma(builder, high, builder.shuffle_vector(w01, w11, mask), both)
                left, right = (
                    builder.shuffle_vector(both, both, ir.Constant(
                        ir.VectorType(_I32, channels), list(range(c, c + channels))))
                    for c in (0, channels)
                )  # fmt: skip
                value = builder.fadd(left, right, flags=_FAST)
                _store(builder, p_x, builder.add(xo, _int(k * stride)), value)
            return context.get_dummy_value()

        return signature, codegen

    return lookup


def _place(builder: Any, u: Any, nodes: Any) -> tuple[Any, Any]:
    """(node, share of the next) of coordinates in 0..1 along `nodes` nodes; NaN becomes 0."""
    u = _larger(builder, u, _full(0))
    u = builder.select(builder.fcmp_ordered("<", u, _full(0.99999)), u, _full(0.99999))
    last = builder.sitofp(builder.sub(nodes, _int(1)), _F)
    u = builder.fmul(u, _splat(builder, last, _LANES))
    node = builder.fptosi(u, ir.VectorType(_I32, _LANES))
    return node, builder.fsub(u, builder.sitofp(node, u.type))


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _phi(builder: Any, before: Any, value: Any) -> Any:
    phi = builder.phi(value.type)
    phi.add_incoming(value, before)
    return phi


def _int(value: int) -> Any:
    return ir.Constant(_I, value)


def _full(value: float) -> Any:
    return ir.Constant(ir.VectorType(_F, _LANES), [value] * _LANES)


_EXP2 = (1.0, 0.69314718, 0.24022651, 0.05550411, 0.00961813, 0.00133336, 0.00015404)
"""Taylor coefficients of 2^f, f in [-1/2, 1/2]: relative error below 1e-6."""


@intrinsic
def _exp(typing, x, xo, n):
    ip = types.intp
    signature = types.void(x, ip, ip)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, xo, n = args
        p_x = _pointer(context, builder, sig.args[0], x)
        whole = ir.VectorType(_I32, _LANES)

        def ints(value: int) -> Any:
            return ir.Constant(whole, [value] * _LANES)

        with cgutils.for_range(builder, n) as loop:
            at = builder.add(xo, builder.mul(loop.index, _int(_LANES)))
            v = _larger(builder, _load(builder, p_x, at, _LANES), _full(-80))
            v = builder.select(builder.fcmp_ordered("<", v, _full(80)), v, _full(80))
            y = builder.fmul(v, _full(1.44269504))
            # Truncation of a positive number rounds y to the nearest whole one.
            k = builder.sub(builder.fptosi(builder.fadd(y, _full(128.5)), whole), ints(128))
            f = builder.fsub(y, builder.sitofp(k, v.type))
            power = _full(_EXP2[-1])
            for c in reversed(_EXP2[:-1]):
                power = _fma(builder, power, f, _full(c))
            scale = builder.bitcast(builder.shl(builder.add(k, ints(127)), ints(23)), v.type)
            _store(builder, p_x, at, builder.fmul(power, scale))
        return context.get_dummy_value()

    return signature, codegen


exp_lanes: Callable[..., Any] = _exp
"""`exp_lanes(x, xo, n)`: x[xo:][:8 n] becomes e^x, x first brought into [-80, 80]."""
