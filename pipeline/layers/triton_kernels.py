"""Products of few tokens by quantized weights, as Triton kernels: one launch where torch's operators need several.

Each program makes ROWS outputs of T tokens: it goes along the rows of the weight, decodes as it loads, and adds up in
float32 or int32. Imported only where a GPU is to run them (`fused.py` says how they are called and when).

A weight is decoded as the layer's `dequantized` does it, rounded to the same dtypes on the way, so that nothing but the
order of the sums differs.
"""

import triton
import triton.language as tl

STAGES = tl.constexpr(3)
"""Of a loop's loads, how many are under way at once, plus one."""


@triton.jit
def _tokens(x, first, tokens, places, FEATURES: tl.constexpr, T: tl.constexpr):
    """x at `places` [1, P] of T tokens from `first` on: [T, P], zero beyond the end."""
    rows = first + tl.arange(0, T)[:, None]
    return tl.load(x + rows * FEATURES + places, (rows < tokens) & (places < FEATURES), 0.0)


@triton.jit
def _write(y, values, bias, first, tokens, rows, outputs, T: tl.constexpr):
    """Stores float32 [T, ROWS], and the bias [outputs] if there is one, as y [tokens, outputs]."""
    if bias is not None:
        values += tl.load(bias + rows, rows < outputs, 0.0).to(tl.float32)[None, :]
    places = first + tl.arange(0, T)[:, None]
    inside = (places < tokens) & (rows[None, :] < outputs)
    tl.store(y + places * outputs + rows[None, :], values.to(y.dtype.element_ty), inside)


@triton.jit
def _times(sums, x, weight):
    """`sums` [T, ROWS, P] and the products of x [T, P] by weights [ROWS, P]."""
    return sums + x.to(tl.float32)[:, None, :] * weight.to(tl.float32)[None, :, :]


@triton.jit
def _groups(start, RATIO: tl.constexpr, UNITS: tl.constexpr):
    """Which groups of RATIO units those from `start` on are in: each group once where `_spread` can repeat them."""
    if UNITS % RATIO == 0:
        return start // RATIO + tl.arange(0, UNITS // RATIO)[None, :]
    else:
        return (start + tl.arange(0, UNITS)[None, :]) // RATIO


