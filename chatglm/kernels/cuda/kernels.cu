// Products with INT4 and INT8 weights, and their expansion, on NVIDIA GPUs from sm_75 (Turing) on.
//
// A weight is (out, in) integers, two's complement, with one scale for each of its `out` rows: value = q * scale.
//   INT8: one byte each.   INT4: two columns in a byte, the even column in the high nibble.
// That is the layout of the published checkpoints; the kernels read it directly, without repacking.
//
// Three families of kernels, named at the end of the file:
//   rows_*_f16, rows_*_bf16   y = x W^T for few rows of x, on tensor cores, the weight read once for all of them
//   rows_*_f32                the same in plain float32
//   dequantize_*              W itself, for many rows (cuBLAS then multiplies)
// All sums are float32 in a fixed order, the scale is applied to the sum, and one rounding gives the result: a row's
// result depends neither on the other rows nor on how many there are.
//
// This file includes nothing, so NVRTC compiles it without a CUDA toolkit. The tests compile it for the CPU:
// their header defines EMULATED and gives the functions of the first section in plain C++.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

struct Half { u16 bits; };
struct BFloat16 { u16 bits; };

// ------------------------------------------------------------------------------------------------ instructions

#ifndef EMULATED

__device__ __forceinline__ float half_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 float_to_half(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// a * b + c on two halves each.
__device__ __forceinline__ u32 fma2(Half, u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// a ^ bits and (a & mask) | bits, one instruction each. In C the compiler sees through them, moves the first behind the
// shifts and into the second, and needs a quarter more instructions.
__device__ __forceinline__ u32 flip(u32 a, u32 bits) {
    u32 result;
    asm("xor.b32 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(bits));
    return result;
}

__device__ __forceinline__ u32 and_or(u32 a, u32 mask, u32 bits) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(a), "r"(mask), "r"(bits));
    return result;
}

// Loads 16 bytes that are read only once, so that they do not evict x from the L1 cache.
__device__ __forceinline__ uint4 load_once(const u8* address) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w) : "l"(address));
    return value;
}

