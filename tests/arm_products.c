/* Computes products that it reads, for test_kernels_cpu_arm.py: the kernels on an ARM CPU, without Python.
 *
 * Writes which families of kernels run; then reads cases: nine numbers of 64 bits (the arguments of chatglm_linear from
 * isa to scale_type without the pointers, then rows, in, out), the bytes of x, of the weights and of the scales. After
 * each case it writes the bytes of y. */
#include <stdio.h>

#include "kernels.c"

static void *take(i64 bytes) {
    void *memory = malloc((size_t)bytes);
    if (!memory || fread(memory, 1, (size_t)bytes, stdin) != (size_t)bytes) exit(2);
    return memory;
}

int main(void) {
    for (int isa = PORTABLE; isa <= I8MM; isa++) putchar(chatglm_runs(isa));
    i64 job[9];
    while (fread(job, sizeof job, 1, stdin)) {
        const int isa = (int)job[0], threads = (int)job[1], precision = (int)job[2], bits = (int)job[3];
        const int x_type = (int)job[4], scale_type = (int)job[5];
        const i64 rows = job[6], in = job[7], out = job[8];
        void *x = take(rows * in * bytes_of(x_type)), *weight = take(out * in * bits / 8);
        void *scale = take(out * bytes_of(scale_type)), *y = malloc((size_t)(rows * out * bytes_of(x_type)));
        if (!y || chatglm_linear(isa, threads, precision, bits, x, x_type, weight, scale, scale_type, y, rows, in, out))
            return 3;
        fwrite(y, (size_t)bytes_of(x_type), (size_t)(rows * out), stdout);
        free(x), free(weight), free(scale), free(y);
    }
    return 0;
}
