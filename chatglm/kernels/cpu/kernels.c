/* The CPU kernels, in one translation unit: products with INT4 / INT8 weights (and with fp32 / fp16 / bf16 ones), and the
 * operations around them that are slow in torch. The code is in the headers; Python calls the `chatglm_*` functions.
 *
 * Weights are read in their published layout: `out` rows of in * bits / 8 bytes, one scale per row. INT4: byte j holds
 * column 2j in its high nibble and column 2j + 1 in its low one, both in two's complement.
 *
 * Activations become fixed-point numbers, with one scale (here: step) for every GROUP columns of a row. The products
 * within a group are then exact integer ones, of 16 bits (`default`: +-32512, relative error about 3e-5) or 8 (`int8`).
 * `exact` keeps the activations in fp32. Families of kernels:
 *
 *   portable  plain C, compiled a second time for AVX2; 16-bit activations (products_portable.h). One row with AVX2:
 *             products_avx2.h, with INT4 weights also 8-bit activations
 *   VNNI      AVX-512 intrinsics. 1 or 2 rows (INT8 weights or activations: 4): products_dots.h. Up to 8 rows of 16
 *             bits: products_few.h. More rows: products_tiles.h.
 *   DOTPROD, I8MM  ARM intrinsics (products_arm.h); with `exact`, the portable kernels
 *
 * Zeros pad the last group, so any number of columns takes the same path. NaN or infinite activations give NaN;
 * activations under 1e-33 count as zero.
 */
/* This order decides where the loops come to lie. In another one, a loop of chatglm_dequantize crossed a cache line, and
 * GCC 12's code took 13 % longer. */
#include "targets.h"
#include "numbers.h"
#include "products.h"
#include "blocks.h"
#include "attention.h"
#include "layouts.h"
#include "probes.h"