// sum (16 x 8) += a (16 x 16) b (16 x 8), spread over a warp as the PTX manual says for mma.m16n8k16: lane 4 group +
// member holds rows group (a0, a2) and group + 8 (a1, a3) of a, column group of b, and rows group (0, 1) and group + 8
// (2, 3) of sum, in columns 2 member and 2 member + 1.
__device__ __forceinline__ void multiply_tile(Half, float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
    // Turing has half of it: 8 of the 16 inner columns at a time.
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a0), "r"(a1), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a2), "r"(a3), "r"(b1));
#endif
}

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ u32 fma2(BFloat16, u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

__device__ __forceinline__ void multiply_tile(BFloat16, float (&sum)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0,
                                              u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

#endif  // EMULATED

// ------------------------------------------------------------------------------------------------ numbers

__device__ __forceinline__ float to_float(Half value) { return half_to_float(value.bits); }
__device__ __forceinline__ float to_float(BFloat16 value) { return __uint_as_float((u32)value.bits << 16); }
__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ void round_to(Half& to, float value) { to.bits = float_to_half(value); }
__device__ __forceinline__ void round_to(float& to, float value) { to = value; }
__device__ __forceinline__ void round_to(BFloat16& to, float value) {
    const u32 bits = __float_as_uint(value);  // to nearest even; by hand, because Turing has no instruction for it
    to.bits = value != value ? 0x7FC0 : (u16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// A checkpoint's scales are halves, but model.float() and model.bfloat16() cast them along with everything else.
enum ScaleKind { SCALE_HALF = 0, SCALE_BFLOAT16 = 1, SCALE_FLOAT = 2 };

__device__ __forceinline__ float read_scale(const void* scale, u32 kind, u32 row) {
    if (kind == SCALE_HALF) return to_float(((const Half*)scale)[row]);
    if (kind == SCALE_BFLOAT16) return to_float(((const BFloat16*)scale)[row]);
    return ((const float*)scale)[row];
}

// Integers become floats without a conversion instruction (a quarter of the rate of the others): their bits, the sign
// bit flipped, are put into the mantissa of a power of two, and one addition or fma subtracts what that added.

// Eight columns of one row -> float32, in order.
template <int BITS> struct EightFloats;

template <> struct EightFloats<4> {
    static __device__ __forceinline__ void load(float (&q)[8], const u8* columns) {
        const u32 word = *(const u32*)columns;
#pragma unroll
        for (int column = 0; column < 8; column++) {
            const int place = 8 * (column / 2) + (column % 2 ? 0 : 4);  // of the nibble in the word
            const int shift = place < 20 ? 0 : 12;                      // the mantissa has 23 bits
            const int bit = place - shift;
            const u32 value = ((word >> shift) & (0xFu << bit)) ^ ((8u << bit) | 0x4B000000u);  // 2^23 + 2^bit (q + 8)
            q[column] = fmaf(__uint_as_float(value), 1.0f / (1 << bit), -(8388608.0f / (1 << bit) + 8));
        }
    }
};

template <> struct EightFloats<8> {
    static __device__ __forceinline__ void load(float (&q)[8], const u8* columns) {
        const uint2 words = *(const uint2*)columns;
#pragma unroll
        for (int column = 0; column < 8; column++) {
            const u32 word = (column < 4 ? words.x : words.y) ^ 0x80808080u;
            const u32 value = __byte_perm(word, 0x4B000000u, 0x7440 + column % 4);  // 2^23 + (q + 128)
            q[column] = __uint_as_float(value) - (8388608.0f + 128);
        }
    }
};

__device__ __forceinline__ u32 word_of(const uint4& four, int i) {
    return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// Two halves 1024, two bfloat16s 128. In memory and not `const`, so that the compiler keeps them in registers: as
// literals they would be loaded again for every use, one instruction in seven of the inner loop.
__constant__ u32 TWICE_1024 = 0x64006400u;
__constant__ u32 TWICE_128 = 0x43004300u;

// 16 bytes of one row -> pairs of halves or bfloat16s for the tensor cores, four pairs for every eight columns, and the
// same eight columns of x in the order of those pairs. The order of the inner dimension does not matter to a product as
// long as both factors share it, so it is the one that is cheapest to produce.
template <int BITS, class T> struct Pairs;

template <class T> struct PairsOfInt4 {
    // Columns (0, 4), (1, 5), (2, 6) and (3, 7) lie 16 bits apart in a word, as the two halves of a pair do.
    static __device__ __forceinline__ void order(u32 (&pairs)[4], uint4 x) {
        pairs[0] = __byte_perm(x.x, x.z, 0x5410);
        pairs[1] = __byte_perm(x.x, x.z, 0x7632);
        pairs[2] = __byte_perm(x.y, x.w, 0x5410);
        pairs[3] = __byte_perm(x.y, x.w, 0x7632);
    }
};

template <> struct Pairs<4, Half> : PairsOfInt4<Half> {
    static __device__ __forceinline__ void unpack(u32 (&pairs)[4], const uint4& four, int eight) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const u32 word = flip(word_of(four, eight), 0x88888888u) >> 4 * i;
            const u32 odd = and_or(word, 0x000F000Fu, TWICE_1024);        // 1024 + (q + 8)
            const u32 even = and_or(word, 0x00F000F0u, TWICE_1024);       // 1024 + 16 (q + 8)
            pairs[i] = fma2(Half(), even, 0x2C002C00u, 0xD480D480u);     // / 16 - 72
            pairs[i + 1] = fma2(Half(), odd, 0x3C003C00u, 0xE408E408u);  // * 1 - 1032
        }
    }
};

template <class T> struct PairsOfInt8 {
    static __device__ __forceinline__ void order(u32 (&pairs)[4], uint4 x) {
        pairs[0] = x.x, pairs[1] = x.y, pairs[2] = x.z, pairs[3] = x.w;
    }
};

template <> struct Pairs<8, Half> : PairsOfInt8<Half> {
    static __device__ __forceinline__ void unpack(u32 (&pairs)[4], const uint4& four, int eight) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 word = word_of(four, 2 * eight + i / 2) ^ 0x80808080u;
            const u32 value = __byte_perm(word, 0x64646464u, i % 2 ? 0x4342 : 0x4140);  // 1024 + (q + 128)
            pairs[i] = fma2(Half(), value, 0x3C003C00u, 0xE480E480u);                   // * 1 - 1152
        }
    }
};

#if __CUDA_ARCH__ >= 800
template <> struct Pairs<4, BFloat16> : PairsOfInt4<BFloat16> {
    static __device__ __forceinline__ void unpack(u32 (&pairs)[4], const uint4& four, int eight) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int shift = i % 2 ? 4 * (i - 1) : 4 * (i + 1);
            const u32 word = flip(word_of(four, eight), 0x88888888u) >> shift;
            const u32 value = and_or(word, 0x000F000Fu, TWICE_128);        // 128 + (q + 8)
            pairs[i] = fma2(BFloat16(), value, 0x3F803F80u, 0xC308C308u);  // * 1 - 136
        }
    }
};