@triton.jit
def _spread(values, RATIO: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """What was found for `_groups` [ROWS, groups], for each unit: [ROWS, UNITS]."""
    if UNITS % RATIO == 0:
        repeated = tl.broadcast_to(values[:, :, None], (ROWS, UNITS // RATIO, RATIO))
        return tl.reshape(repeated, (ROWS, UNITS))
    else:
        return values


@triton.jit
def _zero_points(zero, row, group, inside, BITS: tl.constexpr, GROUPS: tl.constexpr):
    """Zero points packed along the rows, unsigned as stored: int32 [ROWS, groups]."""
    bit = row * BITS
    word, shift = bit // 32, (bit % 32).to(tl.uint32)
    found = tl.load(zero + word * GROUPS + group, inside, 0).to(tl.uint32, bitcast=True) >> shift
    if 32 % BITS != 0:
        across = shift > 32 - BITS
        after = tl.load(zero + (word + 1) * GROUPS + group, inside & across, 0).to(tl.uint32, bitcast=True)
        found |= tl.where(across, after << ((32 - shift) & 31), 0)
    return (found & ((1 << BITS) - 1)).to(tl.int32)


@triton.jit(do_not_specialize=["tokens", "outputs"])
def packed_product(
    x, weight, scale, zero, bias, y, tokens, outputs, FEATURES: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Integers packed into int32 [outputs, words], scales [outputs, groups] of GROUP inputs, zero points or None."""
    LENGTH: tl.constexpr = 8 if BITS == 3 else 8 // BITS  # values that fill whole bytes: a unit
    COUNT: tl.constexpr = (FEATURES + LENGTH - 1) // LENGTH
    STRIDE: tl.constexpr = (FEATURES * BITS + 31) // 32 * 4
    GROUPS: tl.constexpr = FEATURES // GROUP
    RATIO: tl.constexpr = UNITS if GROUPS == 1 else GROUP // LENGTH
    first = tl.program_id(1) * T
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = rows.to(tl.int64)[:, None]
    octets = weight.to(tl.pointer_type(tl.uint8)) + row * STRIDE
    sums = tl.zeros((T, ROWS, UNITS), tl.float32)
    for start in tl.range(0, COUNT, UNITS, num_stages=STAGES):
        units = start + tl.arange(0, UNITS)[None, :]
        inside = (row < outputs) & (units < COUNT)
        if BITS == 3:
            code = tl.zeros((ROWS, UNITS), tl.int32)
            for part in tl.static_range(3):
                byte = units * 3 + part
                code |= tl.load(octets + byte, inside & (byte < STRIDE), 0).to(tl.int32) << (8 * part)
        else:
            code = tl.load(octets + units, inside, 0).to(tl.int32)
        group = _groups(start, RATIO, UNITS) if GROUPS > 1 else tl.zeros((1, 1), tl.int32)
        known = (row < outputs) & (group < GROUPS)
        step = _spread(tl.load(scale + row * GROUPS + group, known, 0.0), RATIO, ROWS, UNITS)
        if zero is None:
            origin = 1 << (BITS - 1)
        else:
            origin = _spread(_zero_points(zero, row, group, known, BITS, GROUPS), RATIO, ROWS, UNITS)
        for part in tl.static_range(LENGTH):
            integer = ((code >> (part * BITS)) & ((1 << BITS) - 1)) - origin
            value = (integer.to(tl.float32) * step.to(tl.float32)).to(step.dtype)
            sums = _times(sums, _tokens(x, first, tokens, units * LENGTH + part, FEATURES, T), value)
    _write(y, tl.sum(sums, 2), bias, first, tokens, rows, outputs, T)


@triton.jit(do_not_specialize=["tokens", "outputs"])
def nf4_product(
    x, weight, scale, scale_scale, mean, table, bias, y, tokens, outputs, FEATURES: tl.constexpr, BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Codes of 4 bits into `table` [16], times the maxima of blocks of BLOCK inputs; rows are whole blocks of bytes.

    `scale` holds the maxima, or integers for them where there are `scale_scale` [blocks / SCALE_BLOCK] and `mean` [1].
    """
    COUNT: tl.constexpr = FEATURES // 2
    STRIDE: tl.constexpr = (FEATURES + 7) // 8 * 4
    BLOCKS: tl.constexpr = FEATURES // BLOCK
    RATIO: tl.constexpr = BLOCK // 2
    first = tl.program_id(1) * T
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = rows.to(tl.int64)[:, None]
    octets = weight.to(tl.pointer_type(tl.uint8)) + row * STRIDE
    sums = tl.zeros((T, ROWS, UNITS), tl.float32)
    for start in range(0, COUNT, UNITS):
        units = start + tl.arange(0, UNITS)[None, :]
        code = tl.load(octets + units, (row < outputs) & (units < COUNT), 0).to(tl.int32)
        group = _groups(start, RATIO, UNITS)
        known = (row < outputs) & (group < BLOCKS)
        block = row * BLOCKS + group
        peak = tl.load(scale + block, known, 0).to(tl.float32)
        if scale_scale is not None:
            step = tl.load(scale_scale + block // SCALE_BLOCK, known, 0.0).to(tl.float32)
            peak = tl.maximum(peak * step + tl.load(mean).to(tl.float32), 0.0)
        peak = _spread(peak, RATIO, ROWS, UNITS)
        for part in tl.static_range(2):
            value = (tl.load(table + ((code >> (4 * part)) & 15)) * peak).to(x.dtype.element_ty)
            sums = _times(sums, _tokens(x, first, tokens, units * 2 + part, FEATURES, T), value)
    _write(y, tl.sum(sums, 2), bias, first, tokens, rows, outputs, T)


@triton.jit(do_not_specialize=["tokens", "outputs"])
def float8_product(
    x, weight, scale, bias, y, tokens, outputs, FEATURES: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """E4M3 [outputs, FEATURES] and a scale [outputs, 1] a row."""
    first = tl.program_id(1) * T
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = rows.to(tl.int64)[:, None]
    step = tl.load(scale + row, row < outputs, 0.0)
    sums = tl.zeros((T, ROWS, UNITS), tl.float32)
    for start in tl.range(0, FEATURES, UNITS, num_stages=STAGES):
        places = start + tl.arange(0, UNITS)[None, :]
        inside = (row < outputs) & (places < FEATURES)
        code = tl.load(weight + row * FEATURES + places, inside, 0.0)
        value = (code.to(tl.float32) * step.to(tl.float32)).to(step.dtype)
        sums = _times(sums, _tokens(x, first, tokens, places, FEATURES, T), value)
    _write(y, tl.sum(sums, 2), bias, first, tokens, rows, outputs, T)


@triton.jit
def _larger(left, right):
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _peaks(x, first, tokens, FEATURES: tl.constexpr, T: tl.constexpr, UNITS: tl.constexpr):
    """Largest magnitude of each of T tokens from `first` on: float32 [T]. NaN is larger than all."""
    peaks = tl.zeros((T, UNITS), tl.float32)
    for start in tl.range(0, FEATURES, UNITS, num_stages=STAGES):
        values = _tokens(x, first, tokens, start + tl.arange(0, UNITS)[None, :], FEATURES, T)
        peaks = _larger(peaks, tl.abs(values.to(tl.float32)))
    return tl.reduce(peaks, 1, _larger)


@triton.jit
def _own_or_shared_peaks(x, first, tokens, SHARED: tl.constexpr, FEATURES: tl.constexpr, T: tl.constexpr,
                         UNITS: tl.constexpr):  # fmt: skip
    """`_peaks`; unless SHARED is 0, each token has the largest of all, of which there are at most so many."""
    if SHARED == 0:
        peaks = _peaks(x, first, tokens, FEATURES, T, UNITS)
    else:
        peaks = tl.zeros((T,), tl.float32)
        for start in range(0, SHARED, T):
            peaks = _larger(peaks, _peaks(x, start, tokens, FEATURES, T, UNITS))
        peaks = tl.zeros((T,), tl.float32) + tl.reduce(peaks, 0, _larger)
    return peaks


@triton.jit(do_not_specialize=["tokens", "outputs"])
def int8_product(
    x, weight, scale, step, bias, y, tokens, outputs, FEATURES: tl.constexpr, SHARED: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """W8A8, weights [outputs, FEATURES] with `scale` [outputs, 1]; activations at `step` [1], or each token's own."""
    first = tl.program_id(1) * T
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = rows.to(tl.int64)[:, None]
    if step is None:
        peaks = _own_or_shared_peaks(x, first, tokens, SHARED, FEATURES, T, UNITS)
        steps = tl.div_rn(_larger(peaks, 1e-30), 127.5)
    else:
        steps = tl.zeros((T,), tl.float32) + tl.load(step).to(tl.float32)
    sums = tl.zeros((T, ROWS, UNITS), tl.int32)
    for start in tl.range(0, FEATURES, UNITS, num_stages=STAGES):
        places = start + tl.arange(0, UNITS)[None, :]
        inside = (row < outputs) & (places < FEATURES)
        integers = tl.load(weight + row * FEATURES + places, inside, 0)
        values = _tokens(x, first, tokens, places, FEATURES, T).to(tl.float32)
        values = tl.minimum(tl.maximum(tl.div_rn(values, steps[:, None]), -128.0), 127.0)
        rounded = (values + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest, half to even
        sums += rounded.to(tl.int32)[:, None, :] * integers.to(tl.int32)[None, :, :]
    found = tl.sum(sums, 2).to(tl.float32) * tl.load(scale + rows, rows < outputs, 0.0).to(tl.float32)[None, :]
    _write(y, found * steps[:, None], bias, first, tokens, rows, outputs, T)


@triton.jit
def _to_e4m3(values):
    """float32 up to 448 -> the nearest numbers of E4M3, half to even, still in float32.

    To add 1.5 * 2^(e + 20) to a number of [2^e, 2^(e + 1)) cuts it to steps of 2^(e - 3); e is -6 at least.
    """
    power = tl.maximum(values.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
    large = ((power + (20 << 23)) | 0x400000).to(tl.float32, bitcast=True)
    return (values + large) - large


@triton.jit(do_not_specialize=["tokens", "outputs"])
def float8_tokens_product(
    x, weight, scale, bias, y, tokens, outputs, FEATURES: tl.constexpr, SHARED: tl.constexpr, EPS: tl.constexpr,
    T: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """E4M3 weights as `float8_product`, and activations cast to E4M3 at each token's own scale, in the dtype of x."""
    first = tl.program_id(1) * T
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = rows.to(tl.int64)[:, None]
    peaks = _own_or_shared_peaks(x, first, tokens, SHARED, FEATURES, T, UNITS)
    steps = tl.div_rn(peaks, 448.0).to(x.dtype.element_ty).to(tl.float32)
    steps = tl.where(steps == 0.0, EPS, steps)
    steps = tl.where(steps < float("inf"), steps, float("nan"))
    sums = tl.zeros((T, ROWS, UNITS), tl.float32)
    for start in tl.range(0, FEATURES, UNITS, num_stages=STAGES):
        places = start + tl.arange(0, UNITS)[None, :]
        inside = (row < outputs) & (places < FEATURES)
        code = tl.load(weight + row * FEATURES + places, inside, 0.0)
        values = _tokens(x, first, tokens, places, FEATURES, T).to(tl.float32)
        values = tl.div_rn(values, steps[:, None]).to(x.dtype.element_ty).to(tl.float32)
        sums = _times(sums, _to_e4m3(tl.minimum(tl.maximum(values, -448.0), 448.0)), code)
    found = tl.sum(sums, 2) * steps[:, None]
    found *= tl.load(scale + rows, rows < outputs, 0.0).to(tl.float32)[None, :]
    _write(y, found, bias, first, tokens, rows, outputs, T)
