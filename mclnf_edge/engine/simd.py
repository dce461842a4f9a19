"""Eight-wide float32 operations for numba kernels, written as LLVM vector code.

LLVM turns them into AVX on x86-64 and NEON on aarch64. numba's own loops over short rows miss the
registers and were 4-6 times slower here (tools/bench.py has the figures).
All offsets count floats; arrays are flat, C-contiguous float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_F = ir.FloatType()
_I = ir.IntType(64)
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
    undefined = ir.Constant(ir.VectorType(_F, lanes), ir.Undefined)
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