template <> struct Pairs<8, BFloat16> : PairsOfInt8<BFloat16> {
    static __device__ __forceinline__ void unpack(u32 (&pairs)[4], const uint4& four, int eight) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // A bfloat16 has 7 bits of mantissa: 128 + the low 7 bits, less 128 where q >= 0 and 256 where q < 0.
            const u32 bytes = __byte_perm(word_of(four, 2 * eight + i / 2), 0, i % 2 ? 0x4342 : 0x4140);
            const u32 low = and_or(bytes, 0x007F007Fu, TWICE_128);
            const u32 sign = and_or(bytes, 0x00800080u, TWICE_128);
            pairs[i] = fma2(BFloat16(), sign, 0xBF80BF80u, low);
        }
    }
};
#endif

// ------------------------------------------------------------------------------------------------ products

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;

// y (rows, out) = x (rows, in) W^T on tensor cores; in is a multiple of 32, rows at most 8 TILES_X, x and weight lie on
// 16-byte boundaries. A block computes 16 TILES_OUT columns of y. W is the left factor of the tiles, 16 of its rows by
// 16 inner columns; x^T, 8 rows of x, the right one. The warps split the inner dimension and add up at the end.
template <int BITS, class T, int TILES_OUT, int TILES_X>
__device__ __forceinline__ void multiply_rows(T* __restrict__ y, const T* __restrict__ x,
                                              const u8* __restrict__ weight, const void* __restrict__ scale,
                                              u32 scale_kind, u32 rows, u32 out, u32 in) {
    constexpr int COLUMNS = 128 / BITS;      // in the 16 bytes that a lane loads at once
    constexpr int LOADS = 2;                 // four lanes x 2 loads = 128 bytes of a row, a whole cache line
    constexpr int STEP = LOADS * 4 * COLUMNS;
    constexpr int TILE = 16 * TILES_OUT;
    constexpr int STRIDE = TILE + 4;         // spreads a warp's sums over all banks of the shared memory
    __shared__ float sums[WARPS][8 * TILES_X][STRIDE];

    const u32 warp = threadIdx.x / 32, group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    const u32 first = blockIdx.x * TILE;
    u32 column = warp * STEP + member * COLUMNS;  // where this lane's next load begins

    const u8* from[TILES_OUT][2];
#pragma unroll
    for (int tile = 0; tile < TILES_OUT; tile++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 row = min(first + 16 * tile + 8 * half + group, out - 1);  // rows beyond the last are not stored
            from[tile][half] = weight + (size_t)row * (in / 8 * BITS) + column / 8 * BITS;
        }
    const T* from_x[TILES_X];
    u32 end[TILES_X];  // 0 for rows of x that do not exist
#pragma unroll
    for (int tile = 0; tile < TILES_X; tile++) {
        const u32 row = 8 * tile + group;
        from_x[tile] = x + (size_t)row * in + column;
        end[tile] = row < rows ? in : 0;
    }

    struct Weights { uint4 pieces[LOADS][TILES_OUT][2]; } ahead;  // loaded one step before it is multiplied
    auto load_ahead = [&](u32 column) {
#pragma unroll
        for (int i = 0; i < LOADS; i++)
#pragma unroll
            for (int tile = 0; tile < TILES_OUT; tile++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    uint4& piece = ahead.pieces[i][tile][half];
                    piece = make_uint4(0, 0, 0, 0);
                    if (column + 4 * i * COLUMNS < in) piece = load_once(from[tile][half] + 64 * i);
                }
#pragma unroll
        for (int tile = 0; tile < TILES_OUT; tile++)
#pragma unroll
            for (int half = 0; half < 2; half++) from[tile][half] += WARPS * STEP / 8 * BITS;
    };

    float sum[TILES_OUT][TILES_X][4] = {};
    load_ahead(column);
    for (u32 start = warp * STEP; start < in; start += WARPS * STEP) {  // the same for the whole warp, as mma demands
        const Weights now = ahead;
        load_ahead(column + WARPS * STEP);
#pragma unroll
        for (int i = 0; i < LOADS; i++)
#pragma unroll
            for (int eight = 0; eight < COLUMNS / 8; eight++) {
                u32 a[TILES_OUT][2][4];
#pragma unroll
                for (int tile = 0; tile < TILES_OUT; tile++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        Pairs<BITS, T>::unpack(a[tile][half], now.pieces[i][tile][half], eight);
#pragma unroll
                for (int tile_x = 0; tile_x < TILES_X; tile_x++) {
                    uint4 columns_of_x = make_uint4(0, 0, 0, 0);
                    if (column + 4 * i * COLUMNS < end[tile_x])
                        columns_of_x = *(const uint4*)(from_x[tile_x] + 4 * i * COLUMNS + 8 * eight);
                    u32 b[4];
                    Pairs<BITS, T>::order(b, columns_of_x);
#pragma unroll
                    for (int tile = 0; tile < TILES_OUT; tile++) {
                        const u32(&low)[4] = a[tile][0], (&high)[4] = a[tile][1];
                        multiply_tile(T(), sum[tile][tile_x], low[0], high[0], low[1], high[1], b[0], b[1]);
                        multiply_tile(T(), sum[tile][tile_x], low[2], high[2], low[3], high[3], b[2], b[3]);
                    }
                }
            }
        column += WARPS * STEP;
#pragma unroll
        for (int tile = 0; tile < TILES_X; tile++) from_x[tile] += WARPS * STEP;
    }

#pragma unroll
    for (int tile = 0; tile < TILES_OUT; tile++)
#pragma unroll
        for (int tile_x = 0; tile_x < TILES_X; tile_x++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                sums[warp][8 * tile_x + 2 * member + i % 2][16 * tile + 8 * (i / 2) + group] = sum[tile][tile_x][i];
    __syncthreads();
    for (u32 i = threadIdx.x; i < rows * TILE; i += THREADS) {
        const u32 row = i / TILE, column = i % TILE;
        if (first + column >= out) continue;
        float total = 0;
#pragma unroll
        for (int from = 0; from < WARPS; from++) total += sums[from][row][column];
        round_to(y[(size_t)row * out + first + column], total * read_scale(scale, scale_kind, first + column));
    }
}

// The same in float32 without tensor cores; a warp takes ROWS rows of x (by blockIdx.y) and FLOAT_OUT columns of y.
constexpr int FLOAT_OUT = 4;

template <int BITS, int ROWS>
__device__ __forceinline__ void multiply_rows_in_float(float* __restrict__ y, const float* __restrict__ x,
                                                       const u8* __restrict__ weight, const void* __restrict__ scale,
                                                       u32 scale_kind, u32 rows, u32 out, u32 in) {
    const u32 lane = threadIdx.x % 32;
    const u32 first = (blockIdx.x * WARPS + threadIdx.x / 32) * FLOAT_OUT;
    const u32 first_row = blockIdx.y * ROWS;
    if (first >= out) return;  // the whole warp; no barrier follows
    const u8* weight_row[FLOAT_OUT];
#pragma unroll
    for (int i = 0; i < FLOAT_OUT; i++) weight_row[i] = weight + (size_t)min(first + i, out - 1) * (in / 8 * BITS);

    float sum[ROWS][FLOAT_OUT] = {};
#pragma unroll(ROWS > 2 ? 1 : 4)
    for (u32 column = 8 * lane; column < in; column += 8 * 32) {
        float q[FLOAT_OUT][8];
#pragma unroll
        for (int i = 0; i < FLOAT_OUT; i++) EightFloats<BITS>::load(q[i], weight_row[i] + column / 8 * BITS);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4* columns_of_x = (const float4*)(x + (size_t)min(first_row + r, rows - 1) * in + column);
            const float4 left = columns_of_x[0], right = columns_of_x[1];
#pragma unroll
            for (int i = 0; i < FLOAT_OUT; i++) {
                float total = sum[r][i];
                total = fmaf(q[i][0], left.x, total);
                total = fmaf(q[i][1], left.y, total);
                total = fmaf(q[i][2], left.z, total);
                total = fmaf(q[i][3], left.w, total);
                total = fmaf(q[i][4], right.x, total);
                total = fmaf(q[i][5], right.y, total);
                total = fmaf(q[i][6], right.z, total);
                sum[r][i] = fmaf(q[i][7], right.w, total);
            }
        }
    }

#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < FLOAT_OUT; i++) {
            float total = sum[r][i];
#pragma unroll
            for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, distance);
            if (lane == 0 && first_row + r < rows && first + i < out)
                y[(size_t)(first_row + r) * out + first + i] = total * read_scale(scale, scale_kind, first + i);
        }
}

