"""The two Triton kernels: every expert's rows times its matrix, and the gradient of every expert's matrix.

Only litgpt_moe/kernels/triton.py imports this file, where Triton is installed.
"""

import triton
import triton.language as tl


@triton.jit
def rows_kernel(
    x,
    rows,
    w,
    y,
    ends,
    tile_ends,
    tile_experts,
    n_expert,
    n_out,
    n_in,
    x_stride,
    e_stride,
    o_stride,
    i_stride,
    GATHER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of y[r] = w[expert of r] @ x[rows[r]]: rows of one expert times columns of its outputs."""
    tiles_across = (n_out + BLOCK_O - 1) // BLOCK_O
    tile = tl.program_id(0) // tiles_across  # neighbouring programs read the same rows of x
    expert = tl.load(tile_experts + tile)
    if expert >= n_expert:  # no tile for this program: the grid is sized for the worst load
        return
    first_tile = tl.load(tile_ends + expert - 1, mask=expert > 0, other=0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    row_R = start + (tile - first_tile) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row_R1 = (row_R < tl.load(ends + expert))[:, None]
    column_O = tl.program_id(0) % tiles_across * BLOCK_O + tl.arange(0, BLOCK_O)
    is_column_1O = (column_O < n_out)[None, :]
    source_R = row_R
    if GATHER:
        source_R = tl.load(rows + row_R, mask=row_R < tl.load(ends + expert), other=0)
    inner_I = tl.arange(0, BLOCK_I)
    x_RI = x + source_R[:, None] * x_stride + inner_I[None, :]
    w_IO = w + expert * e_stride + inner_I[:, None] * i_stride + column_O[None, :] * o_stride
    y_RO = tl.full((BLOCK_R, BLOCK_O), 0.0, tl.float32)
    for at in range(0, n_in, BLOCK_I):
        left = n_in - at
        x_tile = tl.load(x_RI, mask=is_row_R1 & (inner_I < left)[None, :], other=0.0)
        w_tile = tl.load(w_IO, mask=(inner_I < left)[:, None] & is_column_1O, other=0.0)
        y_RO = tl.dot(x_tile, w_tile, y_RO, input_precision=PRECISION)
        x_RI += BLOCK_I
        w_IO += BLOCK_I * i_stride
    place_RO = y + row_R[:, None] * n_out + column_O[None, :]
    tl.store(place_RO, y_RO.to(y.dtype.element_ty), mask=is_row_R1 & is_column_1O)


@triton.jit
def matrices_kernel(
    y,
    y_rows,
    x,
    x_rows,
    w,
    ends,
    n_out,
    n_in,
    y_stride,
    x_stride,
    GATHER_Y: tl.constexpr,
    GATHER_X: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of w[e] = sum of y[y_rows[r]]^T x[x_rows[r]] over the rows r of expert e, zero without any."""
    expert = tl.program_id(1).to(tl.int64)
    tiles_across = (n_in + BLOCK_I - 1) // BLOCK_I
    column_O = tl.program_id(0) // tiles_across * BLOCK_O + tl.arange(0, BLOCK_O)
    column_I = tl.program_id(0) % tiles_across * BLOCK_I + tl.arange(0, BLOCK_I)
    is_column_O1, is_column_1I = (column_O < n_out)[:, None], (column_I < n_in)[None, :]
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    w_OI = tl.full((BLOCK_O, BLOCK_I), 0.0, tl.float32)
    for at in range(start, end, BLOCK_R):
        row_R = (at + tl.arange(0, BLOCK_R)).to(tl.int64)
        is_row_R = row_R < end
        y_R, x_R = row_R, row_R
        if GATHER_Y:
            y_R = tl.load(y_rows + row_R, mask=is_row_R, other=0)
        if GATHER_X:
            x_R = tl.load(x_rows + row_R, mask=is_row_R, other=0)
        y_OR = y + column_O[:, None] + y_R[None, :] * y_stride
        x_RI = x + x_R[:, None] * x_stride + column_I[None, :]
        y_tile = tl.load(y_OR, mask=is_column_O1 & is_row_R[None, :], other=0.0)
        x_tile = tl.load(x_RI, mask=is_row_R[:, None] & is_column_1I, other=0.0)
        w_OI = tl.dot(y_tile, x_tile, w_OI, input_precision=PRECISION)
    place_OI = w + (expert * n_out + column_O[:, None]) * n_in + column_I[None, :]
    tl.store(place_OI, w_OI.to(w.dtype.element_ty), mask=is_column_O1 & is_column_1I)
