// Runs CUDA kernels on the CPU, for tests: include this, then the .cu file, and call emulate().
//
// Each CUDA thread is a coroutine. It runs until it needs others of its warp (shuffle, tensor-core product) or of its
// block (__syncthreads), and goes on once they have come as far. If threads wait for others that never come, the
// process ends with a message.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <ucontext.h>

#define EMULATED
#define __device__
#define __global__
#define __constant__ static
#define __shared__ static  // blocks run one after the other
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct Place { unsigned x, y, z; };

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }

inline float __uint_as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
inline uint32_t __float_as_uint(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }

inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) result |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    return result;
}

// ------------------------------------------------------------------------------- threads

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "CUDA emulation: %s\n", what);
    abort();
}

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[65536]};
    bool done;
    unsigned with_warp, with_block;  // how often it has met the others
    uint32_t given[2][8];            // what it shows to its warp; two in turns, for one thread may be one meeting ahead
};

inline std::vector<Thread> threads;
inline ucontext_t scheduler;
inline Thread* current;
inline std::function<void()> kernel;

inline void leave() { swapcontext(&current->context, &scheduler); }

inline void run() {
    kernel();
    current->done = true;
    leave();
}

inline bool ready(const Thread& thread, size_t index) {
    const size_t warp = index / 32 * 32;
    for (size_t i = warp; i < std::min(warp + 32, threads.size()); i++)
        if (threads[i].with_warp < thread.with_warp) return false;
    for (const Thread& other : threads)
        if (!other.done && other.with_block < thread.with_block) return false;
    return true;
}

// Shows `count` words to the warp; returns the warp's threads, all of which have shown theirs in given[turn].
inline Thread* meet_warp(const uint32_t* words, int count, int& turn) {
    turn = current->with_warp++ % 2;
    std::copy_n(words, count, current->given[turn]);
    leave();
    return &threads[(current - threads.data()) / 32 * 32];
}

}  // namespace emulation

inline Place threadIdx, blockIdx;

inline void __syncthreads() {
    emulation::current->with_block++;
    emulation::leave();
}

inline float __shfl_xor_sync(uint32_t, float value, int distance) {
    const uint32_t bits = __float_as_uint(value);
    int turn;
    const emulation::Thread* warp = emulation::meet_warp(&bits, 1, turn);
    return __uint_as_float(warp[threadIdx.x % 32 ^ distance].given[turn][0]);
}

// Calls `kernel` in every thread of a one-dimensional block, for every block of the grid.
inline void emulate(Place grid, unsigned threads_per_block, std::function<void()> kernel) {
    using namespace emulation;
    emulation::kernel = std::move(kernel);
    if (threads.size() != threads_per_block) threads = std::vector<Thread>(threads_per_block);
    for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++) {
            for (Thread& thread : threads) {
                thread.done = false;
                thread.with_warp = thread.with_block = 0;
                getcontext(&thread.context);
                thread.context.uc_stack.ss_sp = thread.stack.get();
                thread.context.uc_stack.ss_size = 65536;
                makecontext(&thread.context, run, 0);
            }
            for (size_t left = threads.size(); left;) {
                bool progress = false;
                for (size_t i = 0; i < threads.size(); i++) {
                    if (threads[i].done || !ready(threads[i], i)) continue;
                    current = &threads[i];
                    threadIdx.x = i;
                    swapcontext(&scheduler, &threads[i].context);
                    left -= threads[i].done;
                    progress = true;
                }
                if (!progress) fail("threads wait for others that have ended or went another way");
            }
        }
}

// ------------------------------------------------------------------------------- instructions of kernels.cu

inline float half_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent ? std::ldexp(1024.0f + mantissa, exponent - 25) : std::ldexp((float)mantissa, -24);
    return bits & 0x8000 ? -size : size;
}

inline uint16_t float_to_half(float value) {
    const float size = std::fabs(value);
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (value != value) return 0x7FFF;
    if (size >= 65520) return sign | 0x7C00;
    if (size < 6.103515625e-05f) return sign | (int)std::nearbyint(std::ldexp(size, 24));
    const int exponent = std::ilogb(size);
    return sign | ((exponent + 14 << 10) + (int)std::nearbyint(std::ldexp(size, 10 - exponent)));
}

inline uint32_t flip(uint32_t a, uint32_t bits) { return a ^ bits; }

inline uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) { return a & mask | bits; }

inline uint4 load_once(const unsigned char* address) {
    if ((uintptr_t)address % 16) emulation::fail("16 bytes are loaded from an address that is no multiple of 16");
    return *(const uint4*)address;
}

template <class T> inline float of_pair(T, uint32_t pair, int which) {
    return to_float(T{(uint16_t)(pair >> 16 * which)});
}

// All uses in kernels.cu are meant to be exact, so inexactness is an error here.
template <class T> inline uint32_t fma2(T kind, uint32_t a, uint32_t b, uint32_t c) {
    uint32_t pair = 0;
    for (int i = 0; i < 2; i++) {
        const double exact = (double)of_pair(kind, a, i) * of_pair(kind, b, i) + of_pair(kind, c, i);
        T rounded;
        round_to(rounded, (float)exact);
        if (to_float(rounded) != exact) emulation::fail("a weight is not exact in the tensor cores' type");
        pair |= (uint32_t)rounded.bits << 16 * i;
    }
    return pair;
}

template <class T>
inline void multiply_tile(T kind, float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                          uint32_t b1) {
    const uint32_t mine[6] = {a0, a1, a2, a3, b0, b1};
    int turn;
    const emulation::Thread* warp = emulation::meet_warp(mine, 6, turn);
    const int group = threadIdx.x % 32 / 4, member = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        const int high = i / 2, column = 2 * member + i % 2;
        double total = 0;
        for (int k = 0; k < 16; k++) {
            const emulation::Thread &left = warp[4 * group + k % 8 / 2], &right = warp[4 * column + k % 8 / 2];
            total += (double)of_pair(kind, left.given[turn][high + 2 * (k / 8)], k % 2) *
                     of_pair(kind, right.given[turn][4 + k / 8], k % 2);
        }
        sum[i] += (float)total;
    }
}