// W (out, in): the product of q and scale, rounded once. A block expands one row. `aligned`: in is a multiple of 32 and
// both addresses lie on 16-byte boundaries.
template <int BITS, class T>
__device__ __forceinline__ void dequantize(T* __restrict__ y, const u8* __restrict__ weight,
                                           const void* __restrict__ scale, u32 scale_kind, u32 in, u32 aligned) {
    const float factor = read_scale(scale, scale_kind, blockIdx.x);
    weight += (size_t)blockIdx.x * (in * BITS / 8);
    y += (size_t)blockIdx.x * in;
    if (aligned) {
        for (u32 column = 8 * threadIdx.x; column < in; column += 8 * THREADS) {
            float q[8];
            EightFloats<BITS>::load(q, weight + column / 8 * BITS);
            struct alignas(16) { T values[8]; } eight;
#pragma unroll
            for (int i = 0; i < 8; i++) round_to(eight.values[i], q[i] * factor);
            const uint4* from = (const uint4*)&eight;
#pragma unroll
            for (int i = 0; i < (int)(sizeof(eight) / 16); i++) ((uint4*)(y + column))[i] = from[i];
        }
    } else {
        for (u32 i = threadIdx.x; i < in * BITS / 8; i += THREADS) {
            const int byte = (signed char)weight[i];
            if (BITS == 8) {
                round_to(y[i], byte * factor);
            } else {
                round_to(y[2 * i], (byte >> 4) * factor);
                round_to(y[2 * i + 1], ((int)((u32)byte << 28) >> 28) * factor);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------ kernels

#define DEQUANTIZE(BITS, TYPE, NAME)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS) dequantize_int##BITS##_##NAME(                               \
        TYPE* y, const u8* weight, const void* scale, u32 scale_kind, u32 in, u32 aligned) {                           \
        dequantize<BITS, TYPE>(y, weight, scale, scale_kind, in, aligned);                                             \
    }

// The number at the end of a name: rows of x per block. BLOCKS: how many blocks should at least fit on a
// multiprocessor, which limits the registers.
#define ROWS(BITS, TYPE, NAME, TILES_OUT, TILES_X, COUNT, BLOCKS)                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) rows_int##BITS##_##NAME##_##COUNT(                   \
        TYPE* y, const TYPE* x, const u8* weight, const void* scale, u32 scale_kind, u32 rows, u32 out, u32 in) {      \
        multiply_rows<BITS, TYPE, TILES_OUT, TILES_X>(y, x, weight, scale, scale_kind, rows, out, in);                 \
    }

#define ROWS_IN_FLOAT(BITS, COUNT)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS) rows_int##BITS##_f32_##COUNT(                                \
        float* y, const float* x, const u8* weight, const void* scale, u32 scale_kind, u32 rows, u32 out, u32 in) {    \
        multiply_rows_in_float<BITS, COUNT>(y, x, weight, scale, scale_kind, rows, out, in);                           \
    }

#define ROWS_8_16_32(BITS, TYPE, NAME)                                                                                 \
    ROWS(BITS, TYPE, NAME, 1, 1, 8, 3)                                                                                 \
    ROWS(BITS, TYPE, NAME, 2, 2, 16, 1)                                                                                \
    ROWS(BITS, TYPE, NAME, 2, 4, 32, 1)

#define KERNELS(BITS)                                                                                                  \
    DEQUANTIZE(BITS, Half, f16)                                                                                        \
    DEQUANTIZE(BITS, BFloat16, bf16)                                                                                   \
    DEQUANTIZE(BITS, float, f32)                                                                                       \
    ROWS_8_16_32(BITS, Half, f16)                                                                                      \
    ROWS_IN_FLOAT(BITS, 1)                                                                                             \
    ROWS_IN_FLOAT(BITS, 2)                                                                                             \
    ROWS_IN_FLOAT(BITS, 4)                                                                                             \
    ROWS_IN_FLOAT(BITS, 8)

KERNELS(4)
KERNELS(8)
#if __CUDA_ARCH__ >= 800
ROWS_8_16_32(4, BFloat16, bf16)
ROWS_8_16_32(8, BFloat16, bf16)
#endif
